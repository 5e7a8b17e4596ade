"""The server's life: bind, serve, reload, drain, end. One event loop; nothing forks once it runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_server import preflight
from edge_server.access.auth import TokenInterceptor, Tokens
from edge_server.access.quota import Client
from edge_server.backends import BACKENDS, Backend
from edge_server.bandwidth.grants import BandwidthManager
from edge_server.config import SecurityConfig, ServerConfig, split_address
from edge_server.doors import wire
from edge_server.doors.answering import Answerer
from edge_server.doors.gate import Gate
from edge_server.doors.grpc import Ingress
from edge_server.doors.open_inference import OpenInference
from edge_server.doors.session import Services
from edge_server.loading import bring_up_to_date
from edge_server.models import Model, ModelStore
from edge_server.observe.metrics import Metrics, NoMetrics, PrometheusMetrics
from edge_server.observe.tracing import NoTracing, Traces
from protos.errors import ConfigError, HeadtailError, InternalError
from protos.process import leave
from protos.tracing import open_spans
from protos.version import package_version

log = logging.getLogger(__name__)

_POLL_S = 0.5
_TOKEN_POLL_S = 0.5
_LAG_POLL_S = 0.05
_LATE_S = 0.01
_CLOSE_S = 0.9  # for what is closed behind the grace, before it is left to the system


def channel_options(config: ServerConfig) -> list[tuple[str, Any]]:
    """GRPC's settings: explicit message limits, and pings permitted more often than clients send them."""
    limits = config.limits
    largest = max(limits.max_payload_bytes, limits.max_frame_bytes) + (64 << 10)
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", 16 << 20),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 4_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1e3)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_s * 1e3 / 3)),
        # A ping of gRPC's own, under way when the peer vanished, stands in for keepalive's and would be waited for a minute.
        ("grpc.http2.ping_timeout_ms", int(limits.keepalive_s * 1e3 / 3)),
        ("grpc.max_connection_idle_ms", int(limits.idle_s * 1e3)),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1e3)),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.so_reuseport", int(config.reuse_port)),
    ]


class EdgeServer:
    """A server of one configuration.

    Args:
        config: checked.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.address = ""
        self.metrics_port = 0
        self.gate: Gate | None = None
        self._stopping = asyncio.Event()
        self._metrics: Metrics = NoMetrics()
        self.tracing: NoTracing | Traces = NoTracing()
        self._backend: Backend | None = None
        self._answerer: Answerer | None = None
        self._ingress: Ingress | None = None
        self._anyone = Client()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # set at import
        self._server: grpc.aio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: HeadtailError | None = None
        self._watchdog: threading.Timer | None = None
        self._reload_wanted = False
        self._closed = False

    async def start(self) -> None:
        """Opens the bundles, loads the tails and listens.

        Raises:
            HeadtailError: a setting, bundle, certificate or address cannot be used.
        """
        open_backend = BACKENDS.find(self.config.backend)
        await asyncio.get_running_loop().run_in_executor(None, preflight.check, self.config)
        if self.config.metrics_port is not None:
            metrics = PrometheusMetrics()
            self.metrics_port = metrics.serve(self.config.metrics_port)
            self._metrics = metrics
        spans = open_spans("headtail-server", package_version(), self.config.otel_endpoint)
        if spans is not None:
            self.tracing = Traces(spans)
        self._backend = backend = await open_backend(
            self.config, clock=time.monotonic_ns, on_death=functools.partial(self._fail, "the tail's thread")
        )
        store = ModelStore(self.config.models)
        failures = await bring_up_to_date(store, backend, _on_ready)
        for failure in failures if store.all() else failures[1:]:
            log.error("one model is not served: %s", failure.message)
        if not store.all():
            raise failures[0]
        self._answerer = Answerer(
            backend,
            self.config.limits,
            decode_threads=self.config.tail.decode_threads,
            clock=time.monotonic_ns,
            metrics=self._metrics,
            tracing=self.tracing,
        )
        bandwidth = BandwidthManager()
        self._spawn(_watch_lag(bandwidth), "the watch of the event loop")
        services = Services(
            store=store, backend=backend, answerer=self._answerer, bandwidth=bandwidth, limits=self.config.limits,
            metrics=self._metrics, tracing=self.tracing, clock=time.monotonic_ns, version=package_version(),
        )  # fmt: skip
        self._anyone = Client(max_unary=self.config.limits.max_unary_in_flight)
        self._ingress = Ingress(services, self._anyone)
        await self._listen()

    async def _listen(self) -> None:
        assert self._ingress is not None  # noqa: S101 - start() made it
        limits, on_refused = self.config.limits, self._metrics.on_refused
        self.gate = Gate(limits, self._anyone, on_refused)
        interceptors: list[grpc.aio.ServerInterceptor] = [self.gate]  # type: ignore[type-arg]
        if self.config.security.token_file is not None:
            tokens = Tokens(self.config.security, max_unary=limits.max_unary_in_flight)
            interceptors.insert(0, TokenInterceptor(tokens, on_refused))
            self._spawn(_refresh(tokens), "the watch of the token file")
        server = grpc.aio.server(
            interceptors=interceptors,
            options=channel_options(self.config),
            maximum_concurrent_rpcs=limits.max_sessions + limits.max_calls + limits.max_health_calls,
        )
        standard = OpenInference(self._ingress)
        server.add_generic_rpc_handlers(
            (
                wire.handler(wire.SERVICE, wire.HEADTAIL, self._ingress),
                wire.handler(wire.OPEN_INFERENCE_SERVICE, wire.OPEN_INFERENCE, standard),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (wire.SERVICE, wire.OPEN_INFERENCE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        self.address = _bind(server, self.config)
        await server.start()
        self._server = server
        for name in ("", wire.SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("listening on %s", self.address)
        if self.config.port_file is not None:
            _write_whole(self.config.port_file, self.address + "\n")
        if self._reload_wanted:
            self.reload()

    # ------------------------------------------------------------ running

    async def serve(self) -> None:
        """Starts and serves until `stop`, SIGTERM or SIGINT, or until the parent process is gone; then drains.

        The process's signals are this server's from here on, while it starts as well.

        Raises:
            HeadtailError: it cannot start, or a part without which it cannot serve has died.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        if self.config.parent_pid is not None:
            self._spawn(self._watch_parent(self.config.parent_pid), "the watch of the parent process")
        starting, stopping = asyncio.create_task(self.start()), asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                await stopping
                await _within(self.drain(), self.config.grace_s + _CLOSE_S)
            else:
                log.info("told to stop before the start was complete")
                starting.cancel()
                await asyncio.wait({starting}, timeout=_CLOSE_S)
        finally:
            stopping.cancel()
            await _within(self.close(), _CLOSE_S)
            if self._watchdog is not None:
                self._watchdog.cancel()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begins the end; a second time ends at once."""
        if self._stopping.is_set():
            log.warning("stopping at once")
            leave(130)
        self._stopping.set()
        # Should the event loop itself be held up, by a library that keeps Python's lock.
        self._watchdog = threading.Timer(self.config.grace_s + 2 * _CLOSE_S, leave, (0,))
        self._watchdog.daemon = True
        self._watchdog.start()

    def reload(self) -> None:
        """Reads the bundles from disk again, in the background; during the start, once it is complete."""
        if self._ingress is None:
            self._reload_wanted = True
        elif not self._stopping.is_set():
            self._spawn(self._ingress.reload(), "the reading of bundles", vital=False)

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
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._backend is not None:
            await self._backend.close()
        if self._answerer is not None:
            self._answerer.close()
        if isinstance(self._metrics, PrometheusMetrics):
            self._metrics.close()
        if isinstance(self.tracing, Traces):
            await asyncio.get_running_loop().run_in_executor(None, self.tracing.close)
        if self.config.port_file is not None:
            _remove_own(self.config.port_file, self.address)
        log.info("stopped")

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
        """A part without which nothing can be served has died: health says so, and the process ends with a message."""
        log.critical("%s has died; the server ends", what, exc_info=error)
        if self._failure is None:
            self._failure = InternalError(f"{what} has died ({type(error).__name__}: {error}); the log says where")
        if not self._stopping.is_set():
            self.stop()

    async def _watch_parent(self, pid: int) -> None:
        first = os.getppid()
        while os.getppid() == first and _alive(pid):
            await asyncio.sleep(_POLL_S)
        log.info("process %d, which started this server, is gone", pid)
        if not self._stopping.is_set():
            self.stop()


async def _within(work: Coroutine[Any, Any, None], seconds: float) -> None:
    """The work's result; past its time it is left where it is."""
    task = asyncio.create_task(work)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        log.warning("not everything could be closed within %g s", seconds)
        task.cancel()
    else:
        task.result()


def _on_ready(model: Model, old: Model | None) -> None:
    del old
    log.info("%s: bundle %s ready", model.name, model.sha256[:12])


async def _refresh(tokens: Tokens) -> None:
    while True:
        await asyncio.sleep(_TOKEN_POLL_S)
        tokens.refresh()


async def _watch_lag(bandwidth: BandwidthManager) -> None:
    """Tells the grants when this process itself was late: then every session's frames seem delayed, and by no link."""
    while True:
        before_ns = time.monotonic_ns()
        await asyncio.sleep(_LAG_POLL_S)
        now_ns = time.monotonic_ns()
        if now_ns - before_ns > (_LAG_POLL_S + _LATE_S) * 1e9:
            bandwidth.on_late(before_ns, now_ns)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    host, _ = split_address(config.listen)
    credentials = _credentials(config.security)
    try:
        port = (
            server.add_insecure_port(config.listen) if credentials is None else server.add_secure_port(config.listen, credentials)
        )
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"cannot listen on {config.listen}: the address is in use or not one of this machine's")
    return f"{host}:{port}"


def _credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    if security.tls_cert is None or security.tls_key is None:
        return None
    ca = preflight.read_pem(security.tls_client_ca) if security.tls_client_ca else None
    pair = (preflight.read_pem(security.tls_key), preflight.read_pem(security.tls_cert))
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _write_whole(path: Path, text: str) -> None:
    """A reader sees nothing or all of it."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write the port file {path}: {error.strerror}") from error


def _remove_own(path: Path, address: str) -> None:
    """Removes a port file, unless it names another server by now."""
    with contextlib.suppress(OSError):
        if address and path.read_text(encoding="utf-8").strip() == address:
            path.unlink()
