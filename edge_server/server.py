"""The server's life: bind, serve, reload, drain, end. One event loop; nothing forks once it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_server import wire
from edge_server.answering import Answerer
from edge_server.auth import TokenInterceptor, Tokens
from edge_server.backends import Backend
from edge_server.bandwidth import BandwidthManager
from edge_server.config import SecurityConfig, ServerConfig, split_address
from edge_server.gate import Gate
from edge_server.ingress import Ingress
from edge_server.metrics import Metrics, NoMetrics, PrometheusMetrics
from edge_server.models import ModelStore
from edge_server.open_inference import OpenInference
from edge_server.quota import Client
from edge_server.session import Services
from edge_server.tracing import NoTracing, Traces
from protos.errors import ConfigError
from protos.tracing import open_spans

log = logging.getLogger(__name__)

_POLL_S = 0.5
_TOKEN_POLL_S = 0.5
_LAG_POLL_S = 0.05
_LATE_S = 0.01


def _version() -> str:
    try:
        return version("headtail")
    except PackageNotFoundError:
        return "0"


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
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Opens the bundles, loads the tails and listens.

        Raises:
            HeadtailError: a setting, bundle, certificate or address cannot be used.
        """
        store = ModelStore(self.config.models)
        loop = asyncio.get_running_loop()
        models = await loop.run_in_executor(None, store.open)
        if self.config.metrics_port is not None:
            metrics = PrometheusMetrics()
            self.metrics_port = metrics.serve(self.config.metrics_port)
            self._metrics = metrics
        spans = open_spans("headtail-server", _version(), self.config.otel_endpoint)
        if spans is not None:
            self.tracing = Traces(spans)
        self._backend = backend = await self._make_backend()
        for model in models:
            await backend.load(model.bundle)
            log.info("%s: bundle %s ready", model.name, model.sha256[:12])
        self._answerer = Answerer(
            backend,
            self.config.limits,
            decode_threads=self.config.tail.decode_threads,
            clock=time.monotonic_ns,
            metrics=self._metrics,
            tracing=self.tracing,
        )
        bandwidth = BandwidthManager()
        self._spawn(_watch_lag(bandwidth))
        services = Services(
            store=store, backend=backend, answerer=self._answerer, bandwidth=bandwidth, limits=self.config.limits,
            metrics=self._metrics, tracing=self.tracing, clock=time.monotonic_ns, version=_version(),
        )  # fmt: skip
        self._anyone = Client(max_unary=self.config.limits.max_unary_in_flight)
        self._ingress = Ingress(services, self._anyone)
        await self._listen()

    async def _make_backend(self) -> Backend:
        if self.config.backend == "ray":
            from edge_server.backends.ray_serve import RayBackend

            backend = RayBackend(self.config.batch, self.config.tail, self.config.ray, time.monotonic_ns)
            await backend.start()
            return backend
        from edge_server.backends.embedded import EmbeddedBackend

        return EmbeddedBackend(self.config.batch, self.config.tail, time.monotonic_ns)

    async def _listen(self) -> None:
        assert self._ingress is not None  # noqa: S101 - start() made it
        limits, on_refused = self.config.limits, self._metrics.on_refused
        self.gate = Gate(limits, self._anyone, on_refused)
        interceptors: list[grpc.aio.ServerInterceptor] = [self.gate]  # type: ignore[type-arg]
        if self.config.security.token_file is not None:
            tokens = Tokens(self.config.security, max_unary=limits.max_unary_in_flight)
            interceptors.insert(0, TokenInterceptor(tokens, on_refused))
            self._spawn(_refresh(tokens))
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

    # ------------------------------------------------------------ running

    async def run(self) -> None:
        """Serves until `stop`, SIGTERM or SIGINT, or until the parent process is gone; then drains."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        if self.config.parent_pid is not None:
            self._spawn(self._watch_parent(self.config.parent_pid))
        await self._stopping.wait()
        await self.drain()

    def stop(self) -> None:
        """Begins the end; a second time ends at once."""
        if self._stopping.is_set():
            log.warning("stopping at once")
            os._exit(130)
        self._stopping.set()

    def reload(self) -> None:
        """Reads the bundles from disk again, in the background."""
        if self._ingress is not None:
            self._spawn(self._ingress.reload())

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
        """Frees what the server holds, without waiting for sessions."""
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
            self.config.port_file.unlink(missing_ok=True)
        log.info("stopped")

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_parent(self, pid: int) -> None:
        first = os.getppid()
        while os.getppid() == first and _alive(pid):
            await asyncio.sleep(_POLL_S)
        log.info("process %d, which started this server, is gone", pid)
        self._stopping.set()


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
    ca = _pem(security.tls_client_ca) if security.tls_client_ca else None
    pair = (_pem(security.tls_key), _pem(security.tls_cert))
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def _pem(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{path} is no PEM file")
    return data


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
