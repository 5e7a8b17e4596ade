"""What a prefilter can promise: thresholds for a recall, with bounds over independent units. Numpy only.

A unit is what can be counted as one independent chance to miss: a photo, or a passage in a video (neighbouring frames show the
same object, so they are not independent). Shape legend: U units, M photos, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, lgamma, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError

Array = NDArray[np.float64]
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
SURE = 0.5  # a photo is positive from this confidence of a box on
CONFIDENCE = 0.95
PRECISION = 0.7
_LEAST_BOXES = 20


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
    low, high = 0.0, 1.0
    for _ in range(60):  # the proportion at which ``hits`` or more have a chance of 1 - confidence
        middle = (low + high) / 2
        low, high = (middle, high) if _at_least(hits, units, middle) < 1 - confidence else (low, middle)
    return low


def _at_least(hits: int, units: int, share: float) -> float:
    """The chance of ``hits`` or more in ``units`` draws."""
    misses = range(units - hits + 1)
    ways = lgamma(units + 1)
    logs = (ways - lgamma(m + 1) - lgamma(units - m + 1) + m * log(1 - share) + (units - m) * log(share) for m in misses)
    return sum(map(exp, logs))


def threshold_for(positive_scores: Sequence[float] | Array, recall: float) -> Calibration:
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
    # The bound falls with every miss allowed: the most misses it bears are found by halving.
    missed, too_many = 0, int(scores.size)
    while too_many - missed > 1:
        middle = (missed + too_many) // 2
        kept = clopper_pearson_lower(scores.size - middle, scores.size) >= recall
        missed, too_many = (middle, too_many) if kept else (missed, middle)
    # Equal scores pass together: the misses counted are those strictly below.
    below = int(np.searchsorted(scores, scores[missed], side="left"))
    return Calibration(
        threshold=float(scores[missed]), recall_asked=recall, units=int(scores.size), missed=below,
        recall_promised=clopper_pearson_lower(scores.size - below, scores.size),
    )  # fmt: skip


def promises(scores: Array, confidence: Array, columns: Sequence[int], recalls: Sequence[float] = RECALLS) -> list[Calibration]:
    """Calibrations for several recalls on held-out photos, for a set of classes of interest.

    Args:
        scores: (M, K) the prefilter's scores.
        confidence: (M, K) of the surest box of each class that is large enough; 1 for ground truth.
        columns: the classes of interest.
        recalls: asked for.
    """
    chosen = list(columns)
    positive = confidence[:, chosen].max(axis=1) >= SURE
    best = scores[:, chosen].max(axis=1)[positive]
    return [threshold_for(best, recall) for recall in recalls]


def score_at_precision(scores: Array, right: NDArray[np.bool_], precision: float = PRECISION) -> float | None:
    """The lowest score from which on a detector's boxes are right with at least this share; None with too few boxes to tell.

    Args:
        scores: (B,) of boxes.
        right: (B,) whether each lies on an object of its class.
        precision: asked for, over all boxes of that score and more.
    """
    order = np.argsort(-scores, kind="stable")
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores count together
    fitting = np.flatnonzero((share >= precision) & last & (np.arange(len(order)) + 1 >= _LEAST_BOXES))
    return float(scores[order][fitting[-1]]) if fitting.size else None
