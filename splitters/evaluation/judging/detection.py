"""Average precision of detections, COCO's way, with intervals over photos.

pycocotools matches detections to objects once; from its matches the precision curves are accumulated here, for all resampled
sets of photos together, so that a bootstrap costs a millisecond a draw instead of a second. On all photos the figures equal
pycocotools' own.

Shape legend: M photos, C classes, T the ten overlaps .50, .55, … .95, D resampled sets of photos, K detections of one class, by
falling score.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.evaluation.bdrate import Array, Counts, interval, resample
from splitters.evaluation.judging.coco import read_instances, truth_of
from splitters.tasks.decoding.boxes import Detections

__all__ = ["DetectionScores", "interval", "load_truth", "score"]

_RECALLS = np.linspace(0, 1, 101)
_OVERLAPS = 10
_CHUNK = 250  # resampled sets at a time: bounds the memory


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matches:
    """One class in one photo: detections by falling score, whether each is matched or to be ignored at every overlap."""

    scores: Array  # (K,)
    hit: NDArray[np.bool_]  # (T, K)
    ignored: NDArray[np.bool_]  # (T, K)
    objects: int  # that count


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionScores:
    """Matches of one detector on one set of photos, and the figures read from them.

    Attributes:
        image_ids: the M photos.
        category_ids: the C classes.
        matches: per class, per photo; None where neither object nor detection is.
    """

    image_ids: tuple[int, ...]
    category_ids: tuple[int, ...]
    matches: tuple[tuple[_Matches | None, ...], ...]

    def table(self, category_ids: Sequence[int] | None = None) -> Array:
        """AP of every class (or of the given ones) at every overlap (C, T), NaN where the photos hold no object of the class."""
        everything = np.ones((1, len(self.image_ids)), np.int32)
        return np.stack([_resampled(self.matches[r], everything)[0] for r in self._rows(category_ids)])

    def ap(self, category_ids: Sequence[int] | None = None) -> float:
        """AP over IoU .50:.95, mean over classes (all that occur, or the given)."""
        return float(np.nanmean(self.table(category_ids)))

    def ap50(self, category_ids: Sequence[int] | None = None) -> float:
        """AP at IoU .50, mean over classes (all that occur, or the given)."""
        return float(np.nanmean(self.table(category_ids)[:, 0]))

    def best_score(self, category_ids: Sequence[int] | None = None) -> tuple[float, float] | None:
        """The score from which on boxes give the best F1 at IoU .50, over all classes together, and that F1; None without a hit."""
        rows = [m for r in self._rows(category_ids) for m in self.matches[r] if m is not None]
        objects = sum(m.objects for m in rows)
        scores = np.concatenate([m.scores[~m.ignored[0]] for m in rows]) if rows else np.zeros(0)
        hits = np.concatenate([(m.hit[0] & ~m.ignored[0])[~m.ignored[0]] for m in rows]) if rows else np.zeros(0, bool)
        if not objects or not hits.any():
            return None
        order = np.argsort(-scores, kind="stable")
        found, told = np.cumsum(hits[order]), np.arange(1, len(order) + 1)
        f1 = np.where(np.append(np.diff(scores[order]) != 0, True), 2 * found / (told + objects), 0.0)  # equal scores go together
        best = int(np.argmax(f1))
        return float(scores[order][best]), float(f1[best])

    def bootstrap(self, draws: int = 200, seed: int = 0, category_ids: Sequence[int] | None = None) -> Array:
        """AP and AP50 of ``draws`` resampled sets of photos, (D, 2). Same seed, same photos: differences are paired."""
        return self.resampled(resample(len(self.image_ids), draws, seed), category_ids)

    def resampled(self, counts: Counts, category_ids: Sequence[int] | None = None) -> Array:
        """AP and AP50, mean over the classes that occur, of every resampled set, (D, 2).

        Args:
            counts: (D, M), how often each photo of ``image_ids`` was drawn.
            category_ids: classes to average over; all when None.
        """
        rows = [self.matches[r] for r in self._rows(category_ids)]
        figures = []
        for start in range(0, len(counts), _CHUNK):
            part = counts[start : start + _CHUNK]
            table = np.stack([_resampled(row, part) for row in rows])  # (C, D, T)
            classes = np.isfinite(table[..., 0]).sum(axis=0)
            sums = np.nan_to_num(np.stack([table.mean(axis=2), table[..., 0]], axis=2)).sum(axis=0)  # (D, 2)
            figures.append(np.where(classes[:, None] > 0, sums / np.maximum(classes, 1)[:, None], np.nan))
        return np.concatenate(figures)

    def _rows(self, category_ids: Sequence[int] | None) -> list[int]:
        return [self.category_ids.index(c) for c in (category_ids if category_ids is not None else self.category_ids)]


def _resampled(row: Sequence[_Matches | None], counts: Counts) -> Array:
    """AP of one class in every resampled set (D, T): the interpolated precision, averaged over 101 recalls.

    A photo drawn n times counts its detections and objects n times. Precision rises at hits only, so it is worked out there alone.
    """
    known = [(i, m) for i, m in enumerate(row) if m is not None]
    objects = sum((counts[:, i].astype(np.int64) * m.objects for i, m in known), np.zeros(len(counts), np.int64))
    result = np.zeros((len(counts), _OVERLAPS))
    parts = [m for _, m in known]
    if parts and objects.any():
        order = np.argsort(-np.concatenate([m.scores for m in parts]), kind="mergesort")
        photo = np.repeat([i for i, _ in known], [m.scores.size for m in parts])[order]
        ignored = np.concatenate([m.ignored for m in parts], axis=1)[:, order]
        hit = np.concatenate([m.hit for m in parts], axis=1)[:, order] & ~ignored
        seen = np.cumsum(counts[:, photo], axis=1)
        for overlap in range(_OVERLAPS):
            at = np.flatnonzero(hit[overlap])
            if at.size:
                void = np.cumsum(counts[:, photo] * ignored[overlap], axis=1)[:, at] if ignored[overlap].any() else 0
                result[:, overlap] = _average(np.cumsum(counts[:, photo[at]], axis=1), seen[:, at] - void, objects)
    result[objects == 0] = np.nan
    return result


def _average(right: NDArray[Any], answered: NDArray[Any], objects: NDArray[np.int64]) -> Array:
    """AP (D,) from the objects found (D, H) and the detections made (D, H) up to every hit, and the objects there are (D,)."""
    precision = right / np.maximum(answered, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(_RECALLS, right / np.maximum(objects, 1)[:, None], side="right")
    return np.asarray((np.diff(reached, axis=1, prepend=0) * envelope).sum(axis=1) / len(_RECALLS), np.float64)


def load_truth(instances: Path) -> Any:
    """The ground truth as a pycocotools ``COCO``, quietly.

    Raises:
        ConfigError: the file is absent or no COCO instances file.
        MissingDependencyError: pycocotools is not installed.
    """
    return truth_of(read_instances(instances))


def score(truth: Any, found: Mapping[int, Detections]) -> DetectionScores:
    """Matches detections with the ground truth.

    Args:
        truth: from ``load_truth``.
        found: image id → detections, boxes in the photo's pixels. Photos without an entry are not evaluated.

    Raises:
        ConfigError: no photo of the ground truth was looked at.
    """
    image_ids = sorted(set(found) & set(truth.getImgIds()))
    if not image_ids:
        raise ConfigError("none of the photos that were looked at is in the ground truth")
    judge = _match(truth, found, image_ids)
    categories = list(judge.params.catIds)
    rows = []
    for index in range(len(categories)):
        start = index * len(image_ids)
        rows.append(tuple(_read(entry) for entry in judge.evalImgs[start : start + len(image_ids)]))
    return DetectionScores(image_ids=tuple(image_ids), category_ids=tuple(categories), matches=tuple(rows))


def _match(truth: Any, found: Mapping[int, Detections], image_ids: Sequence[int]) -> Any:
    from pycocotools.cocoeval import COCOeval

    rows = [
        [image_id, box[0], box[1], box[2] - box[0], box[3] - box[1], confidence, category]
        for image_id in image_ids
        for box, confidence, category in zip(*found[image_id], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        results = truth.loadRes(np.asarray(rows or [[image_ids[0], 0, 0, 1, 1, 0, 1]], np.float64))
        judge = COCOeval(truth, results, "bbox")
        judge.params.imgIds = list(image_ids)
        judge.params.areaRng, judge.params.areaRngLbl = judge.params.areaRng[:1], judge.params.areaRngLbl[:1]  # objects of any size
        judge.evaluate()
    return judge


def _read(entry: Any) -> _Matches | None:
    if entry is None:
        return None
    ignored = np.asarray(entry["dtIgnore"], bool)
    return _Matches(
        scores=np.asarray(entry["dtScores"], np.float64),
        hit=np.asarray(entry["dtMatches"]) > 0,
        ignored=ignored,
        objects=int((np.asarray(entry["gtIgnore"]) == 0).sum()),
    )
