"""Curves of a filter, and the passages of a video that count as independent units.

Shape legend: N frames or photos, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError, MissingDependencyError

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


def draw_curves(curves: dict[str, tuple[Array, NDArray[np.bool_]]], path: Path) -> None:
    """ROC and precision–recall of several sets, side by side, as a picture."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MissingDependencyError("matplotlib is not installed; run: pip install 'headtail[train]'") from error
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), constrained_layout=True)
    for name, (scores, positive) in curves.items():
        false_share, recall, precision = roc(scores, positive)
        label = f"{name} (AUC {roc_auc(scores, positive):.3f})"
        left.step(np.append(0, false_share), np.append(0, recall), where="post", label=label)
        right.step(recall, precision, where="post", label=f"{name} ({positive.mean():.0%} positive)")
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    left.set(xlabel="empty frames sent", ylabel="recall", title="ROC", xlim=(0, 1), ylim=(0, 1.01))
    right.set(xlabel="recall", ylabel="precision", title="Precision and recall", xlim=(0, 1), ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is left else "lower left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
