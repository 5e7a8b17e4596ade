"""Agreement with the whole model, where there are no labels: the same first class, or F1 of the boxes.

A box agrees with one of the whole model's of its class that it overlaps by half or more; each counts once, surest first. F1 is
over all photos together, at the bundle's own score threshold.

Shape legend: M photos, D resampled sets of them (see `splitters.evaluation.bdrate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from protos.messages import Answer, Box, Detection
from splitters.bottleneck.narrow import narrow
from splitters.evaluation.bdrate import Counts
from splitters.evaluation.tasks import Judge, Score, TopOne
from splitters.tasks.boxes import iou_matrix

_OVERLAP = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxAgreement:
    """F1 against the whole model's boxes.

    Attributes:
        files: the photos.
        wanted: the whole model's boxes of each.
    """

    files: tuple[Path, ...]
    wanted: tuple[tuple[Box, ...], ...]

    @property
    def metric(self) -> str:
        """See ``Judge``."""
        return "agreement"

    def only(self, keep: Sequence[int]) -> BoxAgreement:
        """See ``Judge``."""
        return replace(self, files=tuple(self.files[i] for i in keep), wanted=tuple(self.wanted[i] for i in keep))

    def score(self, answers: Sequence[Answer], counts: Counts) -> Score:
        """See ``Judge``."""
        rows = zip(answers, self.wanted, strict=True)
        table = np.array([_counted(narrow(a, Detection).boxes, wanted) for a, wanted in rows], np.float64).reshape(-1, 2)
        return Score(value=_f1(*table.sum(axis=0)), drawn=np.array([_f1(*row) for row in counts @ table]))


def _f1(hits: float, boxes: float) -> float:
    """From boxes that agree and all boxes of both sides; where neither has any, they agree."""
    return 2 * float(hits) / float(boxes) if boxes else 1.0


def _counted(mine: Sequence[Box], wanted: Sequence[Box]) -> tuple[int, int]:
    hits = 0
    for class_id in {b.class_id for b in wanted}:
        theirs = [b.box_px for b in wanted if b.class_id == class_id]
        ours = [b.box_px for b in sorted(mine, key=lambda b: -b.score) if b.class_id == class_id]
        if ours:
            overlap = iou_matrix(np.array(ours, np.float32), np.array(theirs, np.float32))
            for row in range(len(ours)):
                best = int(overlap[row].argmax())
                if overlap[row, best] >= _OVERLAP:
                    hits += 1
                    overlap[:, best] = -1.0
    return hits, len(mine) + len(wanted)


def agreement_with(whole: Sequence[Answer], files: Sequence[Path]) -> Judge:
    """Judges by the whole model's own answers."""
    if whole and isinstance(whole[0], Detection):
        return BoxAgreement(files=tuple(files), wanted=tuple(narrow(a, Detection).boxes for a in whole))
    return TopOne.agreeing_with(whole, files)
