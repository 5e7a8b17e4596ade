"""Draws an answer on a frame: boxes, labels, the outcome and the bytes it cost."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from edge_client.frames import FrameReport, Outcome
from protos.messages import Classification, Detection
from splitters.tasks.preprocess import Frame

_COLOURS = {
    Outcome.RESULT: (80, 200, 80), Outcome.LOCAL: (60, 160, 250), Outcome.UNCHANGED: (200, 200, 120),
    Outcome.FILTERED: (160, 160, 160), Outcome.DROPPED: (60, 60, 220), Outcome.EXPIRED: (60, 60, 220),
}  # fmt: skip
_PALETTE = 37
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
MIN_WIDTH_PX = 640


def annotate(image: Frame, report: FrameReport, labels: Mapping[int, str]) -> Frame:
    """A copy of the frame with its answer drawn in; enlarged to at least 640 px width, so that the text can be read."""
    scale = max(1.0, MIN_WIDTH_PX / image.shape[1])
    picture: Frame = cv2.resize(image, None, fx=scale, fy=scale).astype(np.uint8) if scale > 1 else image.copy()
    size = max(0.5, min(picture.shape[:2]) / 900)
    lines = [(_status(report), _COLOURS[report.outcome])]
    if isinstance(report.answer, Detection):
        # The surest last, so that its label is not painted over.
        for box in reversed(report.answer.boxes):
            corners = tuple(round(v * scale) for v in box.box_px)
            text = f"{labels.get(box.class_id, box.class_id)} {box.score:.2f}"
            carried = report.age is not None and report.age.frames > 0
            if report.age is not None and carried:
                text += f", {report.age.ms:.0f} ms old"
            _draw_box(picture, corners, text, _class_colour(box.class_id), size, thin=carried)
    elif isinstance(report.answer, Classification):
        lines += [(f"{s.score:5.1%}  {labels.get(s.class_id, s.class_id)}", _WHITE) for s in report.answer.top[:3]]
    y = 0
    for text, colour in lines:
        y += _label(picture, text, (0, y), size, colour, _BLACK)
    return picture


def _draw_box(
    picture: Frame, corners: tuple[int, ...], text: str, colour: tuple[int, int, int], size: float, *, thin: bool = False
) -> None:
    x1, y1, x2, y2 = corners
    cv2.rectangle(picture, (x1, y1), (x2, y2), colour, 1 if thin else max(2, round(3 * size)))
    # Never under the status line.
    _label(picture, text, (x1, max(round(50 * size), y1 - round(30 * size))), 0.8 * size, _BLACK, colour)


def _status(report: FrameReport) -> str:
    text = report.outcome.value + (f" ({report.reason})" if report.reason else "")
    if report.payload_bytes:
        text += f"  {report.payload_bytes} B"
    text += f"  {report.stages_ms.get('total', 0):.0f} ms" + (f"  {report.detail}" if report.detail else "")
    return text + (f"  boxes {report.age.frames} frames old" if report.age is not None and report.age.frames else "")


def _class_colour(class_id: int) -> tuple[int, int, int]:
    hue = np.uint8([[[class_id * _PALETTE % 180, 200, 255]]])  # type: ignore[arg-type]
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()  # type: ignore[call-overload]
    return int(blue), int(green), int(red)


def _label(
    picture: Frame, text: str, corner: tuple[int, int], size: float, colour: tuple[int, int, int], ground: tuple[int, int, int]
) -> int:
    """Draws text on a filled bar whose top left is ``corner``; returns the bar's height in pixels."""
    thickness = max(1, round(1.6 * size))
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, thickness)
    pad = round(6 * size)
    x, y = corner
    bottom = y + height + below + 2 * pad
    area = picture[max(0, y) : bottom, max(0, x) : x + width + 2 * pad]
    area[:] = (0.3 * area + 0.7 * np.asarray(ground)).astype(np.uint8)
    cv2.putText(picture, text, (x + pad, y + height + pad), cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA)
    return bottom - y
