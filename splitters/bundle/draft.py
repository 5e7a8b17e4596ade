"""A directory that appears whole or not at all: written beside its place, then moved there."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from protos.errors import StorageError

_STALE_S = 60.0


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Processes that want to make the same thing take turns; the later ones find it made.

    Args:
        path: of a lock file, which stays.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Draft:
    """A directory being written. Leaving the ``with`` block without ``publish`` removes it.

    What a killed process left behind is removed by the next draft for the same place: a draft that is being written is locked.

    Args:
        out: the place.

    Raises:
        StorageError: nothing can be written there.

    Attributes:
        path: the directory to write in.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        prefix = f".{out.name}.headtail-draft-"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            for left in out.parent.glob(f"{glob.escape(prefix)}*"):
                _remove_stale(left)
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"{out} cannot be written: {error.strerror}; default bundles go to $HEADTAIL_CACHE") from error

    def publish(self) -> None:
        """Moves the directory into place; what lay there is replaced.

        Raises:
            StorageError: it cannot be moved.
        """
        try:
            self.path.chmod(0o755)
            if self._out.exists():
                shutil.rmtree(self._out)
            self.path.rename(self._out)
        except OSError as error:
            raise StorageError(f"{self._out} cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._lock)
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_stale(path: Path) -> None:
    """Removes a draft that nobody writes any more; a young one may not be locked yet."""
    try:
        if time.time() - path.stat().st_mtime < _STALE_S:
            return
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass
    finally:
        os.close(lock)
