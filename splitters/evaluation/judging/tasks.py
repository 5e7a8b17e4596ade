"""What accuracy means for a bundle's task: labels read from a file, answers to a score over all photos and resampled sets.

Shape legend: M photos, D resampled sets of them (see `splitters.evaluation.bdrate`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from protos.errors import ConfigError, SourceError
from protos.messages import Answer, Classification, Detection
from splitters.bottleneck.narrow import narrow
from splitters.evaluation.bdrate import Array, Counts
from splitters.evaluation.judging.coco import classes_of, read_instances, truth_of
from splitters.evaluation.judging.detection import DetectionScores, score
from splitters.evaluation.judging.pairing import pair
from splitters.runtime.folders import pictures_below
from splitters.tasks.decoding.boxes import Detections


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
        metric: ``top1``.
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


class AveragePrecision:
    """COCO AP over the photos of an ``instances.json``.

    Args:
        instances: COCO annotations.
        files: candidate photos; those without an entry are left out.
        root: the photos' folder.
        labels: the model's class ids and names, to be matched with the categories' names; None: the ids are the file's own.
    """

    metric = "ap"

    def __init__(
        self, instances: Path, files: Sequence[Path], root: Path | None = None, labels: Mapping[int, str] | None = None
    ) -> None:
        found = read_instances(instances)
        named = pair(files, root, [i.file_name for i in found.images], str(instances))
        images = {i.file_name: i for i in found.images}
        self._instances, self._truth = instances, truth_of(found)
        self._categories = classes_of(found, labels, instances) if labels is not None else {c.id: c.id for c in found.categories}
        self._images = {f: images[name] for f, name in named.items()}
        if not self._images:
            raise SourceError(f"none of the photos is named in {instances}")

    @property
    def files(self) -> tuple[Path, ...]:
        """See ``Judge``."""
        return tuple(self._images)

    def only(self, keep: Sequence[int]) -> AveragePrecision:
        """See ``Judge``."""
        few = copy.copy(self)
        few._images = {self.files[i]: self._images[self.files[i]] for i in keep}  # noqa: SLF001 - its own
        return few

    def check_sizes(self, sizes_px: Sequence[tuple[int, int]]) -> None:
        """Whether the boxes are in the pixels of the photos, which are given as (width, height).

        Raises:
            ConfigError: the file gives a photo another size.
        """
        for (file, image), (width, height) in zip(self._images.items(), sizes_px, strict=True):
            if image.width and image.height and (image.width, image.height) != (width, height):
                turned = "; its EXIF orientation turns it" if (image.width, image.height) == (height, width) else ""
                raise ConfigError(
                    f"{file} is {width}x{height} px, and {self._instances} says {image.width}x{image.height}: its boxes are in "
                    f"other pixels{turned}. Label the photo as it is shown, or take it out"
                )

    def _scores(self, answers: Sequence[Answer]) -> DetectionScores:
        found = {}
        for image, answer in zip(self._images.values(), answers, strict=True):
            known = [b for b in narrow(answer, Detection).boxes if b.class_id in self._categories]
            rows = [(*b.box_px, b.score, self._categories[b.class_id]) for b in known]
            table = np.array(rows, np.float64).reshape(-1, 6)
            found[image.id] = Detections(
                table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64)
            )
        return score(self._truth, found)

    @property
    def _judged(self) -> list[int]:
        return sorted(set(self._categories.values()))

    def score(self, answers: Sequence[Answer], counts: Counts) -> Score:
        """See ``Judge``."""
        scores = self._scores(answers)
        column = {image.id: i for i, image in enumerate(self._images.values())}
        drawn = scores.resampled(counts[:, [column[i] for i in scores.image_ids]], self._judged)[:, 0]
        return Score(value=scores.ap(self._judged), drawn=drawn, also={"ap50": scores.ap50(self._judged)})

    def best_score(self, answers: Sequence[Answer]) -> tuple[float, float] | None:
        """The score from which on boxes give the best F1 at IoU .50, and that F1; None where nothing is found."""
        return self._scores(answers).best_score(self._judged)


def list_images(folder: Path, limit: int | None = None) -> list[Path]:
    """Every image below ``folder``; with ``limit`` that many, evenly spread over the sorted list.

    Raises:
        SourceError: there is none.
    """
    files = pictures_below(folder)
    if not files:
        raise SourceError(f"{folder} holds no image")
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    return files


def read_labels(path: Path, files: Sequence[Path], root: Path, classes: Iterable[int] = ()) -> TopOne:
    """Labels from JSON {path relative to the images' folder, or file name: class index}; photos without one are left out.

    Args:
        path: the labels.
        files: the photos.
        root: their folder.
        classes: the model's class indices; empty where they are not known.

    Raises:
        ConfigError: not such a file, or it names a class that the model does not have.
        SourceError: no photo has a label.
    """
    try:
        table = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} must be a JSON object of file name to class index: {error}") from error
    known = set(classes)
    for name, index in table.items():
        if index < 0 or (known and index not in known):
            span = f"{min(known)} to {max(known)}" if known else "from 0 on"
            raise ConfigError(f"{path}: {name!r} has class {index}; the model's classes are {span}")
    kept = {f: table[name] for f, name in pair(files, root, table, str(path)).items()}
    if not kept:
        raise SourceError(f"{path} names none of the photos in {root}")
    return TopOne(metric="top1", files=tuple(kept), wanted=tuple(kept.values()))
