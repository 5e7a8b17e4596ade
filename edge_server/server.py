"""The server: open, serve, change models, drain, end. One event loop; nothing forks once it runs.

It leaves what belongs to a process (signals, standard streams, the exit code) to its caller: `edge_server.process` for
``edge-server``, or another program.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine, Generator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_health.v1 import health, health_pb2

from edge_server import preflight
from edge_server.access.auth import open_tokens
from edge_server.access.quota import Caller
from edge_server.adapting.adapting import Adapting
from edge_server.backends import BACKENDS, Backend
from edge_server.bandwidth.grants import BandwidthManager
from edge_server.bandwidth.lag import watch_lag
from edge_server.config import ServerConfig, split_address
from edge_server.doors import listen, wire
from edge_server.doors.answering import Answerer
from edge_server.doors.gate import Gate
from edge_server.doors.grpc import Ingress
from edge_server.doors.operator import Operator
from edge_server.doors.session import Services
from edge_server.loading import Loading, bring_up_to_date
from edge_server.models import Model, ModelStore
from edge_server.observe.metrics import Metrics, NoMetrics, PrometheusMetrics
from edge_server.observe.tally import Tally
from edge_server.observe.tracing import NoTracing, Traces
from edge_server.web.opening import open_page
from protos.errors import DrainingError, HeadtailError, InternalError
from protos.tracing import open_spans
from protos.version import package_version

if TYPE_CHECKING:
    from edge_server.doors.quic import QuicDoor
    from edge_server.web.page import ServerPage

log = logging.getLogger(__name__)

CLOSE_S = 0.9  # for what is closed behind the grace, before it is left to the system


class Server:
    """Serves the tails of bundles, inside a program of yours.

        async with Server.start(ServerConfig(models=("detector",), listen="127.0.0.1:0")) as server:
            print(server.address)
            await server.add("my-bundle")

    All calls are made on the event loop it was opened on; in a thread, give that thread a loop with `asyncio.run`.

    Args:
        config: checked.
        on_ending: called once when the end begins, by `stop` or because a part has died.
    """

    def __init__(self, config: ServerConfig, *, on_ending: Callable[[], None] | None = None) -> None:
        self.config = config
        self.address = ""
        self.metrics_port = self.page_port = 0
        self.gate: Gate | None = None
        self.ending = asyncio.Event()
        self.tracing: NoTracing | Traces = NoTracing()
        self._on_ending = on_ending
        self._metrics: Metrics = NoMetrics()
        self._prometheus: PrometheusMetrics | None = None
        self._store = ModelStore(config.models)
        self._backend: Backend | None = None
        self._answerer: Answerer | None = None
        self._ingress: Ingress | None = None
        self._tally: Tally | None = None
        self._page: ServerPage | None = None
        self._quic = _quic_door(config)
        self._loading: Loading | None = None
        self._seen = Adapting.sample(config.adapt_dir)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # set at import
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: HeadtailError | None = None
        self._opening: asyncio.Task[None] | None = None
        self._end: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._reload_wanted = self._closed = False

    @classmethod
    def start(cls, config: ServerConfig) -> Start:
        """A server that listens: ``async with Server.start(config) as server``, which stops it at the end, or ``await`` it.

        Raises:
            HeadtailError: when it is awaited or entered: a setting, bundle, certificate or address cannot be used. At the end of
                the block: a part without which it could not serve has died.
        """
        return Start(cls(config))

    # ------------------------------------------------------------ opening

    async def open(self) -> None:
        """Opens the bundles, loads the tails and listens.

        Raises:
            HeadtailError: a setting, bundle, certificate or address cannot be used; nothing is left open.
            DrainingError: it was told to stop meanwhile.
        """
        self._opening = asyncio.create_task(self._open())
        try:
            await self._opening
        except asyncio.CancelledError:
            self._opening.cancel()
            if not self.ending.is_set():
                await _within(self.close(), CLOSE_S)
                raise
            raise DrainingError("the server was told to stop before its start was complete") from None
        except BaseException:
            await _within(self.close(), CLOSE_S)
            raise

    async def _open(self) -> None:
        open_backend = BACKENDS.find(self.config.backend)
        await asyncio.get_running_loop().run_in_executor(None, preflight.check, self.config)
        if self.config.metrics_port is not None:
            self._metrics = self._prometheus = PrometheusMetrics()
            self.metrics_port = self._prometheus.serve(self.config.metrics_port)
        if self.config.web is not None:
            self._metrics = self._tally = Tally(self._metrics)
        spans = open_spans("headtail-server", package_version(), self.config.otel_endpoint)
        if spans is not None:
            self.tracing = Traces(spans)
        self._backend = backend = await open_backend(
            self.config, clock=time.monotonic_ns, on_death=functools.partial(self._fail, "the tail's thread")
        )
        failures = await bring_up_to_date(self._store, backend, _on_ready)
        for failure in failures if self._store.all() else failures[1:]:
            log.error("one model is not served: %s", failure.message)
        if failures and not self._store.all():
            raise failures[0]
        self._answerer = Answerer(
            backend, self.config.limits, decode_threads=self.config.tail.decode_threads, clock=time.monotonic_ns,
            metrics=self._metrics, tracing=self.tracing, seen=self._seen,
        )  # fmt: skip
        bandwidth = BandwidthManager()
        self._spawn(watch_lag(bandwidth), "the watch of the event loop")
        services = Services(
            store=self._store, backend=backend, answerer=self._answerer, bandwidth=bandwidth, limits=self.config.limits,
            metrics=self._metrics, tracing=self.tracing, clock=time.monotonic_ns, version=package_version(), datagrams=self._quic,
        )  # fmt: skip
        anyone = Caller(max_unary=self.config.limits.max_unary_in_flight)
        ingress = Ingress(services, anyone)
        self._loading = Loading(self._store, backend, ingress.sessions, grace_s=self.config.grace_s, linger_s=self.config.linger_s)
        if self._seen is not None and self.config.adapt_dir is not None:
            adapting = Adapting(self.config.adapt_dir, self.config.adapt_every_s, self._store, self._loading, self._seen)
            self._spawn(adapting.run(), "the fitting of bundles", vital=False)
        self._ingress = ingress
        if self.config.web is not None and self._tally is not None:
            self._page = open_page(self.config.web, self._tally, ingress, backend=self.config.backend)
        await self._listen(ingress, self._loading, anyone)
        self.page_port = await self._page.start() if self._page is not None else 0

    async def _listen(self, ingress: Ingress, loading: Loading, anyone: Caller) -> None:
        limits = self.config.limits
        self.gate = Gate(limits, anyone, self._metrics.on_refused)
        tokens = open_tokens(self.config.security, max_unary=limits.max_unary_in_flight)
        for each in tokens:
            if each is not None:
                self._spawn(each.watch(), "the watch of a token file")
        operator = Operator(ingress, loading, self.config.models_dir)
        server, self.address = listen.build(self.config, ingress, operator, self.gate, self._health, tokens)
        if self._quic is not None:
            host, port = split_address(self.address)
            # Processes that share a TCP port have a UDP port each: a session's datagrams must come to the process that has it.
            await self._quic.open(host, 0 if self.config.reuse_port else port)
        await server.start()
        self._server = server
        for name in ("", wire.SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("listening on %s", self.address)
        if self._reload_wanted:
            self.reload_soon()

    # ------------------------------------------------------------ models

    @property
    def models(self) -> dict[str, str]:
        """Name to the bundle's sha256 of every model in use, the default first."""
        return {model.name: model.sha256 for model in self._store.all()}

    @property
    def counts(self) -> dict[str, int]:
        """What is in hand at this moment, by name; all 0 once every client is gone."""
        return self._ingress.counts() if self._ingress is not None else {}

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """What an operator sees of each open session."""
        return [session.facts() for session in self._ingress.sessions] if self._ingress is not None else []

    async def add(self, bundle: str | Path) -> str:
        """Puts a bundle into use; one in use already is read from disk again, and its sessions are told where it changed.

        Args:
            bundle: its directory, or a default's name (exported now where it was not yet, which may take minutes).

        Returns:
            The model's name.

        Raises:
            HeadtailError: the bundle cannot be read or loaded, or another model has its name; nothing was changed.
        """
        return (await self._running().add(str(bundle))).name

    async def remove(self, name: str) -> None:
        """Takes a model out of use: new calls for it are refused, its sessions are told, answered and ended, its tail goes.

        Args:
            name: as `models` has it.

        Raises:
            UnknownModelError: there is none of that name.
        """
        await self._running().remove(name)

    async def reload(self) -> None:
        """Reads all bundles from disk again and puts those that changed into use. What cannot be used is logged."""
        await self._running().reload()

    def reload_soon(self) -> None:
        """`reload` in the background, for a callback of the event loop; during the start, once that is complete."""
        if self._loading is None or self._server is None:
            self._reload_wanted = True
        elif not self.ending.is_set():
            self._spawn(self._loading.reload(), "the reading of bundles", vital=False)

    def _running(self) -> Loading:
        if self._loading is None:
            raise RuntimeError("the server was not opened")
        if self.ending.is_set() or self._closed:
            raise DrainingError("the server is shutting down")
        return self._loading

    # ------------------------------------------------------------ the end

    async def wait(self) -> None:
        """Until the server has ended.

        Raises:
            InternalError: a part without which it cannot serve has died.
        """
        await self._ended.wait()
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """Drains and closes; returns when it has ended, after the grace and two seconds at the latest."""
        self.stop_soon()
        if self._end is not None:
            await asyncio.shield(self._end)

    def stop_soon(self) -> None:
        """Begins the end, for a callback of the event loop; `wait` returns when it is reached."""
        if self.ending.is_set():
            return
        self.ending.set()
        if self._on_ending is not None:
            self._on_ending()
        self._end = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait({self._opening}, timeout=CLOSE_S)
        elif self._server is not None:
            await _within(self.drain(), self.config.grace_s + CLOSE_S)
        await _within(self.close(), CLOSE_S)
        self._ended.set()

    async def drain(self) -> None:
        """Health says NOT_SERVING, sessions are told, what is in flight is answered; bounded by the grace."""
        server, ingress, grace_s = self._server, self._ingress, self.config.grace_s
        deadline = time.monotonic() + grace_s
        log.info("draining, at most %g s", grace_s)
        await self._health.enter_graceful_shutdown()
        if ingress is not None:
            ingress.drain(int(grace_s * 1e9))
            if ingress.sessions:
                await asyncio.sleep(min(self.config.linger_s, grace_s))
            ingress.finish()
            while (ingress.sessions or ingress.calls) and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            if ingress.sessions:
                log.warning("%d sessions were cut off after %g s", len(ingress.sessions), grace_s)
        if server is not None:
            await server.stop(max(0.0, min(0.5, deadline - time.monotonic())))
        await self.close()

    async def close(self) -> None:
        """Frees what the server holds, without waiting for sessions. A second time there is nothing left to do."""
        if self._closed:
            return
        self._closed = True
        if self._server is not None:
            await self._server.stop(0)
            self._server = None
        if self._page is not None:
            await self._page.close()
        if self._quic is not None:
            self._quic.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._loading is not None:
            await self._loading.close()
        if self._backend is not None:
            await self._backend.close()
        if self._answerer is not None:
            self._answerer.close()
        if self._prometheus is not None:
            self._prometheus.close()
        if isinstance(self.tracing, Traces):
            await asyncio.get_running_loop().run_in_executor(None, self.tracing.close)
        log.info("stopped")
        self._ended.set()

    def _spawn(self, work: Coroutine[Any, Any, None], what: str, *, vital: bool = True) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled() or (error := task.exception()) is None:
                return
            if vital:
                self._fail(what, error)
            else:
                log.error("%s failed", what, exc_info=error)

        task.add_done_callback(done)

    def _fail(self, what: str, error: BaseException) -> None:
        """A part without which nothing can be served has died: health says so, and the server ends with a message."""
        log.critical("%s has died; the server ends", what, exc_info=error)
        if self._failure is None:
            self._failure = InternalError(f"{what} has died ({type(error).__name__}: {error}); the log says where")
        self.stop_soon()


class Start:
    """A server that is about to start; see `Server.start`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __await__(self) -> Generator[Any, None, Server]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> Server:
        await self._server.open()
        return self._server

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._server.stop()
        if error is None:
            await self._server.wait()


async def _within(work: Coroutine[Any, Any, None], seconds: float) -> None:
    """The work's result; past its time it is left where it is."""
    task = asyncio.create_task(work)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        log.warning("not everything could be closed within %g s", seconds)
        task.cancel()
    for each in done:
        each.result()


def _quic_door(config: ServerConfig) -> QuicDoor | None:
    """The UDP door, where it is wanted and its package is installed."""
    if not config.quic:
        return None
    if find_spec("aioquic") is None:
        log.info("frames come by gRPC alone; pip install 'headtail[quic]' opens a UDP port beside it")
        return None
    from edge_server.doors.quic import QuicDoor

    return QuicDoor(config.limits)


def _on_ready(model: Model, _old: Model | None) -> None:
    log.info("%s: bundle %s ready", model.name, model.sha256[:12])
