"""How true an answer stayed to the uncut model's own: the judge where a video has no labels.

Detections are judged by AP50 against the boxes that the uncut model puts out on the uncompressed frame, from a score of `SURE`
on; the student's own scores rank its boxes, so a box that is there by a hair costs little. Classes count as one: a box is right
when place and class are. A class that the uncut model sees twice in a clip would else weigh as much as the hundreds of the
others. Classifications are judged by the share of frames whose first class is the uncut model's.

Shape legend: F frames, D resampled sets of them (see `splitters.evaluation.bdrate`), B boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from protos.messages import Answer, Classification, Detection
from splitters.evaluation.bdrate import Array, Counts
from splitters.evaluation.judging.tasks import Score

SURE = 0.3
_OVERLAP = 0.5
_RECALLS = np.linspace(0, 1, 101)
_CHUNK = 100  # resampled sets at a time: bounds the memory


def resample_segments(lengths: Sequence[int], segment: int, draws: int, seed: int = 0) -> Counts:
    """Draws sets of segments with repeats, as counts of frames (D, F): neighbouring frames err together.

    Args:
        lengths: frames of each clip; no segment spans two.
        segment: frames of one; a clip's last may be shorter.
        draws: D.
        seed: of the draw.
    """
    starts = np.concatenate([at + np.arange(0, n, segment) for at, n in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True)])
    number = np.zeros(sum(lengths), np.int64)
    number[starts] = 1
    number = np.cumsum(number) - 1
    rng = np.random.default_rng(seed)
    count = len(starts)
    drawn = np.array([np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(draws)], np.int32)
    return drawn[:, number]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """Judges answers by the uncut model's on the same frames.

    Attributes:
        metric: ``ap50`` or ``agreement``.
        wanted: the uncut model's answers.
    """

    metric: str
    wanted: tuple[Answer, ...]

    @staticmethod
    def to(whole: Sequence[Answer]) -> Fidelity:
        """The judge of one clip.

        Raises:
            ConfigError: answers that are neither detections nor classifications, or no box in all of them.
        """
        if all(isinstance(a, Detection) for a in whole):
            if not any(_table(a, SURE)[0].size for a in whole):
                raise ConfigError(f"the uncut model finds no box with a score of {SURE:g} or more in this clip: take another")
            return Fidelity(metric="ap50", wanted=tuple(whole))
        if all(isinstance(a, Classification) for a in whole):
            return Fidelity(metric="agreement", wanted=tuple(whole))
        raise ConfigError("video is judged for detection and classification")

    def score(self, answers: Sequence[Answer], counts: Counts) -> Score:
        """Accuracy over all frames, and over those drawn (D, F)."""
        everything = np.concatenate([np.ones((1, len(self.wanted)), np.int32), counts])
        if self.metric == "agreement":
            right = np.array([_first(a) == _first(b) for a, b in zip(answers, self.wanted, strict=True)], np.float64)
            values = everything @ right / everything.sum(axis=1)
        else:
            values = self._ap50(answers, everything)
        return Score(value=float(values[0]), drawn=values[1:])

    def _ap50(self, answers: Sequence[Answer], counts: Counts) -> Array:
        scores, hits, frames, objects = [], [], [], np.zeros(len(self.wanted), np.int64)
        for number, (answer, wanted) in enumerate(zip(answers, self.wanted, strict=True)):
            truth, _, truth_ids = _table(wanted, SURE)
            boxes, confidence, ids = _table(answer, 0.0)
            objects[number] = len(truth)
            scores.append(confidence)
            hits.append(_matched(boxes, ids, truth, truth_ids))
            frames.append(np.full(len(boxes), number))
        score = np.concatenate(scores)
        order = np.argsort(-score, kind="stable")
        hit, frame = np.concatenate(hits)[order], np.concatenate(frames)[order]
        return np.concatenate([_average(counts[i : i + _CHUNK], hit, frame, objects) for i in range(0, len(counts), _CHUNK)])


def _average(counts: Counts, hit: NDArray[np.bool_], frame: NDArray[np.int64], objects: NDArray[np.int64]) -> Array:
    """AP (D,): the interpolated precision over 101 recalls, as COCO counts it; NaN where a draw holds no object."""
    weight = counts[:, frame].astype(np.int64)
    at = np.flatnonzero(hit)
    seen = np.cumsum(weight, axis=1)[:, at]
    right = np.cumsum(weight[:, at], axis=1)
    total = counts.astype(np.int64) @ objects
    precision = right / np.maximum(seen, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(_RECALLS, right / np.maximum(total, 1)[:, None], side="right")
    value = (np.diff(reached, axis=1, prepend=0) * envelope).sum(axis=1) / len(_RECALLS)
    return np.where(total > 0, value, np.nan)


def _first(answer: Answer) -> int:
    return answer.top[0].class_id if isinstance(answer, Classification) else -1


def _table(answer: Answer, score_min: float) -> tuple[Array, Array, NDArray[np.int64]]:
    """Boxes (B, 4), scores and classes (B,) of a detection, by falling score."""
    found = answer.boxes if isinstance(answer, Detection) else ()
    rows = sorted((b for b in found if b.score >= score_min), key=lambda b: -b.score)
    boxes = np.array([b.box_px for b in rows], np.float64).reshape(-1, 4)
    return boxes, np.array([b.score for b in rows], np.float64), np.array([b.class_id for b in rows], np.int64)


def _matched(boxes: Array, ids: NDArray[np.int64], truth: Array, truth_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which boxes (B,), strongest first, find an object of their class that none before them took."""
    hit = np.zeros(len(boxes), bool)
    if not len(truth) or not len(boxes):
        return hit
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(b[:, 2:] - b[:, :2], 0, None).prod(axis=1) for b in (boxes, truth)]
    overlap = shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-9)
    overlap[ids[:, None] != truth_ids[None]] = 0
    for row in range(len(boxes)):
        best = int(overlap[row].argmax())
        if overlap[row, best] >= _OVERLAP:
            hit[row] = True
            overlap[:, best] = 0
    return hit
