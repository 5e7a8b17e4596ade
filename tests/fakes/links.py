"""A client's link by itself, behind a shaped path: sends frames and notes what it is told of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from math import inf

from deploy.testbed.link.model import LinkConfig, LossModel
from deploy.testbed.link.trace import constant
from deploy.testbed.real.shape import Shaper
from edge_client.transport.base import Welcome
from edge_client.transport.grpc import GrpcLink
from edge_client.transport.quic import QuicLink
from edge_client.transport.rpc import Endpoint
from protos.errors import HeadtailError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, FrameLayer, Grant, Result
from tests.fakes.server_client import session


def path(loss: float = 0.0, *, burst: float = 1.0, delay_ms: float = 5.0, mbps: float = 20.0) -> LinkConfig:
    """One direction of a link."""
    loss_model = LossModel(loss=loss, burst_packets=burst)
    return LinkConfig(trace=constant(mbps * 1e6), delay_ns=int(delay_ms * 1e6), loss=loss_model)


class Told:
    """``SessionEvents`` that only notes."""

    def __init__(self, sha256: str) -> None:
        self._sha256 = sha256
        self.results: dict[int, Result] = {}
        self.twice: list[int] = []
        self.lost: list[int] = []
        self.lost_packets: tuple[float, float] | None = None
        self.unsent: list[int] = []
        self.sent: list[tuple[int, int]] = []
        self.reliable = True
        self.downs: list[HeadtailError] = []
        self.welcome: Welcome | None = None

    def hello(self) -> pb.Hello:
        return pb.Hello(protocol_version=PROTOCOL_VERSION, bundle_sha256=self._sha256, max_in_flight=32)

    def on_up(self, welcome: Welcome) -> None:
        self.welcome = welcome

    def on_down(self, error: HeadtailError) -> None:
        self.downs.append(error)

    def on_result(self, result: Result, now_ns: int) -> None:
        if result.frame_id in self.results:
            self.twice.append(result.frame_id)
        self.results[result.frame_id] = result

    def on_sent(self, frame_id: int, layer: int, n_bytes: int, now_ns: int) -> None:
        self.sent.append((frame_id, layer))

    def on_unsent(self, frame_id: int) -> None:
        self.unsent.append(frame_id)

    def on_lost(self, frame_id: int, now_ns: int) -> None:
        self.lost.append(frame_id)

    def on_reliable(self, reliable: bool, lost: tuple[float, float] | None = None) -> None:
        self.reliable, self.lost_packets = reliable, lost

    def frame_bytes(self) -> float:
        return inf

    def on_grant(self, grant: Grant, now_ns: int) -> None: ...

    def on_pong(self, rtt_ns: int, now_ns: int) -> None: ...

    def on_bundle_changed(self, sha256: str) -> None: ...

    def on_draining(self, grace_ns: int) -> None: ...

    def ping_due(self, now_ns: int) -> bool:
        return False

    @property
    def settled(self) -> int:
        """Frames of which it is known what became of them."""
        return len(self.results) + len(self.lost) + len(self.unsent)


class Linked:
    """A link that stands, its events, and the path it goes through."""

    def __init__(self, link: GrpcLink, told: Told, shaper: Shaper) -> None:
        self.link, self.told, self.shaper = link, told, shaper

    @property
    def beside(self) -> bool:
        """Whether frames can go as datagrams now."""
        assert self.link._lane is not None
        return self.link._lane.open_now

    async def opened(self) -> None:
        """Until they can."""
        await until(lambda: self.beside, "the second path opens")

    async def frame(self, layers: Sequence[pb.FrameLayer]) -> Result:
        """Sends a frame as datagrams and waits for its answer."""
        result = await self.answered(await self.send(layers))
        assert not self.told.reliable
        return result

    async def send(self, layers: Sequence[pb.FrameLayer], *, deadline_s: float = 20.0) -> int:
        """Sends a frame as a client does, and lets the link do what it does with it."""
        deadline_ns = time.monotonic_ns() + int(deadline_s * 1e9)
        frame_id = self.link.send([FrameLayer.from_proto(layer) for layer in layers], deadline_ns=deadline_ns)
        await asyncio.sleep(0)
        return frame_id

    async def answered(self, frame_id: int) -> Result:
        """The frame's answer."""
        await until(lambda: frame_id in self.told.results, f"frame {frame_id} is answered")
        return self.told.results[frame_id]


async def until(true: Callable[[], bool], what: str, *, within_s: float = 60.0) -> None:
    """Waits."""
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.005)


@asynccontextmanager
async def linked(
    address: str, sha256: str, *, up: LinkConfig | None = None, down: LinkConfig | None = None,
    make: Callable[..., GrpcLink] = QuicLink, seed: int = 0, blocked: bool = False,
) -> AsyncIterator[Linked]:  # fmt: skip
    """A link to the server at ``address`` through a shaped path."""
    shaper = Shaper(up or path(), down or path(), seed=seed)
    host, _, port = address.rpartition(":")
    listen = await shaper.start(host, int(port))
    assert shaper.udp is not None
    shaper.udp.blocked = blocked
    told = Told(sha256)
    link = make(Endpoint(address=f"127.0.0.1:{listen}"), told, clock=time.monotonic_ns)
    task = asyncio.create_task(link.run())
    try:
        await asyncio.wait_for(link.welcomed.wait(), 60)
        yield Linked(link, told, shaper)
    finally:
        link.close()
        await asyncio.wait({task}, timeout=10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await shaper.close()


@asynccontextmanager
async def asking(
    address: str, sha256: str, transport: str
) -> AsyncIterator[Callable[[Sequence[pb.FrameLayer]], Awaitable[Result]]]:
    """A session over a transport, as what sends one of its frames and waits for the answer."""
    if transport == "grpc":
        async with session(address, sha256) as stream:
            yield stream.frame
        return
    async with linked(address, sha256) as it:
        await it.opened()
        yield it.frame
