"""The credit window: no frame enters a network that is not ready for it."""

from __future__ import annotations

from math import ceil

from edge_client.control.estimating.estimator import Estimator


class CreditWindow:
    """At most ``max(2, ceil(fps * (RTT + server time)) + 1)`` frames, and at most one bandwidth-delay product of bytes.

    On a link that loses packets the round trip includes the repair of one: what waits behind a hole has left the network and
    waits at the receiver, and the next frame's acknowledgement is what reveals the hole. A longer round trip of any other kind
    is a queue, and opens nothing. One frame may always be in flight, whatever its size. HTTP/2 flow control and the kernel's
    socket buffer would queue many stale frames instead, and gRPC hides that queue; the idea is Salsify's (Fouladi et al.,
    NSDI 2018).
    """

    __slots__ = ("_estimator", "_fps", "_max_in_flight")

    def __init__(self, estimator: Estimator, *, fps: float, max_in_flight: int = 0) -> None:
        self._estimator = estimator
        self._fps = fps
        self._max_in_flight = max_in_flight

    def set_limit(self, max_in_flight: int) -> None:
        """What the server's welcome allows; 0: no limit of its own."""
        self._max_in_flight = max(0, max_in_flight)

    def limits(self) -> tuple[int, float]:
        """Frames that may be unanswered; bytes that may: the bandwidth-delay product, with one frame interval for the queue."""
        e = self._estimator
        # The lower quartile: a frame's own transmission belongs to the round trip, the queue behind others does not.
        loop_s = (e.rtt_ns(0.25) + e.server_ns + e.repair_ns) * 1e-9
        frames = max(2, ceil(min(self._fps * loop_s, 1e6)) + 1)
        if 0 < self._max_in_flight < frames:
            frames = self._max_in_flight
        if 0 < e.grant_max_in_flight < frames:
            frames = e.grant_max_in_flight
        return frames, e.delivery_bps / 8 * (loop_s + 1 / self._fps)

    @property
    def frames(self) -> int:
        """Frames that may be unanswered."""
        return self.limits()[0]

    def allows(self, n_bytes: float = 0) -> bool:
        """Whether a frame of that size may enter the network now."""
        in_flight = self._estimator.in_flight
        if in_flight == 0:
            return True
        frames, most_bytes = self.limits()
        return in_flight < frames and self._estimator.backlog_bytes + n_bytes <= most_bytes
