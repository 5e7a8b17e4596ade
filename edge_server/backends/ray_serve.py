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
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import grpc.aio

from edge_server.backends import Load, TailAnswer, TailWork
from edge_server.backends.packing import Reply, pack_call, unpack_reply
from edge_server.backends.ray_import import ray, serve
from edge_server.backends.ray_replica import SHELF_APP, app_name, deployment, model_id, shelf, site_name
from edge_server.backends.recent import Recent
from edge_server.config import BatchConfig, RayConfig, ServerConfig, TailConfig
from protos.errors import ConfigError, HeadtailError, ModelError, OverloadedError, UnknownModelError
from splitters.bundle import Bundle

log = logging.getLogger(__name__)

_RETRY_S, _RETRY_MOST_S = 0.05, 0.8
_SHARED = ("RUNNING", "UNHEALTHY", "DEPLOYING")  # states in which another ingress's application is used as it is
_SHARED_S = 120.0
_NO_DEADLINE_S = 60.0  # a frame without deadline is still not tried for ever


class _GoneError(Exception):
    """The replica that had the frame is not there any more."""


class _Route:
    """The way to one bundle's tail: a handle bound to its method, made once, since making one costs as much as a call."""

    def __init__(self, handle: Any, path: str, multiplexed: str = "") -> None:
        options: dict[str, Any] = {"method_name": "infer"}
        if multiplexed:
            options["multiplexed_model_id"] = multiplexed
        if "request_serialization" in inspect.signature(handle.options).parameters:
            # Tuples of numbers and arrays: the plain pickler, in C, does; Serve's default is the slower one for functions.
            options |= {"request_serialization": "pickle", "response_serialization": "pickle"}
        self.infer = handle.options(**options)
        self.path = path


class RayBackend:
    """Runs every bundle's tail on a Ray cluster.

    Args:
        batch: how frames wait, in each replica and altogether.
        tail: device, threads and cores of a replica.
        config: which cluster, and how many replicas.
        clock: monotonic ns.
    """

    def __init__(self, batch: BatchConfig, tail: TailConfig, config: RayConfig, clock: Callable[[], int]) -> None:
        self._batch = batch
        self._tail = tail
        self._config = config
        self._clock = clock
        self._routes: dict[str, _Route] = {}
        self._apps: dict[str, str] = {}
        self._recent = Recent()
        self._in_flight = 0
        self._ours = False
        self._retries = 0

    async def start(self) -> None:
        """Joins the cluster, or starts one on this machine when no address is given.

        Raises:
            ConfigError: no cluster answers at the address.
        """
        await asyncio.get_running_loop().run_in_executor(None, self._connect)

    def _connect(self) -> None:
        if not ray.is_initialized():
            self._ours = not self._config.address
            if self._ours and os.environ.pop("RAY_ADDRESS", None) is not None:  # of a cluster that may be gone; Ray would join it
                log.warning("RAY_ADDRESS is not used: a cluster is started on this machine; --ray-address names one to join")
            options: dict[str, Any] = (
                {"address": self._config.address}
                if self._config.address
                else {"address": "local", "include_dashboard": False, "num_cpus": self._config.cpus}
            )
            try:
                ray.init(log_to_driver=False, configure_logging=False, namespace="headtail", **options)
            except Exception as error:  # Ray raises bare ones as well, for a cluster that takes too long to start
                raise ConfigError(
                    f"no Ray cluster can be joined at {self._config.address or 'this machine'}: {error}; a cluster's token goes "
                    "into RAY_AUTH_TOKEN"
                ) from error
        with _turn("serve"):  # two that start Serve at the same moment: for one of them that is an error
            serve.start(proxy_location="Disabled")

    # ------------------------------------------------------------ bundles

    async def load(self, bundle: Bundle) -> None:
        """See `Backend.load`. An application that another ingress has started is shared."""
        loop = asyncio.get_running_loop()
        path = str(bundle.path.resolve())
        if self._config.tails_per_replica:
            handle = await loop.run_in_executor(None, self._deploy, SHELF_APP, self._shelf)
            name = model_id(bundle.sha256, path)
            failed: Reply | None = await handle.options(method_name="ready", multiplexed_model_id=name).remote(bundle.sha256, path)
            if failed is not None:
                unpack_reply(failed)
            self._routes[bundle.sha256] = _Route(handle, path, name)
            return
        handle = await loop.run_in_executor(None, self._deployed, site_name(bundle))
        if handle is not None and await _held(handle) == bundle.sha256:
            self._routes[bundle.sha256] = _Route(handle, path)
            return
        build = functools.partial(deployment, bundle, self._batch, self._tail, self._config)
        handle = await loop.run_in_executor(None, self._deploy, app_name(bundle), build)
        self._routes[bundle.sha256] = _Route(handle, path)
        self._apps[bundle.sha256] = app_name(bundle)

    def _shelf(self) -> serve.Application:
        return shelf(self._batch, self._tail, self._config)

    def _deployed(self, name: str) -> Any:
        """The handle of an application that someone else has deployed; None: there is none."""
        until_s = time.monotonic() + _SHARED_S
        while (known := serve.status().applications.get(name)) is not None and known.status.value in _SHARED:
            if known.status.value != "DEPLOYING":
                return serve.get_app_handle(name)
            if time.monotonic() > until_s:
                break
            time.sleep(0.2)
        return None

    def _deploy(self, name: str, build: Callable[[], serve.Application]) -> Any:
        """The application's handle; of several ingresses that start together one deploys, the others find it done."""
        handle = self._deployed(name)
        if handle is not None:
            return handle
        with _turn(name):
            handle = self._deployed(name)
            if handle is not None:
                return handle
            try:
                return serve.run(build(), name=name, route_prefix=None)
            except (serve.exceptions.RayServeException, ray.exceptions.RayError, RuntimeError) as error:
                raise ModelError(f"Ray Serve cannot start {name!r}: {str(error).splitlines()[0]}") from error

    async def unload(self, bundle_sha256: str) -> None:
        """See `Backend.unload`. On a shelf the tail goes when another needs its place."""
        self._routes.pop(bundle_sha256, None)
        name = self._apps.pop(bundle_sha256, None)
        if name is not None:
            await asyncio.get_running_loop().run_in_executor(None, functools.partial(serve.delete, name, _blocking=False))

    # ------------------------------------------------------------ frames

    async def run(self, work: TailWork) -> TailAnswer:
        """See `Backend.run`. A replica's death is hidden: the frame is asked again while its deadline allows."""
        route = self._routes.get(work.bundle_sha256)
        if route is None:
            raise UnknownModelError(f"no tail of bundle {work.bundle_sha256[:12]} is loaded")
        if self._in_flight >= self._batch.max_queue:
            raise OverloadedError(f"{self._in_flight} frames wait for the tail already")
        begun_ns = self._clock()
        self._in_flight += 1
        try:
            answer = await self._ask(route, work, begun_ns)
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
            try:
                reply = await _within(_called(route, work, None if work.deadline_ns is None else remaining_ns), remaining_ns / 1e9)
            except TimeoutError:
                break
            except _GoneError as gone:
                attempt += 1
                self._retries += 1
                log.warning("a replica went away (%s); attempt %d", gone, attempt)
                pause_s = min(_RETRY_S * 2 ** (attempt - 1), _RETRY_MOST_S)
                await asyncio.sleep(min(pause_s, max(0.0, (until_ns - self._clock()) / 1e9)))
            else:
                return unpack_reply(reply)
        raise OverloadedError("no replica could answer this frame before its deadline")

    def load_now(self) -> Load:
        """See `Backend.load_now`."""
        return self._recent.load

    async def close(self) -> None:
        """See `Backend.close`. A cluster that was there before keeps its tails, for the other ingress processes."""
        for route in self._routes.values():
            await route.infer.shutdown_async()
        if self._ours:
            await asyncio.get_running_loop().run_in_executor(None, self._shutdown)

    def _shutdown(self) -> None:
        serve.shutdown()
        ray.shutdown()


class _Turn:
    """An actor that does nothing: a cluster has one of a name, until the process that started it ends it or dies."""


@contextlib.contextmanager
def _turn(name: str) -> Iterator[None]:
    """In this block of this name there is one ingress of the cluster at a time.

    Raises:
        ModelError: another one has been in it for too long.
    """
    until_s = time.monotonic() + _SHARED_S
    while True:
        try:
            actor = ray.remote(num_cpus=0)(_Turn).options(name=f"turn-{name}").remote()
            break
        except (ValueError, ray.exceptions.ActorAlreadyExistsError):
            if time.monotonic() > until_s:
                raise ModelError(f"another ingress has been starting {name!r} for {_SHARED_S:g} s") from None
            time.sleep(0.2)
    try:
        yield
    finally:
        ray.kill(actor)


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
    """See `edge_server.backends.Opener`; Ray restarts what dies by itself."""
    del on_death
    backend = RayBackend(config.batch, config.tail, config.ray, clock)
    await backend.start()
    return backend
