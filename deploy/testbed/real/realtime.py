"""The link's virtual time beside the clock on the wall."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from deploy.testbed.link.loop import Loop
from deploy.testbed.link.trace import NEVER_NS


class RealTime:
    """Runs a virtual loop beside the clock on the wall: its time is the time since the start."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.loop = Loop()
        self._clock = clock
        self._start_ns = clock()
        self.start_unix_ns = time.time_ns()  # for people: to lay other processes' logs beside this
        self._timer: asyncio.TimerHandle | None = None

    def since_ns(self) -> int:
        """Time since the start."""
        return self._clock() - self._start_ns

    def catch_up(self) -> None:
        """Does what is due and asks to be woken for the next."""
        self.loop.run(self._clock() - self._start_ns)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ns = self.loop.next_ns()
        if due_ns < NEVER_NS:
            delay_s = max(0.0, (due_ns + self._start_ns - self._clock()) * 1e-9)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.catch_up)

    def stop(self) -> None:
        """No more wakes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
