"""The client for programs without an event loop: a thread of its own runs one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edge_client.capture.given import Given
from edge_client.frames import FrameReport
from splitters.runtime.inputs import Raw
from splitters.tasks.preprocess import Frame

T = TypeVar("T")


class AsyncClient(Protocol):
    """What is asked of the client in the thread; ``edge_client.Client``."""

    @property
    def labels(self) -> Mapping[int, str]:
        """See ``Client``."""
        ...

    async def infer(self, frame: Frame | None = None, *, raw: Raw | None = None) -> FrameReport:
        """See ``Client``."""
        ...

    @property
    def run(self) -> Callable[..., AsyncIterator[FrameReport]]:
        """See ``Client``."""
        ...


class BlockingClient:
    """What ``with Client.open(...) as client`` gives; usable from several threads at a time.

    Args:
        opening: makes the client; called in the thread.
    """

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[AsyncClient]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headtail", daemon=True)
        self._thread.start()
        try:
            self._opened = self._wait(self._in_loop(opening))
            self._client = self._wait(self._opened.__aenter__())
        except BaseException:
            self._end()
            raise

    @property
    def labels(self) -> Mapping[int, str]:
        """Class ids and their names, of the model in use."""
        return self._client.labels

    def infer(self, frame: Frame | None = None, *, raw: Raw | None = None) -> FrameReport:
        """See ``Client.infer``; blocks until the frame has its outcome."""
        return self._wait(self._client.infer(frame, raw=raw))

    def run(
        self, source: str | Path | Iterable[Given] | AsyncIterable[Given], *, realtime: bool = False, loop: bool = False,
        frames: int = 0, images: bool = False,
    ) -> Iterator[FrameReport]:  # fmt: skip
        """See ``Client.run``; blocks for each answer."""
        answers = self._client.run(source, realtime=realtime, loop=loop, frames=frames, images=images)

        async def following() -> FrameReport | None:
            return await anext(answers, None)

        async def leave() -> None:
            close = getattr(answers, "aclose", None)
            if close is not None:
                await close()

        try:
            while (report := self._wait(following())) is not None:
                yield report
        finally:
            self._wait(leave())

    def close(self) -> None:
        """Ends what runs, in order; ``with`` does it."""
        if self._loop.is_closed():
            return
        try:
            self._wait(self._close())
        finally:
            self._end()

    async def _close(self) -> None:
        await self._opened.__aexit__(None, None, None)

    async def _in_loop(self, make: Callable[[], T]) -> T:
        return make()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
