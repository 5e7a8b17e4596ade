"""Failures of the machine, not of ours: a disk that is full, a file that is not there, a reader that has gone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from protos.errors import ConfigError, HeadtailError, StorageError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HELP = "make room there, or choose another place"


def as_known(error: BaseException) -> HeadtailError | None:
    """The clear error that a failure stands for, its causes included; None: it is our own fault."""
    if isinstance(error, HeadtailError):
        return error
    chain = list(_chain(error))
    for one in chain:
        if any(text in str(one) for number in _NO_ROOM for text in (os.strerror(number), f"(os error {number})")):
            place = f"{one.filename}: " if isinstance(one, OSError) and one.filename else ""
            return StorageError(f"{place}{os.strerror(errno.ENOSPC)}: {_HELP}")
    for said in (error, error.__cause__):
        if isinstance(said, OSError) and said.strerror:
            place = f"{said.filename}: " if said.filename else ""
            absent = isinstance(said, FileNotFoundError | NotADirectoryError | IsADirectoryError)
            return (ConfigError if absent else StorageError)(f"{place}{said.strerror}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        yield one
        one = one.__cause__ or one.__context__
