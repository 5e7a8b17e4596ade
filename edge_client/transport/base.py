"""What a transport is to the client: a link that sends frames, and whom it tells what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protos.errors import HeadtailError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer, Grant, Result

Gate = Callable[[int, int], bool]
"""(layer, bytes) → whether the layer may enter the network now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """What the server said to our hello."""

    session_id: str
    model: str
    bundle_sha256: str
    max_in_flight: int
    max_payload_bytes: int
    takes_video: bool = False
    datagrams: pb.DatagramOffer | None = None


class SessionEvents(Protocol):
    """Who is told. Every method is called on the event loop and returns at once."""

    def hello(self) -> pb.Hello:
        """The hello of the next stream."""
        ...

    def on_up(self, welcome: Welcome) -> None:
        """The stream stands."""

    def on_down(self, error: HeadtailError) -> None:
        """The stream that stood is gone; what was in flight will not be answered."""

    def on_result(self, result: Result, now_ns: int) -> None:
        """An answer arrived, wanted or not."""

    def on_sent(self, frame_id: int, layer: int, n_bytes: int, now_ns: int) -> None:
        """A layer was handed to the transport."""

    def on_unsent(self, frame_id: int) -> None:
        """The frame's base layer was held back (too late, or no grant for it): no answer will come."""

    def on_lost(self, frame_id: int, now_ns: int) -> None:
        """The frame was sent, and no answer will come: its datagrams or those of its answer were lost."""

    def on_reliable(self, reliable: bool, lost: tuple[float, float] | None = None) -> None:
        """Whether what is handed over from now on arrives, in order, or the session ends; true until said otherwise.

        Args:
            reliable: it does.
            lost: where it does not, the share of packets lost and the mean run of losses; told again when they change.
        """

    def frame_bytes(self) -> float:
        """What a frame should cost on the wire at most, parity included."""
        ...

    def on_grant(self, grant: Grant, now_ns: int) -> None:
        """The server allows more or less."""

    def on_pong(self, rtt_ns: int, now_ns: int) -> None:
        """A ping came back."""

    def on_bundle_changed(self, sha256: str) -> None:
        """The server's tail was replaced."""

    def on_draining(self, grace_ns: int) -> None:
        """The server is going away; it takes no new frames."""

    def ping_due(self, now_ns: int) -> bool:
        """Whether the round trip should be measured now."""
        ...


class Link(Protocol):
    """What carries frames and answers: one server, reconnected for as long as it takes; ``GrpcLink`` in earnest.

    It decides nothing about frames. What happens is told to the `SessionEvents` it was made with.
    """

    up: bool
    welcomed: asyncio.Event
    failed: asyncio.Event
    error: HeadtailError | None
    reconnects: int

    async def run(self) -> None:
        """Connects and reconnects until closed."""

    def send(self, layers: list[FrameLayer], *, deadline_ns: int | None, gate: Gate | None = None) -> int:
        """Queues a frame; the id its answer will carry."""
        ...

    def restart(self) -> None:
        """Hello again."""

    def close(self) -> None:
        """Goodbye."""
