"""Agreement with the whole model as a judge, where there are no labels: the same first class, or F1 of the boxes.

Shape legend: M photos, D resampled sets of them (see `splitters.evaluation.bdrate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from protos.messages import Answer
from splitters.evaluation.bdrate import Counts
from splitters.evaluation.judging.tasks import Score
from splitters.tasks.base import task_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Judges by the whole model's own answers.

    Attributes:
        files: the photos.
        wanted: the whole model's answer to each.
    """

    files: tuple[Path, ...]
    wanted: tuple[Answer, ...]

    @property
    def metric(self) -> str:
        """See ``Judge``."""
        return "agreement"

    def only(self, keep: Sequence[int]) -> Agreement:
        """See ``Judge``."""
        return replace(self, files=tuple(self.files[i] for i in keep), wanted=tuple(self.wanted[i] for i in keep))

    def score(self, answers: Sequence[Answer], counts: Counts) -> Score:
        """See ``Judge``."""
        rows = [task_of(wanted).agreement(mine, wanted) for mine, wanted in zip(answers, self.wanted, strict=True)]
        table = np.array(rows, np.float64).reshape(-1, 2)
        return Score(value=_share(*table.sum(axis=0)), drawn=np.array([_share(*row) for row in counts @ table]))


def _share(right: float, of: float) -> float:
    """The fraction; where there was nothing to find and nothing was found, all agreed."""
    return float(right / of) if of else 1.0
