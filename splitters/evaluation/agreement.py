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
from splitters.evaluation.tasks import Score
from splitters.tasks.agreement import agreement, share


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
        rows = [agreement(mine, wanted) for mine, wanted in zip(answers, self.wanted, strict=True)]
        table = np.array(rows, np.float64).reshape(-1, 2)
        return Score(value=share(*table.sum(axis=0)), drawn=np.array([share(*row) for row in counts @ table]))
