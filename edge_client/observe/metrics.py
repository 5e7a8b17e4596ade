"""What the device counts, for Prometheus: a sink, and a small HTTP endpoint. Off unless ``--metrics-listen`` asks for it."""

from __future__ import annotations

from typing import Any, Protocol

from edge_client.frames import FrameReport, Outcome
from protos.errors import ConfigError, MissingDependencyError

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Connection(Protocol):
    """What is asked of the session at every scrape."""

    up: bool
    reconnects: int


class Metrics:
    """Counters and histograms by Prometheus's naming conventions, in a registry of their own.

    Args:
        connection: the session.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self, connection: Connection) -> None:
        try:
            import prometheus_client as prom
        except ImportError as error:
            raise MissingDependencyError("--metrics-listen needs prometheus-client: pip install 'headtail[metrics]'") from error
        self._prom = prom
        self.registry = registry = prom.CollectorRegistry()
        self._frames = prom.Counter(
            "headtail_client_frames", "Captured frames, by outcome", ["model", "outcome", "reason"], registry=registry
        )
        self._bytes = prom.Counter("headtail_client_payload_bytes", "Payload bytes sent", ["model"], registry=registry)
        self._stages = prom.Histogram(
            "headtail_client_stage_seconds",
            "Time of answered frames, by stage",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        up = prom.Gauge("headtail_client_connected", "Whether a session stands", registry=registry)
        up.set_function(lambda: float(connection.up))
        back = prom.Gauge("headtail_client_reconnects", "Sessions after the first, since the start", registry=registry)
        back.set_function(lambda: float(connection.reconnects))
        self._server: Any = None

    def serve(self, host: str, port: int) -> int:
        """Starts the HTTP endpoint; returns its port.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        try:
            self._server, _ = self._prom.start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise ConfigError(f"--metrics-listen {host}:{port}: cannot listen there: {error.strerror or error}") from error
        return int(self._server.server_port)

    def take(self, report: FrameReport) -> None:
        """See ``sinks.Sink``."""
        self._frames.labels(report.model, report.outcome.value, report.reason).inc()
        self._bytes.labels(report.model).inc(report.payload_bytes)
        if report.outcome in (Outcome.RESULT, Outcome.LOCAL):
            for stage, ms in report.stages_ms.items():
                self._stages.labels(report.model, stage).observe(ms / 1e3)

    def close(self) -> None:
        """See ``sinks.Sink``; ends the endpoint."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
