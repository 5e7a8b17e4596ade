"""Results as JSON lines: in a file that ends with a whole line however the run ends, or on a stream that others read.

A file may be rotated while it is written: renamed or deleted by others (a new one is started), cut to nothing (the next line
stands at its new end), or by ourselves where a size is given. A stream whose reader takes nothing holds the client up, as any
pipe does; it does not keep it from ending.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TextIO

from edge_client.frames import FrameReport
from edge_client.sinks.base import Labels
from edge_client.sinks.lines import to_line
from edge_client.sinks.output_file import OutputFile, State
from protos.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

Stopping = Callable[[], bool]

_PIPE_BYTES = 4096  # what a pipe that is ready takes at least without a wait
_LOOK_S = 0.2
_PATIENCE_S = 2.0  # for a reader that takes nothing, once the client is to end
_KEPT = 4  # files of earlier results


def _never() -> bool:
    return False


class JsonLines:
    """Results on a stream that belongs to someone else: standard output, or a named pipe.

    Args:
        stream: a text stream; one with a file descriptor is written through it.
        labels: of the model that runs.
        name: for messages.
        stopping: whether the client is to end.
    """

    def __init__(
        self, stream: TextIO, labels: Labels, *, name: str = "standard output", stopping: Stopping = _never, own: bool = False
    ) -> None:
        self._stream = stream
        self._labels = labels
        self._name = name
        self._stopping = stopping
        self._own = own
        try:
            self._fd: int | None = stream.fileno()
        except (OSError, ValueError, AttributeError):
            self._fd = None

    def take(self, report: FrameReport) -> None:
        """See ``Sink``.

        Raises:
            StorageError: nobody reads it any more.
        """
        line = to_line(report, self._labels())
        try:
            if self._fd is None:
                self._stream.write(line)
            else:
                self._stream.flush()
                self._write(self._fd, memoryview(line.encode()))
        except BrokenPipeError as error:
            raise StorageError(f"whoever read {self._name} has closed it; results go nowhere") from error
        except OSError as error:
            raise StorageError(f"results cannot be written to {self._name} any more: {error.strerror}") from error

    def _write(self, fd: int, data: memoryview) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        since: float | None = None
        while data:
            if not poll.poll(_LOOK_S * 1000):
                since = (since or time.monotonic()) if self._stopping() else None
                if since is not None and time.monotonic() - since > _PATIENCE_S:
                    raise StorageError(f"whoever reads {self._name} takes nothing; results of the last frames are lost")
                continue
            data = data[os.write(fd, data[:_PIPE_BYTES]) :]

    def close(self) -> None:
        """See ``Sink``."""
        if self._own:
            with suppress(OSError):
                self._stream.close()


class JsonFile:
    """``results.jsonl``: a line a frame, each written at once."""

    def __init__(self, output: OutputFile, labels: Labels, *, whole_bytes: int = 0, max_bytes: int = 0) -> None:
        """``output`` stands at its end, which is ``whole_bytes`` from its beginning; ``max_bytes`` 0: it grows without limit."""
        self._output = output
        self._path = output.path
        self._labels = labels
        self._whole_bytes = whole_bytes
        self._max_bytes = max_bytes

    def take(self, report: FrameReport) -> None:
        """See ``Sink``.

        Raises:
            StorageError: the disk takes no more, or another file stands in its place.
        """
        line = memoryview(to_line(report, self._labels()).encode())
        size = len(line)
        self._look()
        if self._max_bytes and self._whole_bytes and self._whole_bytes + size > self._max_bytes and self._output.regular:
            self._rotate()
        data = line
        try:
            while data:
                data = data[self._output.file.write(data) :]  # a disk that fills up takes a part before it refuses
        except OSError as error:
            with suppress(OSError):
                self._output.file.truncate(self._whole_bytes)
            raise StorageError(
                f"--output {self._path} cannot be written any more: {error.strerror}; it ends before frame {report.frame.index}"
            ) from error
        self._whole_bytes += size

    def close(self) -> None:
        """See ``Sink``."""
        self._output.close()

    def _look(self) -> None:
        """Notices what others did to the file, and goes on where nothing of theirs is destroyed."""
        match self._output.state(self._whole_bytes):
            case State.SAME:
                return
            case State.CUT:
                log.warning("--output %s was cut off while it was written; results go on at its new end", self._path)
                self._whole_bytes = self._output.file.seek(0, os.SEEK_END)
                return
            case State.GONE:
                log.warning("--output %s was removed or renamed while it was written; results go on in a new file", self._path)
            case State.REPLACED:
                with suppress(OSError):
                    if self._path.stat().st_size:
                        raise StorageError(f"--output {self._path} was replaced by another file, which is left as it is")
                log.warning("--output %s was replaced while it was written; results go on in the new file", self._path)
        self._begin()

    def _begin(self) -> None:
        self._output.close()
        try:
            self._output = OutputFile(self._path, "--output")
        except ConfigError as error:
            raise StorageError(error.message) from error
        self._whole_bytes = 0

    def _rotate(self) -> None:
        """``results.jsonl`` becomes ``results.jsonl.1``, that one ``.2``, and so on; the oldest goes."""
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n}") for n in range(1, _KEPT + 1))]
        try:
            for newer, older in reversed(list(pairwise(names))):
                if newer.exists():
                    newer.replace(older)
        except OSError as error:
            raise StorageError(f"--output {self._path} cannot be rotated: {error.strerror}") from error
        self._begin()


def open_json_file(path: Path, labels: Labels, *, append: bool = False, max_bytes: int = 0) -> JsonFile:
    """Creates the file, or goes on with it: behind its last whole line, should an earlier run have been cut off.

    Raises:
        ConfigError: it cannot be written.
    """
    output = OutputFile(path, "--output")
    try:
        if output.regular and append:
            return JsonFile(output, labels, whole_bytes=_to_last_line(output.file), max_bytes=max_bytes)
        if output.regular:
            output.file.truncate(0)
    except OSError as error:
        output.close()
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error
    return JsonFile(output, labels, max_bytes=max_bytes)


async def open_pipe(path: Path, labels: Labels, *, stopping: Stopping = _never) -> JsonLines:
    """A named pipe, as soon as somebody reads it."""
    said = False
    while True:
        try:
            number = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error
        else:
            os.set_blocking(number, True)
            return JsonLines(os.fdopen(number, "w"), labels, name=str(path), stopping=stopping, own=True)
        if not said:
            log.warning("--output %s is a named pipe that nobody reads yet; it is waited for", path)
            said = True
        await asyncio.sleep(_LOOK_S)


def is_pipe(path: Path) -> bool:
    """Whether it is a named pipe."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def _to_last_line(file: BinaryIO) -> int:
    """Cuts off what stands behind the last line's end and goes there; how many bytes remain."""
    end = file.seek(0, 2)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    file.seek(end)
    if file.read(1) not in (b"", b"{"):
        raise OSError(errno.EINVAL, "what stands behind its last line is no result; it is left as it is")
    file.truncate(end)
    return file.seek(end)
