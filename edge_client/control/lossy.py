"""What losses cost a frame that goes as datagrams: bytes of parity, and losses that are no news."""

from __future__ import annotations

from math import inf

from protos.datagrams.loss import GOAL, Redundancy

_SHARE = 0.4  # of what the link carries in a frame's interval: more parity would make frames late that it saves
_MOST_EXPECTED = 3.0  # frames that the path's losses may explain at once


class LossyPath:
    """Of one session.

    Attributes:
        redundancy: what the path's losses ask for; None: a stream.
    """

    __slots__ = ("_expected", "redundancy")

    def __init__(self) -> None:
        self.redundancy: Redundancy | None = None
        self._expected = 0.0  # frames lost that were not told of

    def set_lost(self, lost: tuple[float, float] | None) -> None:
        """The share of packets lost and the mean run of losses; None: a stream."""
        self.redundancy = Redundancy.of(lost) if lost is not None else None

    def frame_bytes(self, interval_bytes: float) -> float:
        """What a frame should cost on the wire where the link carries so much in an interval; infinite on a stream."""
        return _SHARE * interval_bytes if self.redundancy is not None else inf

    def sent(self, n_bytes: int, frame_bytes: float) -> int:
        """A payload leaves: what it costs on the wire."""
        if self.redundancy is None:
            return n_bytes
        wire_bytes, p = self.redundancy.cost(n_bytes, frame_bytes)
        self._expected = min(_MOST_EXPECTED, self._expected + 1 - p * GOAL)
        return int(wire_bytes)

    def explains(self) -> bool:
        """Whether a frame that was never answered is no more than the path's losses explain."""
        explained = self._expected >= 1
        self._expected -= explained
        return explained
