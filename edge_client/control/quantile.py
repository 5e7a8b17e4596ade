"""Quantiles over a sliding window of time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque


class SlidingQuantile:
    """The newest ``size`` samples, none older than ``age_ns``, kept sorted.

    Insertion costs a binary search and two short moves; a quantile is one index.

    Attributes:
        ordered: the samples, ascending; to be read only.
    """

    __slots__ = ("_age_ns", "_order", "_size", "ordered")

    def __init__(self, *, size: int, age_ns: int) -> None:
        self._size = size
        self._age_ns = age_ns
        self._order: deque[tuple[int, float]] = deque()
        self.ordered: list[float] = []

    def __len__(self) -> int:
        return len(self.ordered)

    def add(self, value: float, now_ns: int) -> None:
        """Takes a sample; ``now_ns`` may go backwards (the sample then merely leaves by count)."""
        order = self._order
        order.append((now_ns, value))
        insort(self.ordered, value)
        if len(order) > self._size:
            self._drop_oldest()
        if now_ns - order[0][0] > self._age_ns:
            self.expire(now_ns)

    def expire(self, now_ns: int) -> int:
        """Forgets what is too old; returns how many that were."""
        gone = 0
        while self._order and now_ns - self._order[0][0] > self._age_ns:
            self._drop_oldest()
            gone += 1
        return gone

    def clear(self) -> None:
        """Forgets everything."""
        self._order.clear()
        self.ordered.clear()

    def quantile(self, q: float, default: float) -> float:
        """The smallest sample that at least a share ``q`` of the samples do not exceed; ``default`` when empty."""
        ordered = self.ordered
        if not ordered:
            return default
        n = len(ordered)
        i = int(q * n)
        return ordered[i if i < n else -1]

    def minimum(self, default: float) -> float:
        """The least sample, or ``default``."""
        return self.ordered[0] if self.ordered else default

    def count_at_most(self, value: float) -> int:
        """How many samples do not exceed ``value``."""
        return bisect_right(self.ordered, value)

    def _drop_oldest(self) -> None:
        _, value = self._order.popleft()
        del self.ordered[bisect_left(self.ordered, value)]
