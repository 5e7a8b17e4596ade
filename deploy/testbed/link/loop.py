"""Virtual time: a heap of things to do, in order of time and then of insertion."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from deploy.testbed.link.trace import NEVER_NS


class Loop:
    """A discrete-event loop. Deterministic: events of one moment run in the order they were scheduled."""

    __slots__ = ("_count", "_heap", "now_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._count = 0

    def at(self, when_ns: int, action: Callable[[Any], None], argument: Any = None) -> None:
        """Schedules ``action(argument)``; the past means now."""
        self._count += 1
        heappush(self._heap, (when_ns if when_ns > self.now_ns else self.now_ns, self._count, action, argument))

    def next_ns(self) -> int:
        """When the next thing is due; ``NEVER_NS`` when nothing is."""
        return self._heap[0][0] if self._heap else NEVER_NS

    def run(self, until_ns: int) -> None:
        """Runs everything up to and including ``until_ns``."""
        heap = self._heap
        while heap and heap[0][0] <= until_ns:
            self.now_ns, _, action, argument = heappop(heap)
            action(argument)
        self.now_ns = max(self.now_ns, until_ns)
