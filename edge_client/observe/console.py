"""The console as it is: closed, of another encoding, a pipe that nobody empties. None of it may end a run with a traceback."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TextIO

from protos.text import printable

_MAX_LINE_CHARS = 1 << 20


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
    """Writes a line to the reader, if there still is one."""
    try:
        print("\n".join(printable(line, max_chars=_MAX_LINE_CHARS) for line in text.split("\n")), file=stream, flush=True)
    except OSError:  # the reader of our output has closed it; without this the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
