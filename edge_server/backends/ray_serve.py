"""The Ray backend: tails as Ray Serve deployments behind our own door, one application per bundle.

Every frame is one unary call of a deployment handle, so Serve balances frame by frame; a replica batches what waits
with it exactly as the embedded backend does, since it runs one. Serve's own proxies are not started. Arguments travel
between the processes of one trusted cluster by Ray's own means; nothing of a client's is unpickled by them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when Ray is imported: no extra thread and loop per hop, no log line per request.
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Not its ways in for others: the door in front is ours.
os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")

try:
    import ray
    from ray import serve
    from ray.exceptions import RayActorError, RayError
    from ray.serve.exceptions import BackPressureError, RayServeException
except ImportError as missing:
    from protos.errors import MissingDependencyError

    raise MissingDependencyError("--backend ray needs Ray Serve: pip install 'headtail[ray]'") from missing

from edge_server.backends import Load, TailAnswer, TailWork
from edge_server.backends.embedded import EmbeddedBackend
from edge_server.config import BatchConfig, RayConfig, TailConfig
from edge_server.memory import keep_freed_memory
from edge_server.recent import Recent
from protos.errors import ConfigError, HeadtailError, ModelError, OverloadedError, UnknownModelError, from_code
from splitters.bundle import Bundle, open_bundle

log = logging.getLogger(__name__)

_RETRIES = 5
_RETRY_S = 0.05
_NO_DEADLINE_S = 60.0  # a frame without deadline is still not tried for ever

# What a replica answers: the answer with its times, or an error's code, text and whether to retry.
Reply = tuple[TailAnswer | None, tuple[str, str, bool] | None]


class TailReplica:
    """One replica: a bundle's tail with its own queue and thread.

    Args:
        path: the bundle's directory, which every node must see.
        sha256: the bundle it must be.
        batch: how frames wait.
        tail: device, threads and cores.
    """

    async def __init__(self, path: str, sha256: str, batch: BatchConfig, tail: TailConfig) -> None:  # type: ignore[misc]
        keep_freed_memory()
        bundle = open_bundle(Path(path))
        if bundle.sha256 != sha256:
            raise UnknownModelError(f"{path} holds bundle {bundle.sha256[:12]} on this node, not {sha256[:12]}")
        self._backend = EmbeddedBackend(batch, tail, time.monotonic_ns)
        await self._backend.load(bundle)

    async def infer(self, work: TailWork, remaining_ns: int | None) -> Reply:
        """Answers one frame; the deadline is on this process's clock from here on."""
        deadline_ns = None if remaining_ns is None else time.monotonic_ns() + remaining_ns
        here = TailWork(
            bundle_sha256=work.bundle_sha256, kind=work.kind, arrays=work.arrays, size_px=work.size_px, deadline_ns=deadline_ns
        )
        try:
            return await self._backend.run(here), None
        except HeadtailError as error:
            return None, (error.code, error.message, error.retryable)

    def check_health(self) -> None:
        """Serve replaces a replica whose tail's thread has ended."""
        if not self._backend.alive:
            raise RuntimeError("the tail's thread has ended")


def app_name(bundle: Bundle) -> str:
    """The Serve application of a bundle; another hash is another application."""
    return f"headtail-{bundle.manifest.name}-{bundle.sha256[:12]}"


def deployment(bundle: Bundle, batch: BatchConfig, tail: TailConfig, config: RayConfig) -> serve.Application:
    """A bundle's tail as a Serve application; `deploy/ray/serve.yaml` starts the same one by itself."""
    lowest, highest = config.replicas
    ongoing = 2 * batch.max_batch  # one batch runs, one gathers
    options: dict[str, Any] = {
        "name": "tail",
        "max_ongoing_requests": ongoing,
        "max_queued_requests": batch.max_queue,
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
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
    device = TailConfig(
        threads=tail.threads, cpus=tail.cpus, decode_threads=tail.decode_threads,
        device="cuda" if config.gpus_per_replica and tail.device == "cpu" else tail.device,
    )  # fmt: skip
    return serve.deployment(**options)(TailReplica).bind(str(bundle.path.resolve()), bundle.sha256, batch, device)


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
        self._handles: dict[str, Any] = {}
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
            options = (
                {"address": self._config.address}
                if self._config.address
                else {"include_dashboard": False, "num_cpus": self._config.cpus}
            )
            try:
                ray.init(log_to_driver=False, configure_logging=False, namespace="headtail", **options)
            except (ConnectionError, RayError, ValueError, RuntimeError) as error:
                raise ConfigError(f"no Ray cluster can be joined at {self._config.address or 'this machine'}: {error}") from error
        serve.start(proxy_location="Disabled")

    async def load(self, bundle: Bundle) -> None:
        """See `Backend.load`. An application that another ingress has started is shared."""
        loop = asyncio.get_running_loop()
        handle = await loop.run_in_executor(None, self._deploy, bundle)
        self._handles[bundle.sha256] = handle
        self._apps[bundle.sha256] = app_name(bundle)

    def _deploy(self, bundle: Bundle) -> Any:
        name = app_name(bundle)
        known = serve.status().applications.get(name)
        if known is not None and known.status.value == "RUNNING":
            return serve.get_app_handle(name)
        application = deployment(bundle, self._batch, self._tail, self._config)
        try:
            return serve.run(application, name=name, route_prefix=None)
        except (RayServeException, RayError, RuntimeError) as error:
            raise ModelError(
                f"Ray Serve cannot start the tail of {bundle.manifest.name!r}: {str(error).splitlines()[0]}"
            ) from error

    async def unload(self, bundle_sha256: str) -> None:
        """See `Backend.unload`."""
        self._handles.pop(bundle_sha256, None)
        name = self._apps.pop(bundle_sha256, None)
        if name is not None:
            await asyncio.get_running_loop().run_in_executor(None, functools.partial(serve.delete, name, _blocking=False))

    async def run(self, work: TailWork) -> TailAnswer:
        """See `Backend.run`. A replica's death is hidden: the frame is asked again while its deadline allows."""
        handle = self._handles.get(work.bundle_sha256)
        if handle is None:
            raise UnknownModelError(f"no tail of bundle {work.bundle_sha256[:12]} is loaded")
        if self._in_flight >= self._batch.max_queue:
            raise OverloadedError(f"{self._in_flight} frames wait for the tail already")
        begun_ns = self._clock()
        self._in_flight += 1
        try:
            answer = await self._ask(handle, work, begun_ns)
        finally:
            self._in_flight -= 1
        now_ns = self._clock()
        queue_ns = max(0, now_ns - begun_ns - answer.tail_ns)
        self._recent.add(queue_ns, answer.tail_ns)
        self._recent.sum_up(self._in_flight, now_ns)
        return TailAnswer(answer=answer.answer, queue_ns=queue_ns, tail_ns=answer.tail_ns, batch_size=answer.batch_size)

    async def _ask(self, handle: Any, work: TailWork, begun_ns: int) -> TailAnswer:
        until_ns = work.deadline_ns if work.deadline_ns is not None else begun_ns + int(_NO_DEADLINE_S * 1e9)
        for attempt in range(_RETRIES + 1):
            remaining_ns = until_ns - self._clock()
            if remaining_ns <= 0:
                break
            try:
                async with asyncio.timeout(remaining_ns / 1e9):
                    reply: Reply = await handle.infer.remote(work, None if work.deadline_ns is None else remaining_ns)
            except TimeoutError:
                break
            except BackPressureError as full:
                raise OverloadedError("the tails' queues are full") from full
            except (RayActorError, RayServeException) as gone:
                self._retries += 1
                log.warning("a replica went away (%s); attempt %d", type(gone).__name__, attempt + 1)
                await asyncio.sleep(_RETRY_S * 2**attempt)
                continue
            except RayError as failure:
                log.exception("a replica failed")
                raise ModelError("the tail failed on this frame; the replica's log says why") from failure
            answer, error = reply
            if error is not None:
                code, text, retryable = error
                raise from_code(code, text, retryable=retryable)
            if answer is not None:
                return answer
        raise OverloadedError("no replica could answer this frame before its deadline")

    def load_now(self) -> Load:
        """See `Backend.load_now`."""
        return self._recent.load

    async def close(self) -> None:
        """See `Backend.close`. A cluster that was there before keeps its tails, for the other ingress processes."""
        for handle in self._handles.values():
            await handle.shutdown_async()
        if self._ours:
            await asyncio.get_running_loop().run_in_executor(None, self._shutdown)

    def _shutdown(self) -> None:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
