"""The device's work: head and local model of a camera take turns, the most urgent first.

A local answer that must be out before its deadline may not wait behind a queue of new frames; so jobs carry the time
at which they have to begin, and the earliest begins next. A job that runs is never interrupted.

The cameras of one process share its lanes (`cameras.fleet` says how many). An engine is not for several threads at a time, so
a camera has one job in a lane at most. Frames have the same deadline from their capture on, so cameras of equal pace get equal
turns; none can have more than a frame or two waiting, since a live camera begins its next frame only when the last one has left.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

_OVERDUE_S = 20.0
_OF_LATE_S = 2.0


class Executor(Protocol):
    """Runs one blocking function somewhere and gives its value."""

    def __call__(self, function: Callable[[], Any], /) -> Awaitable[Any]:
        """Starts ``function``."""
        ...


class ThreadExecutor:
    """Threads of its own for the device's work.

    Args:
        threads: how many; of one engine's work there is never more than one job at a time.
    """

    def __init__(self, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="head")

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]:
        """See ``Executor``."""
        return asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        """Lets the running job end in its own time."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(order=True, slots=True)
class _Job:
    due_ns: int
    order: int
    owner: DeviceWorker = field(compare=False)
    future: asyncio.Future[Any] = field(compare=False)
    function: Callable[[], Any] | None = field(compare=False)


class Lanes:
    """So many jobs at a time, earliest ``due_ns`` first, never two of one worker.

    Args:
        execute: runs a job; it takes as many at a time as there are lanes.
        count: lanes.
    """

    def __init__(self, execute: Executor, count: int = 1) -> None:
        self._execute, self._count = execute, count
        self._heap: list[_Job] = []
        self._order = itertools.count()
        self._holding: set[DeviceWorker] = set()
        self._running: dict[DeviceWorker, asyncio.Task[None]] = {}
        self._begun_s: dict[DeviceWorker, float] = {}

    def share(self) -> float:
        """Which part of a device of its own each worker has that was at work of late, (0, 1]."""
        now_s = asyncio.get_running_loop().time()
        self._begun_s = {worker: at_s for worker, at_s in self._begun_s.items() if now_s - at_s < _OF_LATE_S}
        return min(1.0, self._count / max(1, len(self._begun_s)))

    def add(self, owner: DeviceWorker, function: Callable[[], Any] | None, due_ns: int) -> asyncio.Future[Any]:
        """Queues a job; its value, or what it raised. None instead of a function: the lane itself, see ``release``."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._heap, _Job(due_ns, next(self._order), owner, future, function))
        asyncio.get_running_loop().call_soon(self._begin)  # not at once: jobs that come together begin in their order
        return future

    def release(self, owner: DeviceWorker) -> None:
        """The worker gives back the lane that it was given."""
        self._holding.discard(owner)
        self._begin()

    def busy(self, owner: DeviceWorker) -> bool:
        """Whether a job of this worker runs or waits."""
        return owner in self._running or any(job.owner is owner for job in self._heap)

    async def join(self, owner: DeviceWorker) -> None:
        """Waits for the job of this worker that runs; those that wait are left out, and the others' go on."""
        for job in self._heap:
            if job.owner is owner:
                job.future.cancel()
        if owner in self._running:
            await asyncio.wait({self._running[owner]})

    def _begin(self) -> None:
        """Begins every job that may begin."""
        later: list[_Job] = []
        while self._heap:
            job = heapq.heappop(self._heap)
            own = job.owner in self._holding or job.owner in self._running
            if job.future.done():  # the caller was cancelled
                continue
            if not own and len(self._holding | self._running.keys()) >= self._count:
                later.append(job)
            elif job.function is None:
                self._holding.add(job.owner)
                job.future.set_result(None)
            elif job.owner in self._running:
                later.append(job)
            else:
                self._begun_s[job.owner] = asyncio.get_running_loop().time()
                self._running[job.owner] = asyncio.get_running_loop().create_task(self._run(job, job.function))
        self._heap = later  # in order, so a heap

    async def _run(self, job: _Job, function: Callable[[], Any]) -> None:
        watch = asyncio.get_running_loop().create_task(self._watch(job.owner))
        try:
            value = await self._execute(function)
        except Exception as error:  # noqa: BLE001 - handed to the caller
            if not job.future.done():
                job.future.set_exception(error)
        else:
            if not job.future.done():
                job.future.set_result(value)
        finally:
            watch.cancel()
            del self._running[job.owner]
            self._begin()

    async def _watch(self, owner: DeviceWorker) -> None:
        while True:
            # In two steps: a machine that slept finds the first one over at once, and the job deserves the second.
            await asyncio.sleep(_OVERDUE_S / 2)
            await asyncio.sleep(_OVERDUE_S / 2)
            owner.overdue()


class DeviceWorker:
    """One camera's part of the lanes: one job at a time, earliest ``due_ns`` first.

    Attributes:
        overdue: called, again and again, while a job runs for longer than any can take: a graph that loops for ever on just
            this frame. It should make the job end.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.overdue: Callable[[], None] = lambda: None
        self._lanes = lanes

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._lanes.busy(self)

    @property
    def share(self) -> float:
        """Which part of the device this camera may take without loss to the others, (0, 1]."""
        return self._lanes.share()

    async def join(self) -> None:
        """Waits for the job that runs; those that wait are left out."""
        await self._lanes.join(self)

    @asynccontextmanager
    async def turn(self, *, due_ns: int) -> AsyncIterator[None]:
        """A lane for all jobs of a frame: waits until the other cameras leave one, so that what to do is decided when it can begin.

        Jobs of this camera that run keep nobody from it. For one caller at a time.
        """
        future = self._lanes.add(self, None, due_ns)
        try:
            await future
            yield
        finally:
            self._lanes.release(self)

    async def run(self, function: Callable[[], T], *, due_ns: int) -> T:
        """Runs a blocking function in a lane and returns its value, or raises what it raised."""
        result: T = await self._lanes.add(self, function, due_ns)
        return result
