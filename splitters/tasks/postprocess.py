"""From a model's raw outputs to answers in source-frame pixels: numpy and OpenCV only, shared by device and server.

Shape legend: N batch, P positions or candidate boxes, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError
from protos.messages import Answer, Box, Classification, ClassScore, Detection
from splitters.bundle.manifest import Preprocess
from splitters.tasks.preprocess import geometry

Floats = NDArray[np.float32]
SizePx = tuple[int, int]

TOP = 5
MAX_CANDIDATES = 1000


class Postprocess(Protocol):
    """Turns a batch of raw outputs into one answer per frame."""

    def __call__(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """Args: the model's outputs, batch first; (width, height) of each source frame."""
        ...


class Softmax:
    """Logits (N, C) to the five most probable classes."""

    def __call__(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See ``Postprocess``."""
        logits = outputs[0].astype(np.float64)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        return [_top(row) for row in probabilities[: len(sizes_px)]]


def _top(probabilities: NDArray[np.float64]) -> Classification:
    count = min(TOP, probabilities.size)
    best = np.argsort(-probabilities, kind="stable")[:count]
    return Classification(top=tuple(ClassScore(class_id=int(i), score=float(probabilities[i])) for i in best))


class DenseBoxes:
    """Boxes (N, P, 4) xyxy in input pixels and scores (N, P, C) to detections after non-maximum suppression.

    Args:
        spec: the bundle's ``postprocess``: ``class_ids`` (C,) the id of each score column, ``score_min``, ``iou``, ``keep``.
        preprocess: maps boxes back to the source frame.
    """

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess) -> None:
        self._ids = np.asarray(spec["class_ids"], np.int64)
        self._score_min = float(spec.get("score_min", 0.05))
        self._iou = float(spec.get("iou", 0.65))
        self._keep = int(spec.get("keep", 100))
        self._preprocess = preprocess

    def decode(self, outputs: Sequence[Floats]) -> tuple[Floats, Floats]:
        """The raw outputs as boxes (N, P, 4) and scores (N, P, C)."""
        return outputs[0], outputs[1]

    def __call__(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See ``Postprocess``."""
        boxes, scores = self.decode(outputs)
        return [self._frame(b, s, size) for b, s, size in zip(boxes, scores, sizes_px, strict=False)]

    def _frame(self, boxes: Floats, scores: Floats, size_px: SizePx) -> Detection:
        rows, columns = np.nonzero(scores > self._score_min)
        values = scores[rows, columns]
        if values.size > MAX_CANDIDATES:
            best = np.argpartition(-values, MAX_CANDIDATES)[:MAX_CANDIDATES]
            rows, columns, values = rows[best], columns[best], values[best]
        if not values.size:
            return Detection(boxes=())
        corners = boxes[rows]
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        kept = cv2.dnn.NMSBoxesBatched(
            xywh.astype(np.float64).tolist(), values.astype(float).tolist(), columns.tolist(), self._score_min, self._iou
        )
        order = np.asarray(kept, np.int64).ravel()
        order = order[np.argsort(-values[order], kind="stable")][: self._keep]
        source = geometry(self._preprocess, *size_px).to_source(corners[order].astype(np.float32), *size_px)
        return detection(source, values[order], self._ids[columns[order]])


class Yolox(DenseBoxes):
    """YOLOX's raw (N, P, 5 + C) output, sigmoids applied, grids not (Ge et al. 2021, arXiv 2107.08430)."""

    def decode(self, outputs: Sequence[Floats]) -> tuple[Floats, Floats]:
        """Adds the grid, multiplies by the stride, and score = objectness × class."""
        raw = outputs[0]
        grid, stride = _grid(self._preprocess.size_px)
        centre = (raw[..., :2] + grid) * stride
        half = np.exp(raw[..., 2:4]) * stride / 2
        return np.concatenate([centre - half, centre + half], axis=-1).astype(np.float32), raw[..., 4:5] * raw[..., 5:]


def _grid(size_px: SizePx, strides: Sequence[int] = (8, 16, 32)) -> tuple[Floats, Floats]:
    cells, scale = [], []
    for stride in strides:
        y, x = np.mgrid[: size_px[0] // stride, : size_px[1] // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        scale.append(np.full((x.size, 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(scale).astype(np.float32)


def detection(boxes_px: Floats, scores: NDArray[Any], class_ids: NDArray[Any]) -> Detection:
    """Arrays (K, 4), (K,), (K,) as an answer."""
    rows = zip(boxes_px.tolist(), scores.tolist(), class_ids.tolist(), strict=True)
    return Detection(boxes=tuple(Box(class_id=int(c), score=float(s), box_px=(b[0], b[1], b[2], b[3])) for b, s, c in rows))


def build_postprocess(spec: Mapping[str, Any], preprocess: Preprocess) -> Postprocess:
    """The postprocess a manifest names in ``postprocess.kind``.

    Raises:
        BundleError: the kind is unknown, or a setting is missing.
    """
    kind = spec.get("kind", "softmax")
    try:
        if kind == "softmax":
            return Softmax()
        if kind == "declared":
            from splitters.tasks.decoding import declared

            return declared(spec, preprocess)
        if kind in ("dense_boxes", "yolox"):
            return (Yolox if kind == "yolox" else DenseBoxes)(spec, preprocess)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(f"postprocess {kind!r} in the manifest is incomplete: {error}") from error
    raise BundleError(f"postprocess kind {kind!r} is unknown; this headtail knows softmax, dense_boxes, yolox and declared")
