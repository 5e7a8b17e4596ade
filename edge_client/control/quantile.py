"""Quantiles over a sliding window of time."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort


class SlidingQuantile:
    """The newest ``size`` samples, none older than ``age_ns``, kept sorted.

    Insertion costs a binary search and a few short moves; a quantile is one index. The numbers lie side by side: as objects they
    would be strewn over the memory of a process with a thousand of these, and each comparison would miss the cache.

    Attributes:
        ordered: the samples, ascending; to be read only.
    """

    __slots__ = ("_age_ns", "_size", "_times_ns", "_values", "ordered")

    def __init__(self, *, size: int, age_ns: int) -> None:
        self._size = size
        self._age_ns = age_ns
        self._times_ns = array("q")  # of the samples in the order they came
        self._values = array("d")
        self.ordered = array("d")

    def __len__(self) -> int:
        return len(self.ordered)

    def add(self, value: float, now_ns: int) -> None:
        """Takes a sample; ``now_ns`` may go backwards (the sample then merely leaves by count)."""
        times_ns = self._times_ns
        times_ns.append(now_ns)
        self._values.append(value)
        insort(self.ordered, value)
        if len(times_ns) > self._size:
            self._drop_oldest()
        if now_ns - times_ns[0] > self._age_ns:
            self.expire(now_ns)

    def expire(self, now_ns: int) -> int:
        """Forgets what is too old; returns how many that were."""
        gone, times_ns = 0, self._times_ns
        while times_ns and now_ns - times_ns[0] > self._age_ns:
            self._drop_oldest()
            gone += 1
        return gone

    def clear(self) -> None:
        """Forgets everything."""
        del self._times_ns[:], self._values[:], self.ordered[:]

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
        self._times_ns.pop(0)
        del self.ordered[bisect_left(self.ordered, self._values.pop(0))]
