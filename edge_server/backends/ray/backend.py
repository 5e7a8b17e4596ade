"""The Ray backend: tails as Ray Serve deployments behind our own door, one application per bundle.

Every frame is one unary call of a deployment handle, so Serve balances frame by frame; a replica batches what waits
with it exactly as the embedded backend does, since it runs one. Serve's own proxies are not started. Arguments travel
between the processes of one trusted cluster by Ray's own means; nothing of a client's is unpickled by them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import grpc.aio

from edge_server.backends import Load, TailAnswer, TailWork
from edge_server.backends.ray.cluster import Cluster
from edge_server.backends.ray.imports import ray, serve
from edge_server.backends.ray.packing import Reply, pack_call, unpack_reply
from edge_server.backends.ray.register import LEASE_S, RENEW_S
from edge_server.backends.ray.replica import SHELF_APP, app_name, deployment, model_id, shelf, site_name
from edge_server.backends.recent import Recent
from edge_server.config import BatchConfig, RayConfig, ServerConfig, TailConfig
from protos.errors import DrainingError, HeadtailError, InternalError, ModelError, OverloadedError, UnknownModelError
from splitters.bundle import Bundle

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S, _RETRY_MOST_S = 0.05, 0.8
_NO_DEADLINE_S = 60.0  # a frame without deadline is still not tried for ever
_LOOK_S = 1.0  # between two looks for applications that are gone, where frames fail


class _GoneError(Exception):
    """The replica that had the frame is not there any more."""


class _Route:
    """The way to one bundle's tail: a handle bound to its method, made once, since making one costs as much as a call."""

    def __init__(self, handle: Any, bundle: Bundle, app: str, multiplexed: str = "") -> None:
        options: dict[str, Any] = {"method_name": "infer"}
        if multiplexed:
            options["multiplexed_model_id"] = multiplexed
        if "request_serialization" in inspect.signature(handle.options).parameters:
            # Tuples of numbers and arrays: the plain pickler, in C, does; Serve's default is the slower one for functions.
            options |= {"request_serialization": "pickle", "response_serialization": "pickle"}
        self.infer = handle.options(**options)
        self.path = str(bundle.path.resolve())
        self.bundle = bundle
        self.app = app


class RayBackend:
    """Runs every bundle's tail on a Ray cluster.

    Args:
        batch: how frames wait, in each replica and altogether.
        tail: device, threads and cores of a replica.
        config: which cluster, and how many replicas.
        clock: monotonic ns.
        on_death: told why the node that this process has started is gone.
    """

    def __init__(
        self,
        batch: BatchConfig,
        tail: TailConfig,
        config: RayConfig,
        clock: Callable[[], int],
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self._batch = batch
        self._tail = tail
        self._config = config
        self._clock = clock
        self._on_death = on_death
        self._cluster = Cluster(config)
        self._routes: dict[str, _Route] = {}
        self._loading: dict[str, tuple[str, Bundle]] = {}  # by hash, the application that is to hold it
        self._recent = Recent()
        self._in_flight = 0
        self._failing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._said: dict[str, str] = {}
        self._placing: set[str] = set()

    async def start(self) -> None:
        """Joins the cluster, or starts one on this machine when no address is given.

        Raises:
            ConfigError: no cluster answers at the address.
        """
        await _in_thread(self._cluster.connect)
        self._spawn(self._watch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ bundles

    async def load(self, bundle: Bundle) -> None:
        """See `Backend.load`. An application that another door has started is shared."""
        if self._config.tails_per_replica:
            route = await self._shelved(bundle)
        else:
            route = await self._own(bundle)
        self._routes[bundle.sha256] = route

    async def _own(self, bundle: Bundle) -> _Route:
        """An application for this bundle alone: the site's, or ours."""
        site, ours = site_name(bundle), app_name(bundle)
        handle = await _in_thread(self._cluster.found, site)
        if handle is not None and await _held(handle) == bundle.sha256:
            await _in_thread(self._cluster.hand_in, bundle, site)
            return _Route(handle, bundle, site)
        build = functools.partial(deployment, bundle, self._batch, self._tail, self._config)
        async with self._handed_in(bundle, ours):
            return _Route(await _in_thread(self._cluster.deploy, ours, build), bundle, ours)

    async def _shelved(self, bundle: Bundle) -> _Route:
        """A place on the shelf that all bundles share."""
        build = functools.partial(shelf, self._batch, self._tail, self._config)
        async with self._handed_in(bundle, SHELF_APP):
            handle = await _in_thread(self._cluster.deploy, SHELF_APP, build)
        path = str(bundle.path.resolve())
        name = model_id(bundle.sha256, path)
        failed: Reply | None = await handle.options(method_name="ready", multiplexed_model_id=name).remote(bundle.sha256, path)
        if failed is not None:
            unpack_reply(failed)
        return _Route(handle, bundle, SHELF_APP, name)

    @contextlib.asynccontextmanager
    async def _handed_in(self, bundle: Bundle, app: str) -> AsyncIterator[None]:
        """In this block a bundle is there for every node, also where the register goes with its node: see ``_look``."""
        self._loading[bundle.sha256] = app, bundle
        try:
            await _in_thread(self._cluster.hand_in, bundle, app)
            yield
        finally:
            self._loading.pop(bundle.sha256, None)

    async def unload(self, bundle_sha256: str) -> None:
        """See `Backend.unload`. The application goes when no other door uses it; a shelf stays, and so does a site's."""
        route = self._routes.pop(bundle_sha256, None)
        if route is not None:
            self._spawn(self._leave(route))

    async def _leave(self, route: _Route) -> None:
        use, delete = (route.app, route.bundle.sha256), route.app == app_name(route.bundle)
        while use[1] not in self._routes:  # it may be in use again meanwhile
            try:
                if await _in_thread(functools.partial(self._cluster.leave, use, delete=delete)):
                    return
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.warning("%s: whether another door uses it cannot be found out yet: %s", use[0], _first_line(error))
            await asyncio.sleep(LEASE_S)

    # ------------------------------------------------------------ what others do to the cluster

    async def _watch(self) -> None:
        """Renews what this door uses, deploys again what somebody has deleted, and says why replicas cannot start."""
        while True:
            if (lost := await _in_thread(self._cluster.lost)) and self._on_death is not None:
                self._on_death(InternalError(lost))
                return
            try:
                await self._look()
            except DrainingError:
                return
            except (HeadtailError, ray.exceptions.RayError, serve.exceptions.RayServeException, TimeoutError) as error:
                log.warning("the cluster's state cannot be seen: %s", _first_line(error))
            await asyncio.sleep(_LOOK_S)
            self._failing.clear()
            try:
                await asyncio.wait_for(self._failing.wait(), RENEW_S - _LOOK_S)
            except TimeoutError:
                continue

    async def _look(self) -> None:
        routes = dict(self._routes)
        held = self._loading | {sha256: (route.app, route.bundle) for sha256, route in routes.items()}
        uses = [(app, sha256) for sha256, (app, _) in held.items()]
        await _in_thread(self._cluster.renew, uses, {sha256: bundle for sha256, (_, bundle) in held.items()})
        names = sorted({route.app for route in routes.values()})
        gone = await _in_thread(self._cluster.missing, names)
        for name in names:
            reasons = await _in_thread(self._cluster.reasons, name)
            if reasons and reasons != self._said.get(name):
                log.error("%s: replicas cannot start %s", name, reasons)
            self._said[name] = reasons
        for sha256, route in routes.items():
            if route.app in gone and sha256 not in self._placing:
                self._placing.add(sha256)
                self._spawn(self._place_again(sha256, route))

    async def _place_again(self, sha256: str, route: _Route) -> None:
        log.warning("%s is gone from the cluster; it is deployed again", route.app)
        try:
            fresh = await (self._shelved if self._config.tails_per_replica else self._own)(route.bundle)
            if self._routes.get(sha256) is route:
                self._routes[sha256] = fresh
                log.info("%s answers again", fresh.app)
        except DrainingError:
            return
        except (HeadtailError, ray.exceptions.RayError, serve.exceptions.RayServeException, TimeoutError) as error:
            log.error("%s cannot be deployed again: %s", route.app, error)
        finally:
            self._placing.discard(sha256)

    # ------------------------------------------------------------ frames

    async def run(self, work: TailWork) -> TailAnswer:
        """See `Backend.run`. A replica's death is hidden: the frame is asked again while its deadline allows."""
        if work.bundle_sha256 not in self._routes:
            raise UnknownModelError(f"no tail of bundle {work.bundle_sha256[:12]} is loaded")
        if self._in_flight >= self._batch.max_queue:
            raise OverloadedError(f"{self._in_flight} frames wait for the tail already")
        begun_ns = self._clock()
        self._in_flight += 1
        try:
            answer = await self._ask(self._routes[work.bundle_sha256], work, begun_ns)
        finally:
            self._in_flight -= 1
        now_ns = self._clock()
        queue_ns = max(0, now_ns - begun_ns - answer.tail_ns)
        self._recent.add(queue_ns, answer.tail_ns)
        self._recent.sum_up(self._in_flight, now_ns)
        return TailAnswer(answer=answer.answer, queue_ns=queue_ns, tail_ns=answer.tail_ns, batch_size=answer.batch_size)

    async def _ask(self, route: _Route, work: TailWork, begun_ns: int) -> TailAnswer:
        until_ns = work.deadline_ns if work.deadline_ns is not None else begun_ns + int(_NO_DEADLINE_S * 1e9)
        attempt = 0
        while (remaining_ns := until_ns - self._clock()) > 0:
            route = self._routes.get(work.bundle_sha256, route)  # deployed again meanwhile
            try:
                reply = await _within(_called(route, work, None if work.deadline_ns is None else remaining_ns), remaining_ns / 1e9)
            except TimeoutError:
                break
            except _GoneError as gone:
                attempt += 1
                self._failing.set()
                log.warning("a replica went away (%s); attempt %d", gone, attempt)
                pause_s = min(_RETRY_S * 2 ** (attempt - 1), _RETRY_MOST_S)
                await asyncio.sleep(min(pause_s, max(0.0, (until_ns - self._clock()) / 1e9)))
            else:
                return unpack_reply(reply)
        self._failing.set()
        raise OverloadedError("no replica could answer this frame before its deadline")

    def load_now(self) -> Load:
        """See `Backend.load_now`."""
        return self._recent.load

    async def close(self) -> None:
        """See `Backend.close`. A cluster that was there before keeps its tails, for other doors."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for route in self._routes.values():
            await route.infer.shutdown_async()
        await _in_thread(self._cluster.close)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


async def _in_thread(call: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(None, call, *args)


async def _held(handle: Any) -> str:
    """The hash of the bundle whose tail an application of the site's is; empty: it is something else."""
    try:
        return str(await handle.options(method_name="holds").remote())
    except (ray.exceptions.RayError, serve.exceptions.RayServeException, AttributeError) as error:
        log.warning("%s is no tail of ours: %s", handle.app_name, str(error).split("\n", 1)[0])
        return ""


async def _within(call: Coroutine[Any, Any, Reply], seconds: float) -> Reply:
    """The call's reply in time, whatever Serve makes of a cancellation: after a replica's death it may not heed one.

    Raises:
        TimeoutError: none came.
    """
    task = asyncio.create_task(call)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        _dropped(task)
        raise
    if not done:
        _dropped(task)
        raise TimeoutError
    return task.result()


def _dropped(task: asyncio.Task[Reply]) -> None:
    """Cancels a call that nobody waits for any more; how it ends is of no interest."""
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    task.cancel()


async def _called(route: _Route, work: TailWork, remaining_ns: int | None) -> Reply:
    """One call of the handle, with whatever a dying replica can show told apart from everything else.

    Raises:
        _GoneError: the replica died, was stopped, or its connection broke; another one may answer.
        OverloadedError: every queue is full.
        ModelError: the replica failed on the frame.
    """
    try:
        reply: Reply = await route.infer.remote(pack_call(work, route.path, remaining_ns))
    except serve.exceptions.BackPressureError as full:
        raise OverloadedError("the tails' queues are full") from full
    except (ray.exceptions.RayActorError, serve.exceptions.RayServeException, grpc.aio.AioRpcError) as gone:
        raise _GoneError(type(gone).__name__) from gone
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise  # we are cancelled: the client left, or the deadline passed
        raise _GoneError("cancelled in the replica") from None
    except HeadtailError:
        raise
    except Exception as failure:
        log.exception("a replica failed")
        raise ModelError("the tail failed on this frame; the replica's log says why") from failure
    return reply


async def open_backend(config: ServerConfig, *, clock: Callable[[], int], on_death: Callable[[BaseException], None]) -> RayBackend:
    """See `edge_server.backends.Opener`; of what dies Ray restarts everything but the node itself."""
    backend = RayBackend(config.batch, config.tail, config.ray, clock, on_death)
    try:
        await backend.start()
    except BaseException:
        await asyncio.shield(backend.close())
        raise
    return backend
