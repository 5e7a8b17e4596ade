"""A captured frame as a trace: the device's stages, and the round trip, under which the server hangs its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_client.frames import NS_PER_MS, CapturedFrame, FrameReport, Outcome
from protos.tracing import Spans, traceparent, unix_ns

Traceparent = Callable[[CapturedFrame], str]
"""What travels with a frame that is sent now; empty where nothing is traced."""

DEVICE_STAGES = ("preprocess", "head", "prefilter", "codec")


def untraced(frame: CapturedFrame) -> str:
    """Without tracing."""
    del frame
    return ""


class Traces:
    """A sink that writes every frame's spans when its outcome is known.

    Args:
        spans: where to.
        now: the wall clock, ns.
    """

    def __init__(self, spans: Spans, *, now: Callable[[], int] = unix_ns) -> None:
        self._spans = spans
        self._now = now
        self._open: dict[int, tuple[Any, Any, int]] = {}  # frame → its span, its round trip's, when that began

    def sent(self, frame: CapturedFrame) -> str:
        """The round trip begins; what the server is told. A frame that is sent again begins another one."""
        now = self._now()
        root, trip, _ = self._open.get(frame.index, (None, None, 0))
        if root is None:
            root = self._begin(frame)
        if trip is not None:
            self._spans.finish(trip, now, {}, error="the stream broke")
        trip = self._spans.begin("round trip", now, parent=root, kind="CLIENT")
        self._open[frame.index] = (root, trip, now)
        return traceparent(trip)

    def _begin(self, frame: CapturedFrame) -> Any:
        return self._spans.begin("frame", frame.captured_unix_ns, kind="INTERNAL")

    def take(self, report: FrameReport) -> None:
        """See ``sinks.Sink``."""
        frame, total_ms = report.frame, report.stages_ms.get("total", 0.0)
        root, trip, sent_ns = self._open.pop(frame.index, (None, None, 0))
        root = root or self._begin(frame)
        end_ns = frame.captured_unix_ns + round(total_ms * NS_PER_MS)
        if root.is_recording():
            stages = {name: round(report.stages_ms.get(name, 0.0) * NS_PER_MS) for name in DEVICE_STAGES}
            capture_ns = round(report.stages_ms.get("capture", 0.0) * NS_PER_MS)
            self._spans.stages(root, {"capture": capture_ns}, frame.captured_unix_ns)
            # Of what was sent the end is known: the moment it was; the device's stages lie before it.
            self._spans.stages(root, stages, sent_ns - sum(stages.values()) if sent_ns else frame.captured_unix_ns + capture_ns)
            local_ns = round(report.stages_ms.get("local", 0.0) * NS_PER_MS)
            self._spans.stages(root, {"local": local_ns}, end_ns - local_ns)
        if trip is not None:
            answered = report.outcome is Outcome.RESULT
            self._spans.finish(
                trip, end_ns, {"headtail.payload_bytes": report.payload_bytes}, error="" if answered else "no answer"
            )
        attributes: dict[str, str | int] = {
            "headtail.frame": frame.index, "headtail.outcome": report.outcome.value, "headtail.model": report.model,
            "headtail.bundle_sha256": report.bundle_sha256,
        }  # fmt: skip
        if report.reason:
            attributes["headtail.reason"] = report.reason
        if report.operating_point is not None:
            attributes["headtail.operating_point"] = report.operating_point
        lost = report.outcome in (Outcome.DROPPED, Outcome.EXPIRED)
        self._spans.finish(root, end_ns, attributes, error=f"{report.outcome.value} {report.reason}".strip() if lost else "")

    def close(self) -> None:
        """See ``sinks.Sink``."""
        self._spans.close()
