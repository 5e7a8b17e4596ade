"""What a line of ``results.jsonl`` says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edge_client.frames import NS_PER_MS, Age, FrameReport
from protos.messages import Answer
from splitters.tasks.base import task_of


def to_line(report: FrameReport, labels: Mapping[int, str]) -> str:
    """A line of ``results.jsonl``, its end included."""
    return json.dumps(to_json(report, labels), separators=(",", ":")) + "\n"


def to_json(report: FrameReport, labels: Mapping[int, str]) -> dict[str, Any]:
    """What a line of ``results.jsonl`` says."""
    frame = report.frame
    line: dict[str, Any] = {
        "frame": frame.index,
        "camera": frame.camera or None,
        "source": frame.source or None,
        "captured_ns": frame.captured_ns,
        "captured_unix_ns": frame.captured_unix_ns,
        "model": report.model,
        "bundle_sha256": report.bundle_sha256,
        "outcome": report.outcome.value,
        "reason": report.reason or None,
        "operating_point": report.operating_point,
        "payload_bytes": report.payload_bytes,
        "latency_ms": {name: round(ms, 3) for name, ms in report.stages_ms.items()},
    }
    if frame.position_ns is not None:
        line["position_ms"] = round(frame.position_ns / NS_PER_MS, 3)
    if report.detail:
        line["detail"] = report.detail
    return line | _answer(report.answer, labels, report.age)


def _answer(answer: Answer | None, labels: Mapping[int, str], age: Age | None) -> dict[str, Any]:
    if answer is None:
        return {}
    fields = task_of(answer).to_json(answer, labels)
    if age is not None:  # only boxes are tracked
        for box in fields.get("detections", []):
            box |= {"age_frames": age.frames, "age_ms": round(age.ms, 1)}
    return fields
