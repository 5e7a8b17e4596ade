"""Draws an answer on a frame: boxes, labels, the outcome and the bytes it cost."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

from edge_client.frames import FrameReport, Outcome
from edge_client.told import label_of
from protos.messages import Classification, Detection
from splitters.tasks.preprocess import Frame

_COLOURS = {
    Outcome.RESULT: (80, 200, 80), Outcome.LOCAL: (60, 160, 250), Outcome.UNCHANGED: (200, 200, 120),
    Outcome.FILTERED: (160, 160, 160), Outcome.DROPPED: (60, 60, 220), Outcome.EXPIRED: (60, 60, 220),
}  # fmt: skip
_PALETTE = 37
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_DARK = 120  # a ground of less luminance needs white letters
MIN_WIDTH_PX = 640
_MAX_HEIGHT_PX = 1280  # that a small picture is enlarged to: a picture of 3 x 9000 px is not

Colour = tuple[int, int, int]
Area = tuple[int, int, int, int]
"""Left, top, right, bottom."""


def annotate(image: Frame, report: FrameReport, labels: Mapping[int, str]) -> Frame:
    """A copy of the frame with its answer drawn in; a small one is enlarged to 640 px width, so that the text can be read."""
    height, width = image.shape[:2]
    scale = max(1.0, min(MIN_WIDTH_PX / width, _MAX_HEIGHT_PX / height))
    picture: Frame = cv2.resize(image, None, fx=scale, fy=scale).astype(np.uint8) if scale > 1 else image.copy()
    size = max(0.5, min(picture.shape[:2]) / 900)
    lines = [(_status(report), _COLOURS[report.outcome])]
    if isinstance(report.answer, Classification):
        lines += [(f"{s.score:5.1%}  {label_of(s.class_id, labels)}", _WHITE) for s in report.answer.top[:3]]
    taken: list[Area] = []
    y = 0
    texts = []
    for text, colour in lines:
        text_size = _text_size(text, size)
        texts.append((text, (0, y), colour))
        taken.append((0, y, text_size[0], y + text_size[1]))
        y += text_size[1]
    if isinstance(report.answer, Detection):
        _draw_boxes(picture, report, labels, (scale, size), taken)
    for text, corner, colour in texts:
        _label(picture, text, corner, size, colour, _BLACK)
    return picture


def _draw_boxes(
    picture: Frame, report: FrameReport, labels: Mapping[int, str], sizes: tuple[float, float], taken: list[Area]
) -> None:
    """All rectangles, then their labels, none over another: the surest chooses its place first."""
    assert isinstance(report.answer, Detection)  # noqa: S101 - the caller looked
    scale, size = sizes
    carried = report.age is not None and report.age.frames > 0
    thickness = 1 if carried else max(2, round(3 * size))
    placed = []
    for box in report.answer.boxes:
        corners = _inside(tuple(v * scale for v in box.box_px), picture)
        text = f"{label_of(box.class_id, labels)} {box.score:.2f}"
        if report.age is not None and carried:
            text += f", {report.age.ms:.0f} ms old"
        area = _place(corners, _text_size(text, 0.8 * size), picture, taken)
        taken.append(area)
        placed.append((corners, text, area, _class_colour(box.class_id)))
    for corners, _, _, colour in reversed(placed):
        cv2.rectangle(picture, corners[:2], corners[2:], colour, thickness)
    for corners, text, area, colour in reversed(placed):
        if area[1] > corners[3] or area[3] < corners[1]:  # the label had to move away: a line says whose it is
            cv2.line(picture, (max(corners[0], area[0]), corners[1]), (area[0], area[1]), colour, 1, cv2.LINE_AA)
        _label(picture, text, area[:2], 0.8 * size, _readable_on(colour), colour)


def _inside(corners: tuple[float, ...], picture: Frame) -> Area:
    """A box as drawing coordinates, however far outside of the picture it reaches."""
    height, width = picture.shape[:2]
    x1, y1, x2, y2 = (min(max(v, -1.0), limit) for v, limit in zip(corners, (width, height, width, height), strict=True))
    return round(x1), round(y1), round(x2), round(y2)


def _place(box: Area, text_px: tuple[int, int], picture: Frame, taken: list[Area]) -> Area:
    """Where a box's label goes: at its top left, or at the nearest place where no other label stands."""
    width, height = text_px
    x1, y1, x2, y2 = box
    right, bottom = max(0, picture.shape[1] - width), max(0, picture.shape[0] - height)
    corners = [(x1, y1 - height), (x1, y1), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2), (x1, y2 - height), (x2, y1)]
    corners += [(x1, y1 + n * height) for n in range(1, 1 + picture.shape[0] // height)]
    corners += [(x1, y1 - n * height) for n in range(2, 2 + picture.shape[0] // height)]
    areas = []
    for x, y in corners:
        left, top = min(max(x, 0), right), min(max(y, 0), bottom)
        areas.append((left, top, left + width, top + height))
    return min(areas, key=lambda area: sum(_overlap(area, other) for other in taken))


def _overlap(a: Area, b: Area) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _status(report: FrameReport) -> str:
    text = report.outcome.value + (f" ({report.reason})" if report.reason else "")
    if report.payload_bytes:
        text += f"  {report.payload_bytes} B"
    text += f"  {report.stages_ms.get('total', 0):.0f} ms" + (f"  {report.detail}" if report.detail else "")
    return text + (f"  boxes {report.age.frames} frames old" if report.age is not None and report.age.frames else "")


def _class_colour(class_id: int) -> Colour:
    hue = np.uint8([[[class_id * _PALETTE % 180, 200, 255]]])  # type: ignore[arg-type]
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()  # type: ignore[call-overload]
    return int(blue), int(green), int(red)


def _readable_on(ground: Colour) -> Colour:
    blue, green, red = ground
    return _BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > _DARK else _WHITE


def _measure(text: str, size: float) -> tuple[int, int, int, int]:
    """Width, height above and below the base line, and the room around, in pixels."""
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, _thickness(size))
    return width, height, below, round(6 * size)


def _thickness(size: float) -> int:
    return max(1, round(1.6 * size))


def _text_size(text: str, size: float) -> tuple[int, int]:
    """Width and height of a label, its ground included."""
    width, height, below, pad = _measure(text, size)
    return width + 2 * pad, height + below + 2 * pad


def _label(picture: Frame, text: str, corner: tuple[int, int], size: float, colour: Colour, ground: Colour) -> None:
    """Draws text on a filled bar whose top left is ``corner``."""
    width, height, below, pad = _measure(text, size)
    x, y = corner
    area = picture[max(0, y) : y + height + below + 2 * pad, max(0, x) : x + width + 2 * pad]
    area[:] = (0.3 * area + 0.7 * np.asarray(ground)).astype(np.uint8)
    cv2.putText(picture, text, (x + pad, y + height + pad), cv2.FONT_HERSHEY_SIMPLEX, size, colour, _thickness(size), cv2.LINE_AA)
