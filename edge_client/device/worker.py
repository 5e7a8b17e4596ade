"""The device's one worker: head and local model take turns, the most urgent first.

A local answer that must be out before its deadline may not wait behind a queue of new frames; so jobs carry the time
at which they have to begin, and the earliest begins next. A job that runs is never interrupted.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_OVERDUE_S = 20.0


class Executor(Protocol):
    """Runs one blocking function somewhere and gives its value."""

    def __call__(self, function: Callable[[], Any], /) -> Awaitable[Any]:
        """Starts ``function``."""
        ...


class ThreadExecutor:
    """A thread of its own for the device's work."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="head")

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]:
        """See ``Executor``."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        """Lets the running job end in its own time."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class DeviceWorker:
    """One job at a time, earliest ``due_ns`` first.

    Attributes:
        overdue: called, again and again, while a job runs for longer than any can take: a graph that loops for ever on just
            this frame. It should make the job end.
    """

    def __init__(self, execute: Executor) -> None:
        self.overdue: Callable[[], None] = lambda: None
        self._execute = execute
        self._heap: list[tuple[int, int, Callable[[], Any], asyncio.Future[Any]]] = []
        self._order = itertools.count()
        self._running: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return self._running is None and not self._heap

    async def join(self) -> None:
        """Waits for the job that runs; those that wait are left out."""
        for *_, future in self._heap:
            future.cancel()
        if self._running is not None:
            await self._running

    async def run(self, function: Callable[[], T], *, due_ns: int) -> T:
        """Runs a blocking function on the worker and returns its value, or raises what it raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        heapq.heappush(self._heap, (due_ns, next(self._order), function, future))
        if self._running is None:
            self._running = loop.create_task(self._drain())
        result: T = await future
        return result

    async def _watch(self) -> None:
        while True:
            # In two steps: a machine that slept finds the first one over at once, and the job deserves the second.
            await asyncio.sleep(_OVERDUE_S / 2)
            await asyncio.sleep(_OVERDUE_S / 2)
            self.overdue()

    async def _drain(self) -> None:
        try:
            while self._heap:
                _, _, function, future = heapq.heappop(self._heap)
                if future.done():  # the caller was cancelled
                    continue
                watch = asyncio.get_running_loop().create_task(self._watch())
                try:
                    value = await self._execute(function)
                except Exception as error:  # noqa: BLE001 - handed to the caller
                    if not future.done():
                        future.set_exception(error)
                else:
                    if not future.done():
                        future.set_result(value)
                finally:
                    watch.cancel()
        finally:
            self._running = None
