"""Curves of a filter, and the passages of a video that count as independent units.

Shape legend: N frames or photos, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError

Array = NDArray[np.float64]


def passages(positive: NDArray[np.bool_], gap: int) -> list[NDArray[np.int64]]:
    """Frame numbers of each passage: runs of positive frames; runs ``gap`` frames or less apart are one passage."""
    frames = np.flatnonzero(positive)
    if frames.size == 0:
        return []
    return [np.asarray(run, np.int64) for run in np.split(frames, np.flatnonzero(np.diff(frames) > gap + 1) + 1)]


def present(confidence: Array, sure: float, *, unsure: float = 0.1, gap: int = 12) -> NDArray[np.bool_]:
    """Which frames hold something, of a teacher whose confidence flickers.

    An object that is there in one frame is there in the next: a passage is a run of frames where the teacher sees anything at all
    (gaps of ``gap`` frames or less included), and it counts when the teacher is sure at least once within.

    Args:
        confidence: (N,) of the surest box in every frame, 0 where there is none.
        sure: a passage needs a box of this confidence.
        unsure: and lasts while there are boxes of this confidence.
        gap: in frames; a second's worth.
    """
    found = np.zeros(confidence.size, bool)
    for run in passages(confidence >= unsure, gap):
        if confidence[run].max() >= sure:
            found[run[0] : run[-1] + 1] = True
    return found


def passage_scores(scores: Array, runs: Sequence[NDArray[np.int64]], recall: float) -> Array:
    """One score a passage: a threshold at or below it lets at least the share ``recall`` of the passage's frames through."""
    found = []
    for run in runs:
        ordered = np.sort(scores[run])
        found.append(ordered[int(np.floor((1 - recall) * run.size + 1e-9))])
    return np.asarray(found, np.float64)


def roc(scores: Array, positive: NDArray[np.bool_]) -> tuple[Array, Array, Array]:
    """False-positive share, recall and precision at every threshold, from the strictest to the loosest."""
    order = np.argsort(-scores, kind="stable")
    hits, falses = np.cumsum(positive[order]), np.cumsum(~positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits, falses = hits[last], falses[last]
    recall = hits / max(1, int(positive.sum()))
    return falses / max(1, int((~positive).sum())), recall, hits / np.maximum(hits + falses, 1)


def roc_auc(scores: Array, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve; ties count half.

    Raises:
        ConfigError: only positives, or only negatives.
    """
    if positive.all() or not positive.any():
        raise ConfigError("a ROC curve needs frames of both kinds")
    false_share, recall, _ = roc(scores, positive)
    return float(np.trapezoid(np.append(0, recall), np.append(0, false_share)))
