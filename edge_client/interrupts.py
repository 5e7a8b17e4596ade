"""Signals, as the command line takes them: the first ends the client in order, the second at once.

Python's own handlers run as soon as a system call was interrupted, also where the event loop is stuck in one: a pipe that is
not emptied, a name server that does not answer. A second signal must not depend on anything that may hang, so it ends the
process there and then. SIGHUP (the terminal was closed) is a first signal however often it comes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

EXIT_CODE = 130


class Interrupts:
    """Counts signals and passes the first one on to the event loop."""

    def __init__(self) -> None:
        self.stopping = False
        self._pressed = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], None] = lambda: None
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Takes the signals over; without effect outside of the main thread. A SIGHUP that ``nohup`` blocks stays blocked."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if number is signal.SIGHUP and before is signal.SIG_IGN:
                continue
            self._before[number] = before
            signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Gives the signals back."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def bind(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
        """Says what the first signal does, in the loop; at once, if it has come already."""
        self._loop, self._stop = loop, stop
        if self.stopping:
            loop.call_soon(stop)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGHUP:
            self._pressed += 1
            if self._pressed > 1:
                os._exit(EXIT_CODE)
        if not self.stopping:
            self.stopping = True
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._stop)
