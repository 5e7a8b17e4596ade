"""Decodes outputs as their declaration says.

Shape legend: N batch, P positions, queries or rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError
from protos.messages import Answer, Box, Classification, ClassScore, Detection
from splitters.bundle.manifest import Preprocess
from splitters.tasks.decoding.boxes import nms, rotated_nms
from splitters.tasks.decoding.columns import Floats
from splitters.tasks.decoding.declaration import Decoding, declared_decoding
from splitters.tasks.preprocess import geometry

SizePx = tuple[int, int]
MAX_CANDIDATES = 3000


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The rows of one frame that are reported, the surest first.

    Attributes:
        boxes_px: (K, 4) xyxy in pixels of the model's input.
        scores: (K,).
        class_ids: (K,).
        extras: (K, E) what else each row carries.
    """

    boxes_px: Floats
    scores: Floats
    class_ids: NDArray[np.int64]
    extras: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """All rows of a batch.

    Attributes:
        boxes_px: (N, P, 4) xyxy in pixels of the model's input.
        scores: (N, P, C) of the classes, or one where the rows name their class.
        class_ids: (N, P, 1) where the rows name their class.
        extras: (N, P, E) what else each row carries, where it does.
    """

    boxes_px: Floats
    scores: Floats
    class_ids: Floats | None
    extras: Floats | None


class Declared:
    """Decodes as declared.

    Args:
        decoding: outputs named by index.
        preprocess: of the pictures, whose geometry boxes go back through.
    """

    def __init__(self, decoding: Decoding, preprocess: Preprocess) -> None:
        self._how = decoding
        self._preprocess = preprocess

    def __call__(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See ``Postprocess``.

        Raises:
            BundleError: the outputs do not have the form declared.
        """
        if self._how.task == "classification":
            return self._classes(outputs, sizes_px)
        return self._detections(outputs, sizes_px)

    def _ids(self, columns: int) -> NDArray[np.int64]:
        ids = np.asarray(self._how.class_ids or range(columns), np.int64)
        if len(ids) != columns:
            raise BundleError(f"{len(ids)} class ids are declared, the output has {columns} classes")
        return ids

    def _foreground(self, scores: Floats) -> Floats:
        if self._how.background == "none":
            return scores
        return scores[..., 1:] if self._how.background == "first" else scores[..., :-1]

    def _classes(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        scores = self._foreground(self._how.scores.read(outputs))
        if scores.shape[1] != 1:
            raise BundleError(f"a classifier's output is (N, classes), this one has shape {scores.shape}")
        ids = self._ids(scores.shape[2])
        answers: list[Answer] = []
        for row in scores[: len(sizes_px), 0]:
            best = np.argsort(-row, kind="stable")[:5]
            top = tuple(ClassScore(class_id=int(ids[i]), score=float(np.clip(row[i], 0, 1))) for i in best)
            answers.append(Classification(top=top))
        return answers

    def _detections(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        return [
            _detection(geometry(self._preprocess, *size).to_source(k.boxes_px, *size), k.scores, k.class_ids)
            for k, size in zip(self.kept(outputs), sizes_px, strict=False)
        ]

    def candidates(self, outputs: Sequence[Floats]) -> Candidates:
        """All rows as they are before a threshold and a suppression choose among them.

        Raises:
            BundleError: the outputs do not have the form declared.
        """
        how = self._how
        if how.boxes is None:  # checked when it was made
            raise BundleError("the decoding says of no output that it holds boxes")
        boxes = how.box.corners(how.boxes.read(outputs), self._preprocess.size_px)
        scores = self._foreground(how.scores.read(outputs))
        if how.objectness is not None:
            objectness = how.objectness.read(outputs)
            if how.objectness_power is None:
                scores = objectness * scores
            else:
                scores = (objectness**how.objectness_power * scores ** (1 - how.objectness_power)).astype(np.float32)
        named = how.class_id.read(outputs) if how.class_id is not None else None
        extras = how.extras.read(outputs) if how.extras is not None else None
        for each in (scores, named, extras):
            if each is not None and each.shape[1] != boxes.shape[1]:
                raise BundleError(f"{boxes.shape[1]} boxes come with {each.shape[1]} rows of scores, classes or extras")
        return Candidates(boxes_px=boxes, scores=scores, class_ids=named, extras=extras)

    def kept(self, outputs: Sequence[Floats]) -> list[Kept]:
        """Of every frame the rows that are reported, in pixels of the model's input.

        Raises:
            BundleError: the outputs do not have the form declared.
        """
        rows = self.candidates(outputs)
        named, extras = rows.class_ids, rows.extras
        ids = self._ids(rows.scores.shape[2]) if named is None else None
        return [
            self._frame(b, s, None if named is None else named[n, :, 0], ids, None if extras is None else extras[n])
            for n, (b, s) in enumerate(zip(rows.boxes_px, rows.scores, strict=True))
        ]

    def _frame(
        self, boxes: Floats, scores: Floats, named: Floats | None, ids: NDArray[np.int64] | None, extras: Floats | None
    ) -> Kept:
        how = self._how
        if how.label == "best" or named is not None:
            columns = scores.argmax(axis=1)
            values = scores[np.arange(len(scores)), columns]
            rows = np.flatnonzero(values > how.score_min)
            values, columns = values[rows], columns[rows]
        else:
            rows, columns = np.nonzero(scores > how.score_min)
            values = scores[rows, columns]
        if values.size > MAX_CANDIDATES:
            best = np.argpartition(-values, MAX_CANDIDATES)[:MAX_CANDIDATES]
            rows, columns, values = rows[best], columns[best], values[best]
        kinds = np.rint(named[rows]).astype(np.int64) if named is not None else columns if ids is None else ids[columns]
        found, values = boxes[rows].astype(np.float32), values.astype(np.float32)
        groups = kinds if how.suppression == "class" else np.zeros_like(kinds)
        if how.suppression == "none":
            order = np.argsort(-values, kind="stable")[: how.keep]
        elif how.task == "oriented" and extras is not None:
            order = rotated_nms(found, extras[rows, 0], values, groups, iou=how.iou, keep=how.keep)
        else:
            order = nms(found, values, groups, iou=how.iou, keep=how.keep)
        return Kept(
            boxes_px=found[order], scores=values[order], class_ids=kinds[order].astype(np.int64),
            extras=extras[rows[order]] if extras is not None else np.zeros((len(order), 0), np.float32),
        )  # fmt: skip


def _detection(corners: Floats, scores: Floats, kinds: NDArray[np.int64]) -> Detection:
    right_way = (
        (corners[:, 2] >= corners[:, 0]) & (corners[:, 3] >= corners[:, 1]) & np.isfinite(corners).all(axis=1) & (kinds >= 0)
    )
    found = zip(corners[right_way].tolist(), np.clip(scores[right_way], 0, 1).tolist(), kinds[right_way].tolist(), strict=True)
    return Detection(boxes=tuple(Box(class_id=k, score=s, box_px=(b[0], b[1], b[2], b[3])) for b, s, k in found))


def declared(spec: Mapping[str, Any], preprocess: Preprocess) -> Declared:
    """What a manifest's ``postprocess`` of kind ``declared`` says.

    Raises:
        BundleError: it is no declaration.
    """
    return Declared(declared_decoding(spec), preprocess)
