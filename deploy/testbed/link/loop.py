"""Virtual time: things to do, in order of time and then of insertion."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

from deploy.testbed.link.trace import NEVER_NS

_SHIFT = 21  # a stretch of time is 2 ms long


class Loop:
    """A discrete-event loop. Deterministic: events of one moment run in the order they were scheduled.

    What is due in the stretch of time at hand lies in a heap, everything later in a list for each stretch. One heap of all that a
    thousand cameras have before them is so large that every step through it misses the processor's cache.
    """

    __slots__ = ("_count", "_heap", "_later", "_stretch", "_stretches", "now_ns")

    def __init__(self) -> None:
        self.now_ns = 0
        self._heap: list[tuple[int, int, Callable[[Any], None], Any]] = []
        self._later: dict[int, list[tuple[int, int, Callable[[Any], None], Any]]] = {}
        self._stretches: list[int] = []  # a heap: those of which there is a list
        self._stretch = 0  # the one at hand
        self._count = 0

    def at(self, when_ns: int, action: Callable[[Any], None], argument: Any = None) -> None:
        """Schedules ``action(argument)``; the past means now."""
        if when_ns < self.now_ns:
            when_ns = self.now_ns
        self._count += 1
        event = (when_ns, self._count, action, argument)
        stretch = when_ns >> _SHIFT
        if stretch <= self._stretch:
            heappush(self._heap, event)
        elif (later := self._later.get(stretch)) is not None:
            later.append(event)
        else:
            self._later[stretch] = [event]
            heappush(self._stretches, stretch)

    def next_ns(self) -> int:
        """When the next thing is due; ``NEVER_NS`` when nothing is."""
        if not self._heap and self._stretches:
            self._go_on()
        return self._heap[0][0] if self._heap else NEVER_NS

    def run(self, until_ns: int) -> None:
        """Runs everything up to and including ``until_ns``."""
        heap = self._heap
        while True:
            while heap and heap[0][0] <= until_ns:
                self.now_ns, _, action, argument = heappop(heap)
                action(argument)
            if heap or not self._stretches or self._stretches[0] << _SHIFT > until_ns:
                break
            self._go_on()
        self.now_ns = max(self.now_ns, until_ns)

    def _go_on(self) -> None:
        """The next stretch in which anything is due is the one at hand."""
        self._stretch = heappop(self._stretches)
        self._heap += self._later.pop(self._stretch)
        heapify(self._heap)
