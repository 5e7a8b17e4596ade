"""Boxes as numpy arrays: overlap, suppression, and the letterbox that maps photos into a detector's input and back.

Shape legend: K boxes; a box is (x1, y1, x2, y2) in pixels; images are (H, W, 3) uint8.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]


class Detections(NamedTuple):
    """What a detector found in one image.

    Attributes:
        boxes_px: (K, 4) corners in pixels.
        scores: (K,) in 0..1, highest first.
        class_ids: (K,) COCO category ids.
    """

    boxes_px: Floats
    scores: Floats
    class_ids: Ints


def empty_detections() -> Detections:
    """No detections, with the right shapes and types."""
    return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def iou_matrix(a: Floats, b: Floats) -> Floats:
    """Intersection over union of every box of ``a`` (K, 4) with every one of ``b`` (L, 4), as (K, L)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=2)
    area_a = np.prod(a[:, 2:] - a[:, :2], axis=1)
    area_b = np.prod(b[:, 2:] - b[:, :2], axis=1)
    return np.asarray(overlap / np.maximum(area_a[:, None] + area_b[None] - overlap, 1e-6), np.float32)


def nms(boxes_px: Floats, scores: Floats, class_ids: Ints, *, iou: float = 0.6, keep: int = 100) -> Ints:
    """Indices that survive greedy suppression within each class, best score first, at most ``keep``."""
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    # Boxes of different classes are moved apart, so that one pass serves all classes.
    span = float(boxes_px.max(initial=0.0)) - float(boxes_px.min(initial=0.0)) + 1.0
    moved = boxes_px + (class_ids[:, None] * span).astype(np.float32)
    while order.size and len(kept) < keep:
        best = order[0]
        kept.append(int(best))
        order = order[1:][iou_matrix(moved[best : best + 1], moved[order[1:]])[0] <= iou]
    return np.asarray(kept, np.int64)


def select(
    boxes_px: Floats, scores: Floats, category_ids: Ints, *, score_min: float, iou: float, keep: int = 100, candidates: int = 1000
) -> Detections:
    """Detections from dense class scores.

    Args:
        boxes_px: (P, 4) box of every position.
        scores: (P, classes) scores in 0..1.
        category_ids: (classes,) the COCO category id of each column.
        score_min: positions below are ignored.
        iou: overlap above which the lesser box of the same class goes.
        keep: detections at most.
        candidates: boxes at most that enter the suppression.
    """
    rows, columns = np.nonzero(scores > score_min)
    values = scores[rows, columns]
    if values.size > candidates:
        top = np.argpartition(-values, candidates)[:candidates]
        rows, columns, values = rows[top], columns[top], values[top]
    found, classes = boxes_px[rows], category_ids[columns]
    index = nms(found, values, classes, iou=iou, keep=keep)
    return Detections(found[index], values[index].astype(np.float32), classes[index])


def read_rgb(path: Path) -> Pixels:
    """A photo as (H, W, 3) uint8 RGB.

    Raises:
        SourceError: the file is absent or no picture.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise SourceError(f"{path} is no picture that can be read")
    return image.astype(np.uint8, copy=False)


def letterbox(image: Pixels, size_px: int, pad: int = 114) -> tuple[Pixels, float]:
    """Scales ``image`` to fit a square, top left, the rest filled with ``pad``.

    Returns:
        The (size, size, 3) picture and the factor from source to square pixels.
    """
    height, width = image.shape[:2]
    scale = min(size_px / height, size_px / width)
    fitted = (max(1, min(size_px, round(width * scale))), max(1, min(size_px, round(height * scale))))
    square = np.full((size_px, size_px, 3), pad, np.uint8)
    square[: fitted[1], : fitted[0]] = cv2.resize(image, fitted, interpolation=cv2.INTER_LINEAR)
    return square, scale


def to_source(found: Detections, scale: float, height: int, width: int) -> Detections:
    """Boxes of a letterboxed square as source-image pixels, clipped to the image."""
    limits = np.asarray([width, height, width, height], np.float32)
    return found._replace(boxes_px=np.clip(found.boxes_px / np.float32(scale), 0, limits))
