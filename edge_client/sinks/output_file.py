"""A file the client writes: its alone while it runs, and looked after.

Two programs that write one file destroy both their results, so the file is locked before a byte of it is touched. While it is
written it may be rotated, deleted, replaced or cut to nothing by others; ``state`` notices.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from edge_client.capture.sources import Source
from protos.errors import ConfigError
from splitters.runtime.pictures import PICTURE_SUFFIXES, content_of, files_below

log = logging.getLogger(__name__)


class State(Enum):
    """What became of a file since it was last written."""

    SAME = "the same"
    GONE = "gone"
    REPLACED = "replaced"
    CUT = "cut off"


class OutputFile:
    """An open, locked file; unbuffered, so that what was written is there whatever happens to us."""

    def __init__(self, path: Path, option: str) -> None:
        """Opens the file, or creates it; nothing in it is touched.

        Raises:
            ConfigError: it cannot be written, or another program writes it.
        """
        self.path = path
        try:
            self.file: BinaryIO = _open(path)
        except OSError as error:
            raise ConfigError(f"{option} {path} cannot be written: {error.strerror}") from error
        self.regular = stat.S_ISREG(os.fstat(self.file.fileno()).st_mode)
        if self.regular and not _lock(self.file):
            self.file.close()
            raise ConfigError(f"{option} {path} is being written by another program; give each client a file of its own")

    def state(self, size_bytes: int) -> State:
        """What became of the file, which should hold ``size_bytes``."""
        if not self.regular:
            return State.SAME
        try:
            there = self.path.stat()
        except OSError:
            return State.GONE
        ours = os.fstat(self.file.fileno())
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            return State.REPLACED
        return State.CUT if ours.st_size < size_bytes else State.SAME

    def close(self) -> None:
        """Closes and unlocks it."""
        self.file.close()


def _open(path: Path) -> BinaryIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOCTTY", 0)
    try:
        number = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ESPIPE, errno.EINVAL):
            raise
        number = os.open(path, (flags & ~os.O_RDWR) | os.O_WRONLY, 0o666)  # may be written and not be read
    return os.fdopen(number, "r+b" if _can_read(number) else "wb", buffering=0)


def _can_read(number: int) -> bool:
    return fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        log.debug("no lock: %s", error)
    return True


def refuse_overwriting(option: str, target: str | None, source: Source, others: Iterable[tuple[str, str | None]] = ()) -> None:
    """Refuses an output that is the source itself, a picture of the source's directory, or another file of the user's.

    Args:
        option: for the message.
        target: the output's path; None or ``-``: none.
        source: what is read.
        others: options and paths that must stay as they are.

    Raises:
        ConfigError: it would be overwritten.
    """
    if target is None or target == "-":
        return
    path = Path(target)
    for name, other in others:
        if other is not None and other != "-" and _same(path, Path(other)):
            raise ConfigError(f"{option} {target} is the file of {name}; give it another name")
    if source.kind in ("url", "synthetic"):
        return
    origin = Path(source.target)
    if _same(path, origin):
        raise ConfigError(f"{option} {target} is the source itself, which would be overwritten; give it another name")
    if source.kind != "directory":
        return
    if (path.is_dir() or not path.suffix) and origin.resolve() in path.resolve().parents:
        raise ConfigError(f"{option} {target} lies in the source's directory, where the next run would read it; give another place")
    if path.is_file() and any(_same(path, entry) for entry in files_below(origin) if _is_source(entry)):
        raise ConfigError(f"{option} {target} is a picture of the source, which would be overwritten; give it another name")


def _is_source(entry: Path) -> bool:
    return entry.is_file() and (entry.suffix.lower() in PICTURE_SUFFIXES or content_of(entry) != "other")


def _same(a: Path, b: Path) -> bool:
    with suppress(OSError):
        return a.samefile(b)
    return a.absolute() == b.absolute()
