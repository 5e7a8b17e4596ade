"""How far two answers to one frame agree, as a fraction whose parts can be summed over frames.

Classes agree where the first is the same. A box agrees with one of its class that it overlaps by half or more; each counts once,
the surest first. Summed over frames the fraction is the share of frames, or the F1 of the boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protos.errors import ModelError
from protos.messages import Answer, Box, Classification, Detection
from splitters.tasks.boxes import iou_matrix

_OVERLAP = 0.5


def agreement(mine: Answer, wanted: Answer) -> tuple[float, float]:
    """Numerator and denominator; of a frame in which neither finds a box, both are 0.

    Raises:
        ModelError: the answers are of different kinds.
    """
    if isinstance(mine, Classification) and isinstance(wanted, Classification):
        return float(mine.top[0].class_id == wanted.top[0].class_id), 1.0
    if isinstance(mine, Detection) and isinstance(wanted, Detection):
        return 2.0 * _hits(mine.boxes, wanted.boxes), float(len(mine.boxes) + len(wanted.boxes))
    raise ModelError(f"a {type(mine).__name__} cannot agree with a {type(wanted).__name__}")


def share(numerator: float, denominator: float) -> float:
    """The fraction; where there was nothing to find and nothing was found, all agreed."""
    return float(numerator / denominator) if denominator else 1.0


def _hits(mine: Sequence[Box], wanted: Sequence[Box]) -> int:
    hits = 0
    for class_id in {b.class_id for b in wanted}:
        theirs = [b.box_px for b in wanted if b.class_id == class_id]
        ours = [b.box_px for b in sorted(mine, key=lambda b: -b.score) if b.class_id == class_id]
        if not ours:
            continue
        overlap = iou_matrix(np.array(ours, np.float32), np.array(theirs, np.float32))
        for row in range(len(ours)):
            best = int(overlap[row].argmax())
            if overlap[row, best] >= _OVERLAP:
                hits += 1
                overlap[:, best] = -1.0
    return hits
