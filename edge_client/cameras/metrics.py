"""Every camera's metrics behind one address: the same families as of a single camera, with the label ``camera``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edge_client.observe.metrics import Connection, Metrics
from protos.errors import ConfigError


class CamerasMetrics:
    """One endpoint.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        self._cameras: dict[str, Metrics] = {}
        self._server: Any = None

    def camera(self, name: str, connection: Connection) -> Metrics:
        """A camera's own counters; those of its last run are forgotten, as with a process that began again."""
        self._cameras[name] = Metrics(connection)
        return self._cameras[name]

    def collect(self) -> Iterator[Any]:
        """Prometheus asks: each family once, with the samples of all cameras."""
        from prometheus_client import Metric

        families: dict[str, Metric] = {}
        for name, metrics in self._cameras.items():
            for found in metrics.registry.collect():
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, {"camera": name, **sample.labels}, sample.value, sample.timestamp)
        yield from families.values()

    def serve(self, host: str, port: int) -> int:
        """Starts the endpoint; its port.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        import prometheus_client as prom

        registry = prom.CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = prom.start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(f"--metrics-listen {host}:{port}: cannot listen there: {error.strerror or error}") from error
        return int(self._server.server_port)

    def close(self) -> None:
        """Ends it."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
