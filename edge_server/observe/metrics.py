"""What the server counts. Prometheus where prometheus-client is installed and asked for, nothing otherwise."""

from __future__ import annotations

from typing import Any, Protocol

from protos.errors import ConfigError, MissingDependencyError
from protos.messages import Result

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics(Protocol):
    """Events worth counting; every method returns at once."""

    def on_session(self, model: str, change: int) -> None:
        """A session opened (+1) or closed (-1)."""

    def on_result(self, model: str, result: Result, payload_bytes: int) -> None:
        """A frame was answered."""

    def on_grant(self) -> None:
        """A session was told what it may send."""

    def on_refused(self, reason: str) -> None:
        """A call was ended with an error."""


class NoMetrics:
    """Counts nothing."""

    def on_session(self, model: str, change: int) -> None:
        """See `Metrics`."""

    def on_result(self, model: str, result: Result, payload_bytes: int) -> None:
        """See `Metrics`."""

    def on_grant(self) -> None:
        """See `Metrics`."""

    def on_refused(self, reason: str) -> None:
        """See `Metrics`."""


class PrometheusMetrics:
    """Counters and histograms by Prometheus's naming conventions, in a registry of their own.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            import prometheus_client as prom
        except ImportError as error:
            raise MissingDependencyError("--metrics-port needs prometheus-client: pip install 'headtail[server]'") from error
        self._prom = prom
        self.registry = prom.CollectorRegistry()
        self._sessions = prom.Gauge("headtail_sessions", "Open sessions", ["model"], registry=self.registry)
        self._frames = prom.Counter("headtail_frames", "Frames answered, by outcome", ["model", "outcome"], registry=self.registry)
        self._bytes = prom.Counter("headtail_payload_bytes", "Payload bytes of answered frames", ["model"], registry=self.registry)
        self._stages = prom.Histogram(
            "headtail_stage_seconds",
            "Server time of a frame, by stage",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batches = prom.Histogram(
            "headtail_batch_size", "Frames in the batch a frame was in", ["model"], buckets=_SIZES, registry=self.registry
        )
        self._grants = prom.Counter("headtail_grants", "Grants sent", registry=self.registry)
        self._refused = prom.Counter("headtail_refused_calls", "Calls ended with an error", ["code"], registry=self.registry)
        self._server: tuple[Any, Any] | None = None

    def serve(self, port: int) -> int:
        """Starts the HTTP endpoint on all interfaces; returns its port.

        Raises:
            ConfigError: the port is taken.
        """
        try:
            server, thread = self._prom.start_http_server(port, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"cannot listen on the metrics port {port}: {error.strerror}") from error
        self._server = (server, thread)
        return int(server.server_port)

    def close(self) -> None:
        """Ends the HTTP endpoint."""
        if self._server is not None:
            self._server[0].shutdown()
            self._server[0].server_close()
            self._server = None

    def on_session(self, model: str, change: int) -> None:
        """See `Metrics`."""
        self._sessions.labels(model).inc(change)

    def on_result(self, model: str, result: Result, payload_bytes: int) -> None:
        """See `Metrics`."""
        self._frames.labels(model, "result" if result.error is None else result.error.code).inc()
        self._bytes.labels(model).inc(payload_bytes)
        if result.error is not None:
            return
        t = result.timings
        for stage, value_ns in (("decode", t.decode_ns), ("queue", t.queue_ns), ("tail", t.tail_ns), ("total", t.total_ns)):
            self._stages.labels(model, stage).observe(value_ns / 1e9)
        self._batches.labels(model).observe(t.batch_size)

    def on_grant(self) -> None:
        """See `Metrics`."""
        self._grants.inc()

    def on_refused(self, reason: str) -> None:
        """See `Metrics`."""
        self._refused.labels(reason).inc()
