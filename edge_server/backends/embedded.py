"""The embedded backend: tails run in one thread of the server's process.

The thread takes its next batch from the queue itself, so that between two batches nothing waits for the event loop;
answers go back to the loop as one call a batch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from edge_server.backends import Load, TailAnswer, TailWork
from edge_server.backends.batcher import BatchQueue, Waiting
from edge_server.backends.recent import Recent
from edge_server.config import BatchConfig, ServerConfig, TailConfig
from edge_server.machine import check_cpus
from protos.errors import DrainingError, HeadtailError, InternalError, ModelError, UnknownModelError
from protos.messages import Answer, PayloadKind
from splitters.bundle import Bundle
from splitters.runtime.tail import Tail, load_tail

log = logging.getLogger(__name__)

_JOIN_S = 5.0  # for a run of the tail that is under way
_SWITCH_S = 0.0005  # Python's own 5 ms let a busy event loop hold up the tail's thread for a good part of a batch

Outcome = TailAnswer | HeadtailError


@dataclass(eq=False, slots=True)
class _Job:
    work: TailWork
    future: asyncio.Future[TailAnswer]


def _key(work: TailWork) -> Hashable:
    return (work.bundle_sha256, work.kind, tuple(a.shape for a in work.arrays))


class EmbeddedBackend:
    """Runs every bundle's tail in one dedicated thread.

    Args:
        batch: how frames wait.
        tail: device, threads and cores.
        clock: monotonic ns.
        on_death: told, on the event loop, why the tail's thread has ended before it was closed.
        loading_niceness: how far loads give way to everything else on the machine. With more than one thread they do not: a
            library's threads would keep it for the frames to come, and only root can take it back.

    Raises:
        ConfigError: this process has not the cores the thread shall be pinned to.
    """

    def __init__(
        self,
        batch: BatchConfig,
        tail: TailConfig,
        clock: Callable[[], int],
        *,
        on_death: Callable[[BaseException], None] | None = None,
        loading_niceness: int = 0,
    ) -> None:
        check_cpus(tail.cpus)
        self._config = tail
        self._clock = clock
        self._queue: BatchQueue[_Job] = BatchQueue(batch)
        self._wake = threading.Condition()
        self._tails: dict[str, Tail] = {}
        self._recent = Recent()
        self._closing = False
        self._in_hand: list[_Job] = []  # taken from the queue by the tail's thread
        self._on_death = on_death
        niceness = loading_niceness if tail.threads == 1 else 0
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="tail-loader", initializer=_settle, initargs=(niceness, tail.cpus))
        self._loop = asyncio.get_running_loop()
        sys.setswitchinterval(min(_SWITCH_S, sys.getswitchinterval()))
        self._thread = threading.Thread(target=self._live, name="tail", daemon=True)
        self._thread.start()

    async def load(self, bundle: Bundle) -> None:
        """See `Backend.load`. The tail has run once when this returns."""
        tail = await self._loop.run_in_executor(self._loader, self._load, bundle)
        with self._wake:
            self._tails[bundle.sha256] = tail

    def _load(self, bundle: Bundle) -> Tail:
        self._set_threads(bundle)
        tail = load_tail(bundle, device=self._config.device, threads=self._config.threads)
        latents = [np.zeros((1, *shape), np.float32) for shape in bundle.manifest.latent_shape]
        try:
            tail.run(latents, [(bundle.manifest.preprocess.size_px[1], bundle.manifest.preprocess.size_px[0])])
        except HeadtailError:
            raise
        except Exception as error:
            raise ModelError(f"the tail of {bundle.manifest.name!r} does not run on its own latent shape: {error}") from error
        return tail

    async def unload(self, bundle_sha256: str) -> None:
        """See `Backend.unload`."""
        with self._wake:
            self._tails.pop(bundle_sha256, None)

    async def run(self, work: TailWork) -> TailAnswer:
        """See `Backend.run`."""
        job = _Job(work, self._loop.create_future())
        with self._wake:
            if self._closing:
                raise DrainingError("the server is shutting down")
            if not self.alive:
                raise InternalError("the tail's thread has ended; the server's log says why")
            if work.bundle_sha256 not in self._tails:
                raise UnknownModelError(f"no tail of bundle {work.bundle_sha256[:12]} is loaded")
            self._queue.add(_key(work), work.deadline_ns, self._clock(), job, client=work.client)
            self._wake.notify()
        try:
            return await job.future
        except asyncio.CancelledError:
            with self._wake:
                self._queue.remove({id(job)})
            raise

    def load_now(self) -> Load:
        """See `Backend.load_now`."""
        return self._recent.load

    @property
    def alive(self) -> bool:
        """Whether the tail's thread runs."""
        return self._thread.is_alive()

    async def close(self) -> None:
        """See `Backend.close`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await self._loop.run_in_executor(None, self._thread.join, _JOIN_S)
        self._loader.shutdown(wait=False)

    # ------------------------------------------------------------ the tail's thread

    def _set_threads(self, bundle: Bundle) -> None:
        """Of torch, for the thread that calls this; a tail of another kind does without importing it."""
        if self._config.threads and bundle.manifest.tail.get("kind") == "torch":
            import torch

            if torch.get_num_threads() != self._config.threads:
                torch.set_num_threads(self._config.threads)

    def _live(self) -> None:
        """The thread's life; should it end by an error, nothing waits for it in vain."""
        try:
            self._work()
        except BaseException as error:
            log.critical("the tail's thread has ended", exc_info=error)
            with self._wake:
                left = self._in_hand + [w.item for w in self._queue.clear()]
            self._deliver([(job, InternalError("the tail's thread has ended; the server's log says why")) for job in left])
            if self._on_death is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._on_death, error)

    def _work(self) -> None:
        if self._config.cpus:
            os.sched_setaffinity(0, self._config.cpus)  # this thread only
        while True:
            with self._wake:
                self._wait()
                if self._closing:
                    break
                batch = self._queue.take(self._clock())
                refusals: list[tuple[_Job, Outcome]] = [(w.item, self._queue.refusal(w, self._clock())) for w in batch.refused]
                self._in_hand = [w.item for w in (*batch.refused, *batch.run)]
            self._deliver(refusals)
            if batch.run:
                self._deliver(self._answer(batch.run))
        self._deliver([(w.item, DrainingError("the server is shutting down")) for w in self._queue.clear()])

    def _wait(self) -> None:
        """Until there is a batch to take, or the end; the lock is held on entry and on return."""
        while not self._closing:
            if not len(self._queue):
                self._wake.wait()
            elif hold_ns := self._queue.hold_ns(self._clock()):
                self._wake.wait(hold_ns / 1e9)
            else:
                return

    def _answer(self, waiting: list[Waiting[_Job]]) -> list[tuple[_Job, Outcome]]:
        jobs = [w.item for w in waiting]
        first = jobs[0].work
        tail = self._tails.get(first.bundle_sha256)
        if tail is None:
            return [(job, UnknownModelError("the model was unloaded")) for job in jobs]
        self._set_threads(tail.bundle)
        start_ns = self._clock()
        try:
            answers = _run(tail, [job.work for job in jobs])
        except HeadtailError as error:
            return self._one_by_one(waiting) if len(jobs) > 1 else [(jobs[0], error)]
        except Exception:
            log.exception("the tail of bundle %s failed on a batch of %d", first.bundle_sha256[:12], len(jobs))
            if len(jobs) > 1:
                return self._one_by_one(waiting)
            return [(jobs[0], ModelError("the tail failed on this frame; the server's log says why"))]
        tail_ns = self._clock() - start_ns
        with self._wake:
            self._queue.times.add(waiting[0].key, len(jobs), tail_ns, start_ns + tail_ns)
            backlog = len(self._queue)
        self._remember(waiting, start_ns, tail_ns, backlog)
        return [
            (w.item, TailAnswer(answer=a, queue_ns=start_ns - w.queued_ns, tail_ns=tail_ns, batch_size=len(jobs)))
            for w, a in zip(waiting, answers, strict=True)
        ]

    def _one_by_one(self, waiting: list[Waiting[_Job]]) -> list[tuple[_Job, Outcome]]:
        """After a failed batch: only the frames that fail alone are told so."""
        return [outcome for w in waiting for outcome in self._answer([w])]

    def _remember(self, waiting: list[Waiting[_Job]], start_ns: int, tail_ns: int, backlog: int) -> None:
        for w in waiting:
            self._recent.add(start_ns - w.queued_ns, tail_ns)
        self._recent.sum_up(backlog, start_ns)

    def _deliver(self, outcomes: list[tuple[_Job, Outcome]]) -> None:
        if outcomes and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_resolve, outcomes)


def _settle(niceness: int, cpus: tuple[int, ...]) -> None:
    """For the thread that calls this, and the threads that a library will start in it."""
    if cpus:
        os.sched_setaffinity(0, cpus)
    if niceness:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def _run(tail: Tail, works: list[TailWork]) -> list[Answer]:
    sizes = [w.size_px for w in works]
    if works[0].kind is PayloadKind.IMAGE:
        return tail.run_images([w.arrays[0] for w in works], sizes)
    return tail.run([np.stack(tensors) for tensors in zip(*(w.arrays for w in works), strict=True)], sizes)


def _resolve(outcomes: list[tuple[_Job, Outcome]]) -> None:
    for job, outcome in outcomes:
        if job.future.done():
            continue
        if isinstance(outcome, HeadtailError):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)


async def open_backend(
    config: ServerConfig, *, clock: Callable[[], int], on_death: Callable[[BaseException], None]
) -> EmbeddedBackend:
    """See `edge_server.backends.Opener`."""
    return EmbeddedBackend(config.batch, config.tail, clock, on_death=on_death)
