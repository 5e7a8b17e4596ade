"""Average precision of detections, COCO's way, with intervals over photos.

pycocotools matches detections to objects once; from its matches the precision curves are accumulated here, so that a bootstrap
over photos costs milliseconds a draw instead of a second. ``accumulate`` on all photos equals pycocotools' own figures.

Shape legend: M photos, C classes, T the ten overlaps .50, .55, … .95, R the 101 recalls at which precision is read.
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

from protos.errors import ConfigError, MissingDependencyError
from splitters.models.boxes import Detections

_RECALLS = np.linspace(0, 1, 101)
Array = NDArray[np.float64]


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

    def table(self, photos: NDArray[np.int64] | None = None, rows: Sequence[int] | None = None) -> Array:
        """AP of every class at every overlap (C, T), NaN where the photos hold no object of the class.

        Args:
            photos: indices into ``image_ids``, repeats allowed; all when None.
            rows: which of the classes; all when None.
        """
        wanted = self.matches if rows is None else [self.matches[r] for r in rows]
        chosen = range(len(self.image_ids)) if photos is None else photos.tolist()
        return np.stack([_precision([m for i in chosen if (m := row[i]) is not None]) for row in wanted])

    def ap(self, category_ids: Sequence[int] | None = None) -> float:
        """AP over IoU .50:.95, mean over classes (all that occur, or the given)."""
        return float(np.nanmean(self.table()[self._rows(category_ids)]))

    def ap50(self, category_ids: Sequence[int] | None = None) -> float:
        """AP at IoU .50, mean over classes (all that occur, or the given)."""
        return float(np.nanmean(self.table()[self._rows(category_ids), 0]))

    def bootstrap(self, draws: int = 200, seed: int = 0, category_ids: Sequence[int] | None = None) -> Array:
        """AP and AP50 of ``draws`` resampled sets of photos, (draws, 2). Same seed, same photos: differences are paired."""
        rng = np.random.default_rng(seed)
        rows = self._rows(category_ids)
        figures = []
        for _ in range(draws):
            table = self.table(rng.integers(0, len(self.image_ids), len(self.image_ids)), rows)
            found = table[~np.isnan(table[:, 0])]
            figures.append((found.mean(), found[:, 0].mean()) if len(found) else (np.nan, np.nan))
        return np.asarray(figures)

    def _rows(self, category_ids: Sequence[int] | None) -> list[int]:
        return [self.category_ids.index(c) for c in (category_ids if category_ids is not None else self.category_ids)]


def _precision(parts: Sequence[_Matches]) -> Array:
    """AP (T,) of one class: the interpolated precision at 101 recalls, averaged."""
    objects = sum(part.objects for part in parts)
    if objects == 0:
        return np.full(10, np.nan)
    scores = np.concatenate([part.scores for part in parts])
    order = np.argsort(-scores, kind="mergesort")
    hit = np.concatenate([part.hit for part in parts], axis=1)[:, order]
    counted = ~np.concatenate([part.ignored for part in parts], axis=1)[:, order]
    right, wrong = np.cumsum(hit & counted, axis=1), np.cumsum(~hit & counted, axis=1)
    result = np.zeros(10)
    if scores.size == 0:
        return result
    for overlap in range(10):
        recall = right[overlap] / objects
        precision = right[overlap] / np.maximum(right[overlap] + wrong[overlap], 1e-9)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        index = np.searchsorted(recall, _RECALLS, side="left")
        result[overlap] = np.concatenate([envelope, [0.0]])[np.minimum(index, len(envelope))].mean()
    return result


def load_truth(instances: Path) -> Any:
    """The ground truth as a pycocotools ``COCO``, quietly.

    Raises:
        ConfigError: the file is absent or no COCO instances file.
        MissingDependencyError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise MissingDependencyError("pycocotools is not installed; run: pip install 'headtail[train]'") from error
    if not instances.is_file():
        raise ConfigError(f"{instances} does not exist; give a COCO instances.json")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(instances))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{instances} is no COCO instances file: {error}") from error


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
    categories, areas = list(judge.params.catIds), len(judge.params.areaRng)
    rows = []
    for index in range(len(categories)):
        start = index * areas * len(image_ids)  # the first area range is "all"
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


def interval(draws: Array, level: float = 0.95) -> tuple[float, float]:
    """The central bootstrap interval of one column of ``bootstrap``."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
