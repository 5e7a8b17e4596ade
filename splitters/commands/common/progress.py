"""How far a piece of work is: a bar in a terminal, else a flushed line now and then. On standard error: results stay apart."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

_EVERY_S = 5.0


class Progress:
    """Shows how far a piece of work is; called with the steps done, all the steps there are, and what is being done.

    Args:
        name: of the work.
        stream: where to; None: standard error.
        clock_s: monotonic seconds.
        every_s: where there is no terminal, a line at most so often. The first and the last step always have one.
    """

    def __init__(
        self, name: str, *, stream: TextIO | None = None, clock_s: Callable[[], float] = time.monotonic, every_s: float = _EVERY_S
    ) -> None:
        self._name, self._stream, self._clock_s, self._every_s = name, stream or sys.stderr, clock_s, every_s
        self._shown_s: float | None = None
        self._last = ("", True)
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bar = _bar(self._stream)
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=None, told="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._last[1]:
            self._print(self._last[0])

    def __call__(self, done: int, total: int, told: str = "") -> None:
        """Tells that ``done`` of ``total`` steps are done, the last of them (or the next) being ``told``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, told=told)
            return
        line = f"{self._name}: {done} of {total}{'  ' if told else ''}{told}"
        now_s = self._clock_s()
        due = self._shown_s is None or now_s - self._shown_s >= self._every_s or done >= total
        self._last = (line, due)
        if due:
            self._shown_s = now_s
            self._print(line)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _bar(stream: TextIO) -> Any:
    """Rich's bar; None where Rich is not installed, and lines have to do."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    return Bar(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[told]}", markup=False), console=Console(file=stream),
    )  # fmt: skip
