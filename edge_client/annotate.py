"""Draws an answer on a frame: boxes, labels, the outcome and the bytes it cost."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from edge_client.frames import FrameReport, Outcome
from protos.messages import Classification, Detection
from splitters.preprocess import Frame

_COLOURS = {
    Outcome.RESULT: (80, 200, 80), Outcome.LOCAL: (60, 160, 250), Outcome.UNCHANGED: (200, 200, 120),
    Outcome.FILTERED: (160, 160, 160), Outcome.DROPPED: (60, 60, 220), Outcome.EXPIRED: (60, 60, 220),
}  # fmt: skip
_PALETTE = 37


def annotate(image: Frame, report: FrameReport, labels: Mapping[int, str]) -> Frame:
    """A copy of the frame with its answer drawn in; at least 320 px wide, so that the text can be read."""
    scale = max(1.0, 320 / image.shape[1])
    picture: Frame = cv2.resize(image, None, fx=scale, fy=scale).astype(np.uint8) if scale > 1 else image.copy()
    size = max(0.4, min(picture.shape[:2]) / 900)
    lines = [_status(report)]
    if isinstance(report.answer, Detection):
        for box in report.answer.boxes:
            x1, y1, x2, y2 = (round(v * scale) for v in box.box_px)
            colour = _class_colour(box.class_id)
            cv2.rectangle(picture, (x1, y1), (x2, y2), colour, max(1, round(2 * size)))
            _text(picture, f"{labels.get(box.class_id, str(box.class_id))} {box.score:.2f}", (x1, max(y1, 12)), size, colour)
    elif isinstance(report.answer, Classification):
        lines += [f"{s.score:5.1%} {labels.get(s.class_id, str(s.class_id))}" for s in report.answer.top[:3]]
    height = round(34 * size)
    for row, line in enumerate(lines):
        _text(picture, line, (4, (row + 1) * height), size, _COLOURS[report.outcome] if row == 0 else (255, 255, 255))
    return picture


def _status(report: FrameReport) -> str:
    text = report.outcome.value + (f" ({report.reason})" if report.reason else "")
    if report.payload_bytes:
        text += f"  {report.payload_bytes} B"
    return f"{text}  {report.stages_ms.get('total', 0):.0f} ms" + (f"  {report.detail}" if report.detail else "")


def _class_colour(class_id: int) -> tuple[int, int, int]:
    hue = np.uint8([[[class_id * _PALETTE % 180, 200, 255]]])  # type: ignore[arg-type]
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()  # type: ignore[call-overload]
    return int(blue), int(green), int(red)


def _text(picture: Frame, text: str, origin: tuple[int, int], size: float, colour: tuple[int, int, int]) -> None:
    thickness = max(1, round(2 * size))
    cv2.putText(picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, size, (0, 0, 0), thickness + 2, cv2.LINE_AA)
    cv2.putText(picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA)
