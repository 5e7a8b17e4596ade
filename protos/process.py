"""What every command does first, whatever it was started from: a cron job, a container without a home, a closed terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import NoReturn, TextIO

_closed: set[int] = set()


def was_closed(number: int) -> bool:
    """Whether the process was started with this descriptor closed."""
    return number in _closed


def steady_streams() -> None:
    """Makes sure that standard streams exist and that no text breaks them.

    A closed stream would otherwise hand its number to the next file that is opened, which then receives what libraries write to
    standard error. A console that cannot show a character gets its escape instead of a traceback.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _closed.add(number)
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = _steady(sys.stdout, 1)
    sys.stderr = _steady(sys.stderr, 2)


def _steady(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def leave(code: int) -> NoReturn:
    """Ends the process, also while a thread of ours sits in a camera's driver or in a model that does not come back.

    Python would wait for such a thread, or end it inside the library it is in, which ends the process with a signal.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if any(thread is not threading.main_thread() for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)
