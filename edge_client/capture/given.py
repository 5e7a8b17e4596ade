"""Frames that a program hands in itself: one by one, from an iterable, or no faster than it takes their answers."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from edge_client.capture.base import Delivery, Frames
from edge_client.frames import CapturedFrame, Clock
from protos.errors import SourceError
from splitters.runtime.inputs import Raw
from splitters.tasks.preprocess import BLANK, Frame

_CHANNELS = 3
PICTURE = "image"
Given = Frame | Raw
"""A frame, or arrays by their names, of which ``image`` is the frame."""


def checked_image(image: object) -> Frame:
    """A frame as the client takes it.

    Raises:
        SourceError: it is no (H, W, 3) uint8 array.
    """
    if not isinstance(image, np.ndarray) or image.ndim != _CHANNELS or image.shape[2] != _CHANNELS or image.dtype != np.uint8:
        what = f"an array of {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise SourceError(f"a frame is a NumPy array (height, width, 3) of uint8 in the order blue, green, red; this is {what}")
    if 0 in image.shape:
        raise SourceError(f"a frame has at least one pixel; this is {image.shape[1]}x{image.shape[0]}")
    frame: NDArray[np.uint8] = image
    return frame


class _Given:
    """What all sources of given frames share."""

    note = ""

    def __init__(self, *, clock: Clock, fps: float, name: str) -> None:
        self.fps = fps
        self._clock, self._name = clock, name
        self._index = 0

    def _captured(self, image: Frame, raw: Raw | None = None) -> CapturedFrame:
        frame = CapturedFrame(
            index=self._index, image=image, captured_ns=self._clock(), captured_unix_ns=time.time_ns(), camera=self._name,
            source=self._name, raw=raw, width_px=image.shape[1], height_px=image.shape[0],
        )  # fmt: skip
        self._index += 1
        return frame


class PushedFrames(_Given):
    """Frames handed in one by one, each taken, in their order. A ``parts.Frames``.

    Attributes:
        started: frames are wanted from here on.
    """

    def __init__(self, *, clock: Clock, fps: float, name: str, live: bool) -> None:
        super().__init__(clock=clock, fps=fps, name=name)
        self.live = live
        self.started = asyncio.Event()
        self._queue: deque[CapturedFrame] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def push(self, image: Frame, raw: Raw | None = None) -> int:
        """Hands in a frame; its index.

        Raises:
            SourceError: the source was closed.
        """
        if self._closed:
            raise SourceError("the client takes no frames any more")
        frame = self._captured(image, raw)
        self._queue.append(frame)
        self._changed.set()
        return frame.index

    async def start(self) -> None:
        """See ``Frames``."""
        self.started.set()

    async def next(self) -> Delivery | None:
        """See ``Frames``."""
        while not self._queue:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        return Delivery(frame=self._queue.popleft())

    def close(self) -> tuple[CapturedFrame, ...]:
        """See ``Frames``."""
        self._closed = True
        self._changed.set()
        left = tuple(self._queue)
        self._queue.clear()
        return left


class IteratedFrames(_Given):
    """Frames of an iterable, which may take its time: it is asked in a thread. A ``parts.Frames``."""

    live = False

    def __init__(
        self, images: Iterable[Given] | AsyncIterable[Given], *, clock: Clock, fps: float, name: str, limit: int = 0
    ) -> None:
        super().__init__(clock=clock, fps=fps, name=name)
        self._limit = limit
        self._later: AsyncIterator[Given] | None = aiter(images) if isinstance(images, AsyncIterable) else None
        self._now: Iterator[Given] = iter(()) if isinstance(images, AsyncIterable) else iter(images)
        self._closed = False

    async def start(self) -> None:
        """See ``Frames``."""

    async def next(self) -> Delivery | None:
        """See ``Frames``."""
        if self._closed or (self._limit and self._index >= self._limit):
            return None
        given = await anext(self._later, None) if self._later is not None else await asyncio.to_thread(next, self._now, None)
        if given is None or self._closed:
            return None
        if isinstance(given, Mapping):
            raw = {str(name): np.asarray(array) for name, array in given.items() if name != PICTURE}
            return Delivery(frame=self._captured(checked_image(given[PICTURE]) if PICTURE in given else BLANK, raw))
        return Delivery(frame=self._captured(checked_image(given)))

    def close(self) -> tuple[CapturedFrame, ...]:
        """See ``Frames``."""
        self._closed = True
        return ()


class PacedFrames:
    """A source that is asked for its next frame only while there is room: a camera drops frames meanwhile, a file waits.

    Args:
        frames: the source.
        has_room: asked before each frame; ``room`` is set when that may have changed.
    """

    def __init__(self, frames: Frames, has_room: Callable[[], bool]) -> None:
        self.room = asyncio.Event()
        self._frames, self._has_room = frames, has_room
        self._closed = False
        self.live = frames.live

    @property
    def fps(self) -> float:
        """See ``Frames``."""
        return self._frames.fps

    @property
    def note(self) -> str:
        """See ``Frames``."""
        return self._frames.note

    async def start(self) -> None:
        """See ``Frames``."""
        await self._frames.start()

    async def next(self) -> Delivery | None:
        """See ``Frames``."""
        while not self._has_room() and not self._closed:
            self.room.clear()
            await self.room.wait()
        return await self._frames.next()

    def close(self) -> tuple[CapturedFrame, ...]:
        """See ``Frames``."""
        self._closed = True
        self.room.set()
        return self._frames.close()
