"""A frame that an answer is drawn on: lines of text at its top, boxes whose labels do not cover one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from protos.text import printable
from splitters.tasks.preprocess import Frame

MIN_WIDTH_PX = 640
_MAX_HEIGHT_PX = 1280  # that a small picture is enlarged to: a picture of 3 x 9000 px is not
_PALETTE = 37
_BLACK, WHITE = (0, 0, 0), (255, 255, 255)
_DARK = 120  # a ground of less luminance needs white letters
_LABEL_CHARS = 40

Colour = tuple[int, int, int]
Area = tuple[int, int, int, int]
"""Left, top, right, bottom."""


def label_of(class_id: int, labels: Mapping[int, str]) -> str:
    """A class's name, or its number where it has none."""
    return printable(labels.get(class_id) or f"class {class_id}", max_chars=_LABEL_CHARS)


class Canvas:
    """A copy of a frame; a small one is enlarged to 640 px width, so that the text can be read.

    Args:
        image: (H, W, 3) uint8 BGR.
        note: said behind every box's label, e.g. how old it is.
        thin: whether boxes are drawn with thin lines.

    Attributes:
        picture: what is drawn on.
        scale: from the frame's pixels to the picture's.
    """

    def __init__(self, image: Frame, *, note: str = "", thin: bool = False) -> None:
        height, width = image.shape[:2]
        self.scale = max(1.0, min(MIN_WIDTH_PX / width, _MAX_HEIGHT_PX / height))
        enlarged = cv2.resize(image, None, fx=self.scale, fy=self.scale).astype(np.uint8) if self.scale > 1 else image.copy()
        self.picture: Frame = enlarged
        self._note, self._thin = note, thin
        self._size = max(0.5, min(self.picture.shape[:2]) / 900)
        self._lines: list[tuple[str, tuple[int, int], Colour]] = []
        self._taken: list[Area] = []
        self._y = 0

    def line(self, text: str, colour: Colour = WHITE) -> None:
        """A line of text below the last one; drawn by `finish`, over everything."""
        width, height = _text_size(text, self._size)
        self._lines.append((text, (0, self._y), colour))
        self._taken.append((0, self._y, width, self._y + height))
        self._y += height

    def boxes(self, boxes: Sequence[tuple[tuple[float, ...], str, int]]) -> None:
        """All rectangles, then their labels, none over another: the surest chooses its place first.

        Args:
            boxes: the surest first: xyxy in the frame's pixels, label, and a number that gives the colour.
        """
        thickness = 1 if self._thin else max(2, round(3 * self._size))
        placed = []
        for box_px, label, number in boxes:
            corners = _inside(tuple(v * self.scale for v in box_px), self.picture)
            text = label + self._note
            area = _place(corners, _text_size(text, 0.8 * self._size), self.picture, self._taken)
            self._taken.append(area)
            placed.append((corners, text, area, class_colour(number)))
        for corners, _, _, colour in reversed(placed):
            cv2.rectangle(self.picture, corners[:2], corners[2:], colour, thickness)
        for corners, text, area, colour in reversed(placed):
            if area[1] > corners[3] or area[3] < corners[1]:  # the label had to move away: a line says whose it is
                start = (max(corners[0], area[0]), corners[1])
                cv2.line(self.picture, start, (area[0], area[1]), colour, 1, cv2.LINE_AA)
            _label(self.picture, text, area[:2], 0.8 * self._size, _readable_on(colour), colour)

    def finish(self) -> Frame:
        """The picture, its lines of text drawn."""
        for text, corner, colour in self._lines:
            _label(self.picture, text, corner, self._size, colour, _BLACK)
        return self.picture


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


def class_colour(class_id: int) -> Colour:
    """A colour of its own for each class."""
    hue = np.uint8([[[class_id * _PALETTE % 180, 200, 255]]])  # type: ignore[arg-type]
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()  # type: ignore[call-overload]
    return int(blue), int(green), int(red)


def _readable_on(ground: Colour) -> Colour:
    blue, green, red = ground
    return _BLACK if 0.114 * blue + 0.587 * green + 0.299 * red > _DARK else WHITE


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
