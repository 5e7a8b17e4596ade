"""Threads that serve clients in turn, so that one client's work, however much and however long, leaves room for another's."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_SEEN_NS = 2_000_000_000  # a client counts as present for so long after its last work


@dataclass(eq=False, slots=True)
class _Job:
    work: Callable[[], Any]
    future: asyncio.Future[Any]


class Pace:
    """How fast one client is read while others are present.

    Refusing a payload costs nothing, but the event loop has read it by then. So a client that sends more than its share is
    read more slowly: its own connection fills up, and no other client waits.

    Args:
        bytes_per_s: of each client, all its connections together.
        burst_bytes: that may come at once.
    """

    def __init__(self, *, bytes_per_s: int = 32 << 20, burst_bytes: int = 8 << 20) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._levels: dict[str, tuple[float, int]] = {}  # by client: bytes not paid for yet, and when that was so

    def wait_s(self, client: str, n_bytes: int, now_ns: int) -> float:
        """Counts what was read, and says how long this client's next read shall wait; 0 mostly."""
        level, at_ns = self._levels.get(client, (0.0, now_ns))
        level = max(0.0, level - self._bytes_per_s * (now_ns - at_ns) / 1e9) + n_bytes
        self._levels[client] = (level, now_ns)
        if len(self._levels) > 1:
            self._levels = {c: each for c, each in self._levels.items() if now_ns - each[1] <= _SEEN_NS}
        if len(self._levels) <= 1:
            return 0.0
        return max(0.0, level - self._burst_bytes) / self._bytes_per_s


class FairPool:
    """A pool of threads for the event loop it is used on.

    Clients that have work waiting are served in turn, each in its own order. While others are present, no client has all threads
    at once: a thread that is inside a library's call cannot be taken back.

    Args:
        threads: how many.
        clock: monotonic ns.
    """

    def __init__(self, threads: int, *, clock: Callable[[], int]) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._free = threads
        self._share = max(1, threads - 1)
        self._clock = clock
        self._waiting: OrderedDict[str, deque[_Job]] = OrderedDict()  # whose turn it is comes first
        self._running: Counter[str] = Counter()
        self._seen_ns: dict[str, int] = {}

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """What the work returns or raises; given up with the task that waits for it, unless it has begun.

        Args:
            client: whose work it is.
            work: safe to call from any thread.
        """
        loop = asyncio.get_running_loop()
        job = _Job(work, loop.create_future())
        self._seen_ns[client] = self._clock()
        self._waiting.setdefault(client, deque()).append(job)
        self._begin(loop)
        result: T = await job.future
        return result

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gives free threads to whose turn it is."""
        while self._free and (job := self._next()) is not None:
            client, chosen = job
            self._free -= 1
            self._running[client] += 1
            running = self._pool.submit(chosen.work)
            running.add_done_callback(lambda done, c=client, j=chosen: _tell(loop, self._ended, c, j, done))  # type: ignore[misc]

    def _next(self) -> tuple[str, _Job] | None:
        alone = self._alone()
        for client in list(self._waiting):
            queue = self._waiting[client]
            while queue and queue[0].future.done():  # nobody waits for it any more
                queue.popleft()
            if not queue:
                del self._waiting[client]
            elif alone or self._running[client] < self._share:
                job = queue.popleft()
                self._waiting.move_to_end(client)
                return client, job
        return None

    def _alone(self) -> bool:
        """Whether there has been one client only lately."""
        if len(self._seen_ns) > 1:
            before_ns = self._clock() - _SEEN_NS
            self._seen_ns = {c: at_ns for c, at_ns in self._seen_ns.items() if at_ns >= before_ns or self._running[c]}
        return len(self._seen_ns) <= 1

    def _ended(self, client: str, job: _Job, done: Any) -> None:
        self._free += 1
        self._running[client] -= 1
        self._running += Counter()  # clients without work are forgotten
        if not job.future.done():
            if done.cancelled():
                job.future.cancel()
            elif (error := done.exception()) is not None:
                job.future.set_exception(error)
            else:
                job.future.set_result(done.result())
        self._begin(job.future.get_loop())

    def close(self) -> None:
        """Ends the threads, without waiting for what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _tell(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)
