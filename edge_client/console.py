"""The console as it is: closed, of another encoding, a pipe that nobody empties. None of it may end a run with a traceback."""

from __future__ import annotations

import os
import select
import sys
import threading
from contextlib import suppress
from typing import NoReturn, TextIO

_closed: set[int] = set()


def was_closed(number: int) -> bool:
    """Whether the client was started with this descriptor closed."""
    return number in _closed


def mend() -> None:
    """Makes standard input, output and error usable, whatever the client was started with.

    A closed descriptor is opened on nothing, before a file or a socket takes its number and receives what was meant for people.
    What the console's encoding does not know is written as an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _closed.add(number)
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def put(stream: TextIO, text: str) -> None:
    """Writes text that may be lost: where nobody empties the pipe it is left out, since the next line says more."""
    try:
        if select.select([], [stream], [], 0)[1]:
            stream.write(text)
            stream.flush()
    except (OSError, ValueError):  # closed, or no descriptor
        with suppress(OSError, ValueError):
            stream.write(text)


def say(stream: TextIO, text: str) -> None:
    """Writes a line to whoever still reads."""
    try:
        print(text, file=stream, flush=True)
    except OSError:  # whoever read us has had enough; without this the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(code: int) -> NoReturn:
    """Ends the process, also while a thread of ours sits in a camera's driver or in a model that does not come back.

    Python would wait for such a thread, or end it inside the library it is in, which ends the process with a signal.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if any(thread is not threading.main_thread() for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)
