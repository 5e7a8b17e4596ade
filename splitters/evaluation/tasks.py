"""What accuracy means for a bundle's task: labels read from a file, answers to a score over all photos and resampled sets.

Shape legend: M photos, D resampled sets of them (see `splitters.evaluation.bdrate`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from protos.errors import ConfigError, SourceError
from protos.messages import Answer, Classification, Detection
from splitters.bottleneck.narrow import narrow
from splitters.evaluation.bdrate import Array, Counts

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One setting's accuracy.

    Attributes:
        value: 0..1, over all photos.
        drawn: over every resampled set, (D,).
        also: other figures worth telling, by name.
    """

    value: float
    drawn: Array
    also: Mapping[str, float] = field(default_factory=dict)


class Judge(Protocol):
    """Turns one setting's answers, one per photo, into its accuracy."""

    @property
    def metric(self) -> str:
        """``top1``, ``agreement`` or ``ap``."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The photos."""
        ...

    def only(self, keep: Sequence[int]) -> Judge:
        """The same judge for some of the photos."""
        ...

    def score(self, answers: Sequence[Answer], counts: Counts) -> Score:
        """Accuracy over all photos, and over those drawn (D, M)."""
        ...


def _top1(answer: Answer) -> int:
    answer = narrow(answer, Classification)
    return answer.top[0].class_id


@dataclass(frozen=True, kw_only=True, slots=True)
class TopOne:
    """Share of photos whose first class is the wanted one.

    Attributes:
        metric: ``top1`` against labels, ``agreement`` with the whole model.
        files: the photos.
        wanted: class index of each.
    """

    metric: str
    files: tuple[Path, ...]
    wanted: tuple[int, ...]

    def only(self, keep: Sequence[int]) -> TopOne:
        """See ``Judge``."""
        return replace(self, files=tuple(self.files[i] for i in keep), wanted=tuple(self.wanted[i] for i in keep))

    def score(self, answers: Sequence[Answer], counts: Counts) -> Score:
        """See ``Judge``."""
        right = np.array([_top1(a) == w for a, w in zip(answers, self.wanted, strict=True)], np.float64)
        return Score(value=float(right.mean()), drawn=counts @ right / counts.sum(axis=1))

    @staticmethod
    def agreeing_with(whole: Sequence[Answer], files: Sequence[Path]) -> TopOne:
        """Judges by the whole model's own first class, where there are no labels."""
        return TopOne(metric="agreement", files=tuple(files), wanted=tuple(_top1(a) for a in whole))


class AveragePrecision:
    """COCO AP over the photos of an ``instances.json``.

    Args:
        instances: COCO annotations.
        files: candidate photos; those without an entry are left out.
    """

    metric = "ap"

    def __init__(self, instances: Path, files: Sequence[Path]) -> None:
        from splitters.evaluation.detection import load_truth

        self._instances = instances
        self._truth = load_truth(instances)
        ids = {info["file_name"]: int(i) for i, info in self._truth.imgs.items()}
        self._ids = {f: ids[f.name] for f in files if f.name in ids}
        if not self._ids:
            raise SourceError(f"none of the photos is named in {instances}")

    @property
    def files(self) -> tuple[Path, ...]:
        """See ``Judge``."""
        return tuple(self._ids)

    def only(self, keep: Sequence[int]) -> AveragePrecision:
        """See ``Judge``."""
        return AveragePrecision(self._instances, [self.files[i] for i in keep])

    def score(self, answers: Sequence[Answer], counts: Counts) -> Score:
        """See ``Judge``."""
        from splitters.evaluation.detection import score
        from splitters.tasks.boxes import Detections

        found = {}
        for image_id, answer in zip(self._ids.values(), answers, strict=True):
            rows = [(*b.box_px, b.score, b.class_id) for b in narrow(answer, Detection).boxes]
            table = np.array(rows, np.float32).reshape(-1, 6)
            found[image_id] = Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))
        scores = score(self._truth, found)
        column = {image_id: i for i, image_id in enumerate(self._ids.values())}
        drawn = scores.resampled(counts[:, [column[i] for i in scores.image_ids]])[:, 0]
        return Score(value=scores.ap(), drawn=drawn, also={"ap50": scores.ap50()})


def list_images(folder: Path, limit: int | None = None) -> list[Path]:
    """Every image below ``folder``; with ``limit`` that many, evenly spread over the sorted list.

    Raises:
        SourceError: there is none.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise SourceError(f"{folder} holds no image")
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    return files


def read_labels(path: Path, files: Sequence[Path], root: Path) -> TopOne:
    """Labels from JSON {file name or path relative to the images' folder: class index}; photos without one are left out.

    Raises:
        ConfigError: not such a file.
        SourceError: no photo has a label.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(v, int) for v in table.values()):
        raise ConfigError(f"{path} must be a JSON object of file name to class index")
    wanted = {f: table.get(f.name, table.get(f.relative_to(root).as_posix())) for f in files}
    kept = {f: w for f, w in wanted.items() if w is not None}
    if not kept:
        raise SourceError(f"{path} names none of the photos in {root}")
    return TopOne(metric="top1", files=tuple(kept), wanted=tuple(kept.values()))
