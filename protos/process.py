"""What every command does first, whatever it was started from: a cron job, a container without a home, a closed terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO


def installed_version() -> str:
    """The release that is installed; ``0`` in a source tree that is not."""
    try:
        return version("headtail")
    except PackageNotFoundError:
        return "0"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Gives a command its ``--version``."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {installed_version()}")


def steady_streams() -> None:
    """Makes sure that standard streams exist and that no text breaks them.

    A closed stream would otherwise hand its number to the next file that is opened, which then receives what libraries write to
    standard error. A console that cannot show a character gets its escape instead of a traceback.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = _steady(sys.stdout, 1)
    sys.stderr = _steady(sys.stderr, 2)


def _steady(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def leave(code: int) -> None:
    """Ends the process now. Threads that are inside a library's call are not waited for. Never returns."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
