"""The server's part of a frame's trace: decode, queue and tail, under the round trip the device named."""

from __future__ import annotations

from typing import Protocol

from protos.messages import Result
from protos.tracing import LEFT_OUT, Spans, unix_ns


class Tracing(Protocol):
    """Told of every answered frame; returns at once."""

    def on_result(self, model: str, traceparent: str, result: Result) -> None:
        """A frame was answered; ``traceparent`` is what came with it."""


class NoTracing:
    """Writes nothing."""

    def on_result(self, model: str, traceparent: str, result: Result) -> None:
        """See `Tracing`."""


class Traces:
    """Writes spans. A frame whose device does not trace is a trace of its own, if the sampler says so."""

    def __init__(self, spans: Spans) -> None:
        self._spans = spans

    def on_result(self, model: str, traceparent: str, result: Result) -> None:
        """See `Tracing`."""
        if traceparent == LEFT_OUT:
            return
        t, end_ns = result.timings, unix_ns()
        start_ns = end_ns - t.total_ns
        span = self._spans.begin("answer", start_ns, parent=traceparent, kind="SERVER")
        if not span.is_recording():
            return
        self._spans.stages(span, {"decode": t.decode_ns, "queue": t.queue_ns, "tail": t.tail_ns}, start_ns)
        error = result.error
        attributes: dict[str, str | int] = {
            "headtail.frame_id": result.frame_id, "headtail.model": model, "headtail.batch_size": t.batch_size,
            "headtail.outcome": "result" if error is None else error.code,
        }  # fmt: skip
        self._spans.finish(span, end_ns, attributes, error="" if error is None else error.message)

    def close(self) -> None:
        """Sends what is left."""
        self._spans.close()
