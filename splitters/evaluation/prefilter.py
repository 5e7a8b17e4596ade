"""What a filter can promise: thresholds for a recall, with bounds over independent units.

A unit is what can be counted as one independent chance to miss: a photo, or a passage in a video (neighbouring frames show the
same object, so they are not independent). Shape legend: N frames or photos, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError, MissingDependencyError

Array = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """A threshold and the promise that comes with it.

    Attributes:
        threshold: frames with a lower score are stopped.
        recall_asked: share of units that hold something of interest which should pass.
        recall_promised: one-sided 95 % Clopper–Pearson lower bound on the share that passes at this threshold, over units like
            those it was calibrated on.
        units: independent positive units used.
        missed: of them, how many the threshold misses.
    """

    threshold: float
    recall_asked: float
    recall_promised: float
    units: int
    missed: int

    @property
    def kept(self) -> bool:
        """Whether the recall asked for is promised."""
        return self.recall_promised >= self.recall_asked

    def to_json(self) -> dict[str, Any]:
        """The calibration as plain JSON types."""
        return {**asdict(self), "confidence": CONFIDENCE, "kept": self.kept}


def clopper_pearson_lower(hits: int, units: int, confidence: float = CONFIDENCE) -> float:
    """One-sided lower bound on a proportion (Clopper & Pearson 1934); 0 without a hit.

    Raises:
        ConfigError: not 0 ≤ hits ≤ units.
    """
    if not 0 <= hits <= units:
        raise ConfigError(f"hits must lie in 0..units, got {hits} of {units}")
    if hits == 0:
        return 0.0
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise MissingDependencyError("scipy is not installed; run: pip install 'headtail[train]'") from error
    return float(beta.ppf(1 - confidence, hits, units - hits + 1))


def calibrate(positive_scores: Sequence[float] | Array, recall: float) -> Calibration:
    """The highest threshold whose bound reaches ``recall``; where none does, the one that promises most.

    The threshold is the (m + 1)-th smallest score; the share of future units that reach it then has exactly the distribution that
    the Clopper–Pearson bound of ``units - m`` hits describes (an order statistic), so choosing it on these units costs nothing.

    Args:
        positive_scores: (U,) the score of every independent unit that holds something of interest.
        recall: asked for, in (0, 1).

    Raises:
        ConfigError: no positive unit, or a recall outside (0, 1).
    """
    scores = np.sort(np.asarray(positive_scores, np.float64))
    if not 0 < recall < 1:
        raise ConfigError(f"a recall must lie between 0 and 1, got {recall}")
    if scores.size == 0:
        raise ConfigError("calibration needs at least one photo or passage that holds something of interest")
    missed = 0
    while missed + 1 < scores.size and clopper_pearson_lower(scores.size - missed - 1, scores.size) >= recall:
        missed += 1
    # Equal scores pass together: the misses counted are those strictly below.
    below = int(np.searchsorted(scores, scores[missed], side="left"))
    return Calibration(
        threshold=float(scores[missed]), recall_asked=recall, units=int(scores.size), missed=below,
        recall_promised=clopper_pearson_lower(scores.size - below, scores.size),
    )  # fmt: skip


def passages(positive: NDArray[np.bool_], gap: int) -> list[NDArray[np.int64]]:
    """Frame numbers of each passage: runs of positive frames; runs ``gap`` frames or less apart are one passage."""
    frames = np.flatnonzero(positive)
    if frames.size == 0:
        return []
    return [np.asarray(run, np.int64) for run in np.split(frames, np.flatnonzero(np.diff(frames) > gap + 1) + 1)]


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
