"""OpenTelemetry traces, for both sides: off unless asked for, and then nothing of OpenTelemetry is imported.

Asked for by an endpoint, or by the standard variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``…_TRACES_ENDPOINT``); the SDK reads the
others itself (``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``, ``OTEL_EXPORTER_OTLP_HEADERS``, …). A frame is one trace: the
device's stages, the round trip, and below it the server's. Stages were measured before their spans are written; wall-clock
times are for people and decide nothing.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from protos.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

LEFT_OUT: Final = "-"
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_FLUSH_MS = 2_000
_EXTRA = "traces need OpenTelemetry: pip install 'headtail[otel]'"

Attributes = Mapping[str, str | int | float | bool]


def unix_ns() -> int:
    """The wall clock, for spans."""
    return time.time_ns()


def wanted(endpoint: str | None) -> bool:
    """Whether traces are asked for, by the option or by OpenTelemetry's own variables."""
    env = os.environ
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return False
    return bool(endpoint) or any(env.get(name) for name in _ENDPOINTS)


def open_spans(service: str, version: str, endpoint: str | None) -> Spans | None:
    """What spans go through; None where none are wanted.

    Args:
        service: its name, unless ``OTEL_SERVICE_NAME`` gives another.
        version: of this package.
        endpoint: an OTLP/gRPC collector, e.g. ``http://127.0.0.1:4317``; None: the variables say.

    Raises:
        ConfigError: the endpoint is no URL.
        MissingDependencyError: the option was given and the extra is not installed. Variables alone, which a cluster may set
            for everyone, are then only warned about.
    """
    if not wanted(endpoint):
        return None
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otel-endpoint must be a URL, for instance http://127.0.0.1:4317, got {endpoint!r}")
    try:
        return Spans(service, version, _exporter(endpoint))
    except ImportError as error:
        if endpoint:
            raise MissingDependencyError(_EXTRA) from error
        log.warning("OTEL_* variables ask for traces, but %s", _EXTRA)
        return None


def _exporter(endpoint: str | None) -> SpanExporter:
    if not endpoint and os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc").startswith("http"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import-not-found]  # not of our extra
            OTLPSpanExporter as HttpExporter,
        )

        return HttpExporter()  # type: ignore[no-any-return]
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint)


class Spans:
    """The SDK, as much of it as is used here.

    Args:
        service: `service.name`.
        version: `service.version`.
        exporter: where finished spans go, in batches from a thread of its own.
        at_once: without batches; for tests.
    """

    def __init__(self, service: str, version: str, exporter: SpanExporter, *, at_once: bool = False) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        self._api = trace
        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
        self._provider = TracerProvider(resource=Resource.create({**name, "service.version": version}), shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(exporter) if at_once else BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headtail", version)

    def begin(self, name: str, start_unix_ns: int, *, parent: Span | str | None = None, kind: str = "INTERNAL") -> Any:
        """Starts a span.

        Args:
            name: of the span.
            start_unix_ns: when what it stands for began.
            parent: a span of ours, or a traceparent from the wire; anything else begins a trace.
            kind: of OpenTelemetry's kinds.
        """
        above = self._remote(parent) if isinstance(parent, str) else parent
        context = self._api.set_span_in_context(above) if above is not None else None
        return self._tracer.start_span(name, context=context, start_time=start_unix_ns, kind=self._api.SpanKind[kind])

    def _remote(self, traceparent: str) -> Any:
        match = _TRACEPARENT.fullmatch(traceparent)
        if match is None:
            return None
        trace_id, span_id, flags = (int(group, 16) for group in match.groups())
        context = self._api.SpanContext(trace_id, span_id, is_remote=True, trace_flags=self._api.TraceFlags(flags))
        return self._api.NonRecordingSpan(context) if context.is_valid else None

    def finish(self, span: Any, end_unix_ns: int, attributes: Attributes, *, error: str = "") -> None:
        """Ends a span; ``error`` says what went wrong with it."""
        span.set_attributes(attributes)
        if error:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR, error))
        span.end(end_time=end_unix_ns)

    def stages(self, parent: Any, stages_ns: Mapping[str, int], start_unix_ns: int) -> None:
        """Measured stages as children, one after the other from ``start_unix_ns`` on; those of no length are left out."""
        if not parent.is_recording():
            return
        for name, length_ns in stages_ns.items():
            if length_ns > 0:
                self.begin(name, start_unix_ns, parent=parent).end(end_time=start_unix_ns + length_ns)
                start_unix_ns += length_ns

    def close(self) -> None:
        """Sends what is left, for at most two seconds: a collector that does not answer must not delay the end."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


def traceparent(span: Any) -> str:
    """A span's place as it travels: a W3C traceparent, or ``-`` where it is not recorded."""
    if not span.is_recording():
        return LEFT_OUT
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
