"""How reports reach a program: one for each frame it handed in, or one after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from edge_client.capture.given import PushedFrames
from edge_client.frames import FrameReport, Outcome
from protos.errors import HeadtailError, UnreachableError
from splitters.runtime.inputs import Raw
from splitters.tasks.preprocess import Frame

_ROOM = 64


class Answers:
    """A sink whose reports are taken one after the other.

    Attributes:
        on_room: called when a report was taken.
    """

    def __init__(self) -> None:
        self.on_room: Callable[[], None] = lambda: None
        self._reports: deque[FrameReport] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def has_room(self) -> bool:
        """Whether the program keeps up."""
        return len(self._reports) < _ROOM

    def take(self, report: FrameReport) -> None:
        """See ``sinks.Sink``."""
        self._reports.append(report)
        self._changed.set()

    def close(self) -> None:
        """See ``sinks.Sink``."""
        self._closed = True
        self._changed.set()

    async def next(self) -> FrameReport | None:
        """The next report; None after the last."""
        while not self._reports:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        report = self._reports.popleft()
        self.on_room()
        return report


class Inference:
    """Frames handed in one by one, and who waits for which.

    Args:
        frames: where they are handed in.
    """

    def __init__(self, frames: PushedFrames) -> None:
        self._frames = frames
        self._waiting: dict[int, asyncio.Future[FrameReport]] = {}
        self._stopped: dict[int, FrameReport] = {}
        self._task: asyncio.Task[None]

    @property
    def over(self) -> bool:
        """Whether it takes no more frames."""
        return self._task.done()

    def begin(self, task: asyncio.Task[None], stop: Callable[[], None]) -> None:
        """The run that answers them, and what ends it in order."""
        self._task, self._stop = task, stop
        task.add_done_callback(lambda _task: self._on_end())

    async def infer(self, image: Frame, raw: Raw | None = None) -> FrameReport:
        """Hands in a frame and waits for its outcome.

        Raises:
            HeadtailError: the run ended with it.
        """
        if not self._frames.started.is_set():
            started = asyncio.ensure_future(self._frames.started.wait())
            try:
                await asyncio.wait({started, self._task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                started.cancel()
        if self._task.done():
            raise self._error()
        index = self._frames.push(image, raw)
        future: asyncio.Future[FrameReport] = asyncio.get_running_loop().create_future()
        self._waiting[index] = future
        try:
            return await future
        finally:
            self._waiting.pop(index, None)

    def take(self, report: FrameReport) -> None:
        """A frame has its outcome; one that the run's end took away waits for the reason."""
        future = self._waiting.get(report.frame.index)
        if future is None or future.done():
            return
        if report.outcome is Outcome.DROPPED and report.reason == "stopped":
            self._stopped[report.frame.index] = report
        else:
            future.set_result(report)

    def _on_end(self) -> None:
        failed = not self._task.cancelled() and self._task.exception() is not None
        for index, future in self._waiting.items():
            if future.done():
                continue
            if index in self._stopped and not failed:
                future.set_result(self._stopped[index])
            else:
                future.set_exception(self._error())

    def _error(self) -> BaseException:
        error = None if self._task.cancelled() else self._task.exception()
        return error or UnreachableError("the client was closed")

    async def close(self) -> None:
        """Takes no more frames; those under way get their outcomes first."""
        self._stop()
        with suppress(HeadtailError, asyncio.CancelledError):
            await self._task
