"""Boxes as numpy arrays: overlap, suppression, and the letterbox that maps photos into a detector's input and back.

Shape legend: K boxes; a box is (x1, y1, x2, y2) in pixels; images are (H, W, 3) uint8.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    if not scores.size:
        return np.zeros(0, np.int64)
    corners = boxes_px - min(0.0, float(boxes_px.min()))  # OpenCV moves classes apart by the largest coordinate
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float64)
    kept = cv2.dnn.NMSBoxesBatched(xywh.tolist(), scores.astype(float).tolist(), class_ids.tolist(), 0.0, iou)
    order = np.asarray(kept, np.int64).ravel()
    return order[np.argsort(-scores[order], kind="stable")][:keep]


def yolox_boxes(raw: Floats, size_px: tuple[int, int], strides: Sequence[int] = (8, 16, 32)) -> tuple[Floats, Floats]:
    """YOLOX's raw output, sigmoids applied, grids not (Ge et al. 2021, arXiv 2107.08430), as corner boxes and class scores.

    Args:
        raw: (..., P, 5 + classes).
        size_px: (height, width) of the input.
        strides: of the grids, in the order of the positions.

    Returns:
        Boxes (..., P, 4) in input pixels and scores (..., P, classes): objectness times class.
    """
    cells, scale = [], []
    for stride in strides:
        y, x = np.mgrid[: size_px[0] // stride, : size_px[1] // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        scale.append(np.full((x.size, 1), stride))
    grid, stride_of = np.concatenate(cells).astype(np.float32), np.concatenate(scale).astype(np.float32)
    centre = (raw[..., :2] + grid) * stride_of
    half = np.exp(raw[..., 2:4]) * stride_of / 2
    return np.concatenate([centre - half, centre + half], axis=-1).astype(np.float32), raw[..., 4:5] * raw[..., 5:]


def rotated_nms(boxes_px: Floats, angles: Floats, scores: Floats, class_ids: Ints, *, iou: float, keep: int) -> Ints:
    """As `nms`, of boxes turned about their centres by ``angles`` (K,) in radians."""
    kept: list[int] = []
    for kind in np.unique(class_ids):
        rows = np.flatnonzero(class_ids == kind)
        low, high = boxes_px[rows, :2], boxes_px[rows, 2:]
        turned = [
            (tuple(c), tuple(s), float(a))
            for c, s, a in zip(((low + high) / 2).tolist(), (high - low).tolist(), np.degrees(angles[rows]).tolist(), strict=True)
        ]
        found = cv2.dnn.NMSBoxesRotated(turned, scores[rows].astype(float).tolist(), 0.0, iou) if turned else []
        kept += [int(rows[i]) for i in np.asarray(found, np.int64).ravel()]
    order = np.asarray(kept, np.int64)
    return order[np.argsort(-scores[order], kind="stable")][:keep]


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
