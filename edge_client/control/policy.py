"""What the client asks of a policy, which decides frame by frame what is sent to the server, and what it tells it.

``Controller`` is ours. Another one needs these methods and nothing else; one that derives from `Policy` needs those that are
asked, since what is told does nothing by default. All times are nanoseconds of the client's monotonic clock, and no method may
block or read a clock itself.
"""

from __future__ import annotations

from abc import abstractmethod
from math import inf
from typing import Protocol

from edge_client.control.decision import Decision
from splitters.bundle.operating_point import Quantiles


class Policy(Protocol):
    """Decides for one bundle; a new bundle gets a new one."""

    @property
    @abstractmethod
    def granted_in_flight(self) -> int:
        """Frames that may be unanswered by the server's last grant; 0: no limit."""
        ...

    # ------------------------------------------------------------------ asked

    @abstractmethod
    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Decision:
        """What to do with this frame; ``now_ns`` is when the device is free to begin."""
        ...

    @abstractmethod
    def may_send(self, frame_id: int, n_bytes: int, now_ns: int, deadline_ns: int, *, layer: int = 0) -> bool:
        """Whether this layer may enter the network now; of a frame whose base (layer 0) may not, nothing is sent."""
        ...

    @abstractmethod
    def allows(self) -> bool:
        """Whether any frame may enter the network now; asked where the operating point was set by hand."""
        ...

    @abstractmethod
    def wants_fallback(self, frame_id: int, now_ns: int, deadline_ns: int) -> bool:
        """Whether the local model should answer this frame now: its ``fallback_ns`` has come, and no answer."""
        ...

    @abstractmethod
    def ping_due(self, now_ns: int) -> bool:
        """Whether the round trip should be measured now."""
        ...

    def frame_bytes(self) -> float:
        """What a frame should cost on the wire at most, parity included; infinite: as much as the losses ask for."""
        return inf

    # ------------------------------------------------------------------ told

    def on_connect(self, now_ns: int) -> None:
        """A session with this bundle stands."""

    def on_disconnect(self, now_ns: int) -> None:
        """The session is gone, or takes no more frames."""

    def on_transport(self, *, reliable: bool, lost: tuple[float, float] | None = None) -> None:
        """From now on what is sent arrives, in order, or the session ends (a stream); or it may be lost, and holds nothing up.

        Args:
            reliable: a stream.
            lost: of the other kind, the share of packets lost and the mean run of losses.
        """

    def set_limit(self, max_in_flight: int) -> None:
        """Frames that may be unanswered by the server's welcome; 0: no limit of its own."""

    def on_grant(
        self, now_ns: int, *, bitrate_bps: float = 0.0, max_in_flight: int = 0, queue_ns: int = 0, tail_ns: int = 0
    ) -> None:
        """A grant from the server; 0 means no limit, or not known."""

    def on_sent(self, frame_id: int, n_bytes: int, now_ns: int) -> None:
        """Bytes of a layer were handed to the transport."""

    def on_ack(self, frame_id: int, now_ns: int, server_ns: int = 0) -> None:
        """A result arrived, late or not; the server had the frame for ``server_ns``."""

    def on_refused(self, frame_id: int, now_ns: int) -> None:
        """The server was too busy for the frame."""

    def on_lost(self, frame_id: int, now_ns: int) -> None:
        """No answer will come for the frame."""

    def on_pong(self, rtt_ns: int, now_ns: int) -> None:
        """A ping came back."""

    def on_device(self, decision: Decision, elapsed_ns: int, now_ns: int) -> None:
        """How long the device worked: decision to payload (split, offload), or to answer (``Local()``, fallbacks too)."""

    def on_share(self, share: float) -> None:
        """Which part of the device's time this camera may take, (0, 1]; the other cameras of its process have the rest."""

    def on_reference(self, age: int) -> None:
        """How many frame intervals old the reference is that the next frame could be predicted from; 0: there is none."""

    def on_video(self, size_px: int | None) -> None:
        """Of which size setting the H.264 stream is that the next frame could continue; None: it would begin with a key frame."""

    def on_payload(self, decision: Decision, n_bytes: int, now_ns: int) -> None:
        """What a frame's payload is, all its layers together, sent or not; its reference was as old as told last."""

    def set_device_ms(self, decision: Decision, ms: Quantiles) -> None:
        """What is now believed of a choice's time on the device."""

    @abstractmethod
    def withdraw_offloads(self, form: str = "") -> bool:
        """The server runs no whole model: pictures and video are no choice any more. Whether they were one.

        Args:
            form: only that format, ``h264`` for instance; empty: all.
        """
        ...
