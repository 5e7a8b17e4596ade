"""What runs in Ray's workers: tails, each replica with a queue and a thread of its own, as Serve deployments.

`TailReplica` holds one bundle's tail. `ShelfReplica` holds the few that were used last and loads others on demand, for
sites with more bundles than memory; Serve sends a bundle's frames to where its tail is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

from edge_server.backends.embedded import EmbeddedBackend
from edge_server.backends.ray.bundles import obtained
from edge_server.backends.ray.imports import RequestRouterConfig, ray, serve
from edge_server.backends.ray.packing import Call, Reply, pack_answer, pack_error, unpack_call
from edge_server.backends.ray.register import NAME, NAMESPACE, Files
from edge_server.config import BatchConfig, RayConfig, TailConfig
from edge_server.memory import keep_freed_memory
from protos.errors import HeadtailError, UnknownModelError
from splitters.bundle import Bundle

SHELF_APP = "headtail-shelf"
# Of the thread in which a replica loads its tail: on two cores a replica that started took frames/s of another from 81 to 32.
_LOADING_NICENESS = 5
ROUTER = "edge_server.backends.ray.router.LeastOutstandingRouter"


def app_name(bundle: Bundle) -> str:
    """The Serve application of a bundle; another hash is another application."""
    return f"headtail-{bundle.manifest.name}-{bundle.sha256[:12]}"


def site_name(bundle: Bundle) -> str:
    """The application of a bundle that the site itself deploys, by a file that cannot know the hash."""
    return f"headtail-{bundle.manifest.name}"


def model_id(sha256: str, path: str) -> str:
    """A bundle's name within Serve's multiplexing."""
    return f"{sha256}:{path}"


def dealt(cpus: tuple[int, ...], rank: int, replicas: int) -> tuple[int, ...]:
    """The cores of one of several replicas: each its own as long as there are enough, all of them for a single one."""
    hands = min(replicas, len(cpus))
    return cpus[rank % hands :: hands] if hands else ()


async def fetched(sha256: str) -> Files | None:
    """A bundle's files from the cluster's register; None: it has none, or there is no register."""
    try:
        register = ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        return None
    files: Files | None = await register.bundle.remote(sha256)
    return files


@contextlib.asynccontextmanager
async def _told() -> AsyncIterator[None]:
    """Around a replica's start: the register learns how it went, and after a failure the next try on this node waits its time."""
    app, node = serve.get_replica_context().app_name, ray.util.get_node_ip_address()
    try:
        register = ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:  # a cluster without a door
        yield
        return
    try:
        yield
    except Exception as error:
        text = error.message if isinstance(error, HeadtailError) else f"{type(error).__name__}: {error}"
        await asyncio.sleep(await register.failed.remote(app, node, text))
        raise
    await register.started.remote(app, node)


class _Replica:
    """A queue and a thread for tails.

    Args:
        batch: how frames wait.
        tail: device, threads and cores.
        replicas: that may share this node; they deal its cores out among them.
    """

    def __init__(self, batch: BatchConfig, tail: TailConfig, replicas: int) -> None:
        keep_freed_memory()
        rank = serve.get_replica_context().rank.local_rank if replicas > 1 else 0
        here = dataclasses.replace(tail, cpus=dealt(tail.cpus, rank, replicas))
        self._backend = EmbeddedBackend(batch, here, time.monotonic_ns, loading_niceness=_LOADING_NICENESS)

    async def _answer(self, call: Call) -> Reply:
        try:
            return pack_answer(await self._backend.run(unpack_call(call, time.monotonic_ns())))
        except HeadtailError as error:
            return pack_error(error)

    def check_health(self) -> None:
        """Serve replaces a replica whose tail's thread has ended."""
        if not self._backend.alive:
            raise RuntimeError("the tail's thread has ended")


class TailReplica(_Replica):
    """One bundle's tail.

    Args:
        path: the bundle's directory on the door's machine; a node that has it not fetches the bundle.
        sha256: the bundle it must be.
        batch: how frames wait.
        tail: device, threads and cores.
        replicas: that may share this node.
    """

    async def __init__(self, path: str, sha256: str, batch: BatchConfig, tail: TailConfig, replicas: int) -> None:  # type: ignore[misc]
        async with _told():
            super().__init__(batch, tail, replicas)
            self._sha256 = sha256
            await self._backend.load(await obtained(path, sha256, fetched))

    def holds(self) -> str:
        """The bundle's hash, for a door that finds this application by its name alone."""
        return self._sha256

    async def infer(self, call: Call) -> Reply:
        """Answers one frame; its deadline is on this process's clock from here on."""
        return await self._answer(call)


class _Shelved:
    """A loaded tail; Serve calls the finaliser when it drops the tail it has not used for longest."""

    def __init__(self, sha256: str, backend: EmbeddedBackend, loop: asyncio.AbstractEventLoop) -> None:
        self._sha256 = sha256
        self._backend = backend
        self._loop = loop
        self._gone = False

    def __del__(self) -> None:
        if not self._gone and not self._loop.is_closed():
            self._gone = True
            asyncio.run_coroutine_threadsafe(self._backend.unload(self._sha256), self._loop)


def _shelf_replica(size: int) -> type[_Replica]:
    """The class of replicas that hold ``size`` tails each."""

    class ShelfReplica(_Replica):
        """The tails used last.

        Args:
            batch: how frames wait.
            tail: device, threads and cores.
            replicas: that may share this node.
        """

        async def __init__(self, batch: BatchConfig, tail: TailConfig, replicas: int) -> None:  # type: ignore[misc]
            async with _told():
                super().__init__(batch, tail, replicas)
            self._loading: dict[str, asyncio.Task[None]] = {}

        @serve.multiplexed(max_num_models_per_replica=size)  # type: ignore[untyped-decorator]
        async def tail(self, name: str) -> _Shelved:
            """Loads a tail; whoever asked may give up meanwhile, the tail is there for the next frame."""
            sha256, _, path = name.partition(":")
            task = self._loading.get(sha256)
            if task is None:
                task = self._loading[sha256] = asyncio.create_task(self._load(sha256, path))
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                await asyncio.shield(task)
            finally:
                if task.done():
                    self._loading.pop(sha256, None)
            return _Shelved(sha256, self._backend, asyncio.get_running_loop())

        async def _load(self, sha256: str, path: str) -> None:
            await self._backend.load(await obtained(path, sha256, fetched))

        async def ready(self, sha256: str, path: str) -> Reply | None:
            """Loads a tail ahead of its first frame; None when it is there."""
            try:
                await self.tail(model_id(sha256, path))
            except HeadtailError as error:
                return pack_error(error)
            return None

        async def infer(self, call: Call) -> Reply:
            """Answers one frame. A tail dropped between its arrival and its turn is loaded once more."""
            name = model_id(call[0], call[1])
            begun_ns = time.monotonic_ns()
            reply = pack_error(UnknownModelError("the tail was dropped from memory"))
            for _ in range(2):
                try:
                    await self.tail(name)
                except HeadtailError as error:
                    return pack_error(error)
                waited_ns = time.monotonic_ns() - begun_ns
                remaining_ns = None if call[5] is None else max(0, call[5] - waited_ns)
                reply = await self._answer((*call[:5], remaining_ns, call[6]))
                if reply[0] is None or reply[0][0] != UnknownModelError.code:
                    break
            return reply

    return ShelfReplica


def _options(batch: BatchConfig, config: RayConfig) -> dict[str, Any]:
    lowest, highest = config.replicas
    options: dict[str, Any] = {
        "name": "tail",
        # Frames wait in the replica, where the most urgent goes first and latecomers are shed. With a tighter bound they wait in
        # the router, which tries again only every 25..500 ms: a replica that took 2 at a time stood idle half of the time.
        "max_ongoing_requests": batch.max_queue,
        "max_queued_requests": batch.max_queue,
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        "logging_config": {"enable_access_log": False},
        "request_router_config": RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": 5.0,
    }
    if lowest == highest:
        options["num_replicas"] = lowest
    else:
        options["autoscaling_config"] = {
            "min_replicas": lowest, "max_replicas": highest, "target_ongoing_requests": max(1, batch.max_batch),
            "upscale_delay_s": 2.0, "downscale_delay_s": 60.0, "metrics_interval_s": 1.0, "look_back_period_s": 4.0,
        }  # fmt: skip
    return options


def _device(tail: TailConfig, config: RayConfig) -> TailConfig:
    """A replica's own: on a card where it is given one, and with no more threads than the cores that Ray sets aside for it."""
    device = "cuda" if config.gpus_per_replica and tail.device == "cpu" else tail.device
    return dataclasses.replace(tail, device=device, threads=tail.threads or max(1, int(config.cpus_per_replica)))


def deployment(bundle: Bundle, batch: BatchConfig, tail: TailConfig, config: RayConfig) -> serve.Application:
    """A bundle's tail as a Serve application; `deploy/ray/serve.yaml` starts the same one by itself."""
    replica = serve.deployment(**_options(batch, config))(TailReplica)
    return replica.bind(str(bundle.path.resolve()), bundle.sha256, batch, _device(tail, config), config.replicas[1])


def shelf(batch: BatchConfig, tail: TailConfig, config: RayConfig) -> serve.Application:
    """All bundles' tails in one application, ``config.tails_per_replica`` in the memory of each replica."""
    replica = serve.deployment(**_options(batch, config))(_shelf_replica(config.tails_per_replica))
    return replica.bind(batch, _device(tail, config), config.replicas[1])
