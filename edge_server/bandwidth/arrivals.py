"""What the arrivals of one session, or of a group of sessions, tell about the link they came through.

Send times are the device's clock, arrival times ours; only differences are used, so the offset cancels: a layer's
queueing delay is its one-way delay less the least one seen lately. From it come

* the delivery bitrate, in the manner of BBR (Cardwell et al., 2016): bytes over the time the link was busy with them;
* the delay's trend, in the manner of Google's congestion control (Carlucci et al., 2016): the least-squares slope of
  the queueing delay over the newest arrivals.
"""

from __future__ import annotations

from collections import deque
from math import exp

_MIN_SERVICE_NS = 100_000
_DELAY_WINDOW_NS = 20_000_000_000
_RATE_MEMORY_NS = 1_500_000_000
_DELIVERY_WINDOW_NS = 1_000_000_000
_TREND_SAMPLES = 20
_TREND_WINDOW_NS = 2_000_000_000


class LinkRate:
    """Bitrate of a bottleneck from service times: exponentially forgotten bits over forgotten busy seconds."""

    __slots__ = ("_at_ns", "_bits", "_busy_s", "_last_ns", "samples")

    def __init__(self) -> None:
        self._bits = 0.0
        self._busy_s = 0.0
        self._at_ns = 0
        self._last_ns = 0
        self.samples = 0

    def add(self, n_bytes: int, earliest_ns: int, now_ns: int) -> None:
        """``n_bytes`` arrived at ``now_ns``; over an idle link they would have begun to arrive at ``earliest_ns``."""
        service_ns = max(now_ns - max(earliest_ns, self._last_ns), _MIN_SERVICE_NS)
        keep = exp(-max(0, now_ns - self._at_ns) / _RATE_MEMORY_NS) if self.samples else 0.0
        self._bits = self._bits * keep + 8.0 * n_bytes
        self._busy_s = self._busy_s * keep + service_ns * 1e-9
        self._at_ns = self._last_ns = now_ns
        self.samples += 1

    @property
    def bps(self) -> float:
        """Bits/s, 0 before the first arrival."""
        return self._bits / self._busy_s if self._busy_s > 0 else 0.0


class Arrivals:
    """One session's arrivals."""

    __slots__ = ("_delays", "_history", "_recent", "_recent_bytes", "_trend", "last_ns", "link", "queue_ns")

    def __init__(self) -> None:
        self.link = LinkRate()
        self.queue_ns = 0
        self.last_ns = 0
        self._delays: deque[tuple[int, int]] = deque()  # increasing delays: the front is the window's minimum
        self._recent: deque[tuple[int, int]] = deque()
        self._recent_bytes = 0
        self._history: deque[tuple[int, int]] = deque(maxlen=_TREND_SAMPLES)
        self._trend: float | None = 0.0

    def add(self, n_bytes: int, sent_ns: int, now_ns: int) -> int:
        """A layer arrived; returns when, on our clock, it would have begun to arrive over an idle link."""
        n_bytes = max(0, n_bytes)
        delay_ns = now_ns - sent_ns
        while self._delays and self._delays[-1][1] >= delay_ns:
            self._delays.pop()
        self._delays.append((now_ns, delay_ns))
        while now_ns - self._delays[0][0] > _DELAY_WINDOW_NS:
            self._delays.popleft()
        least_ns = self._delays[0][1]
        self.queue_ns = delay_ns - least_ns
        self.last_ns = now_ns
        self._recent.append((now_ns, n_bytes))
        self._recent_bytes += n_bytes
        self._expire(now_ns)
        self._history.append((now_ns, self.queue_ns))
        while now_ns - self._history[0][0] > _TREND_WINDOW_NS:
            self._history.popleft()
        self._trend = None
        earliest_ns = sent_ns + least_ns
        self.link.add(n_bytes, earliest_ns, now_ns)
        return earliest_ns

    def delivery_bps(self, now_ns: int) -> float:
        """Bits/s that arrived in the last second."""
        self._expire(now_ns)
        return 8e9 * self._recent_bytes / _DELIVERY_WINDOW_NS

    @property
    def trend_ms_per_s(self) -> float:
        """Queueing delay gained per second, over the newest arrivals; 0 when there are too few."""
        if self._trend is None:
            self._trend = self._slope()
        return self._trend

    def _expire(self, now_ns: int) -> None:
        while self._recent and now_ns - self._recent[0][0] > _DELIVERY_WINDOW_NS:
            self._recent_bytes -= self._recent.popleft()[1]

    def _slope(self) -> float:
        newest_ns = self._history[-1][0]
        n = sum_t = sum_q = sum_tt = sum_tq = 0  # whole numbers: exact
        for t, q in self._history:
            if 0 <= (ago := newest_ns - t) <= _TREND_WINDOW_NS:
                n += 1
                sum_t -= ago
                sum_q += q
                sum_tt += ago * ago
                sum_tq -= ago * q
        spread = n * sum_tt - sum_t * sum_t
        if n < 5 or spread <= 0:
            return 0.0
        return 1e3 * (n * sum_tq - sum_t * sum_q) / spread
