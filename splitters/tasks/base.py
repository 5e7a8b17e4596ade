"""What the outputs of a model mean: one class for each task, and the place where tasks are registered.

A task owns all that depends on the meaning: decoding, JSON, drawing, words for people, judging, the check of what a peer
sends, and the answer of a frame that the prefilter stops. Client and server ask no answer and no manifest which task it is;
training and evaluation ask how its answers travel (`form_of`), where they choose losses, labels and ladders.

An answer travels as a classification, as a detection, or as named tensors. The first two have messages of their own; every
other task says what its tensors mean. A whole example is ``tests/outside/headtail_outside/task.py``, of another package.

Shape legend: N batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ProtocolError
from protos.messages import Answer, Classification, Detection, Tensors
from splitters.bundle.manifest import Manifest, Preprocess
from splitters.registry import Registry

if TYPE_CHECKING:
    from splitters.tasks.canvas import Canvas

Floats = NDArray[np.float32]
SizePx = tuple[int, int]
Labels = Mapping[int, str]
Arrays = dict[str, NDArray[Any]]


class Task(ABC):
    """One model's task.

    Args:
        spec: the bundle's ``postprocess``.
        preprocess: how a source frame became the model's input.
        decoded: whether the outputs are those of a device's local model, which decodes by itself what it can.

    Raises:
        KeyError, TypeError, ValueError: a setting is missing or wrong.
    """

    name: ClassVar[str]
    """Registered name, and the one in manifests."""
    form: ClassVar[type[Answer]] = Tensors
    """How an answer travels."""

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> None:
        self.spec, self.preprocess, self.decoded = spec, preprocess, decoded

    @abstractmethod
    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """One answer a frame.

        Args:
            outputs: the model's, batch first.
            sizes_px: (width, height) of each source frame; there may be fewer than N.
        """

    @abstractmethod
    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """What `arrays` gives of a model: name → (NumPy's type, shape with the batch axis; -1: any)."""

    @classmethod
    @abstractmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        """What is right in an answer, and out of how much.

        The quotient of both sums over all photos is what ``splitters evaluate`` calls agreement, where there are no labels and
        the wanted answer is the whole model's.
        """

    @classmethod
    @abstractmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        """The task's fields of a line of ``results.jsonl``."""

    @classmethod
    @abstractmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        """An answer in a few words, for a console; with ``more`` in a few more."""

    @classmethod
    @abstractmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """Draws an answer on its frame."""

    @classmethod
    def empty(cls) -> Answer | None:
        """The answer of a frame that holds nothing of interest; None where the task has no such answer."""
        return None

    @classmethod
    def classes(cls, answer: Answer, *, score_min: float = 0.0) -> Counter[int]:
        """How many objects of each class an answer names with this score or more."""
        del answer, score_min
        return Counter()

    @classmethod
    def arrays(cls, answers: Sequence[Answer]) -> Arrays:
        """The answers of a batch as arrays with a batch axis, for the Open Inference Protocol.

        What differs in length from frame to frame is filled up, class ids with -1 and all else with 0.
        """
        given = [tensors_of(a) for a in answers]
        found: Arrays = {}
        for name in dict.fromkeys(n for each in given for n in each):
            parts = [each[name] for each in given if name in each]
            most = [max(sides) for sides in zip(*(p.shape for p in parts), strict=True)]
            filled = np.full((len(given), *most), -1 if name == "class_ids" else 0, parts[0].dtype)
            for row, each in zip(filled, given, strict=True):
                if name in each:
                    row[tuple(slice(0, side) for side in each[name].shape)] = each[name]
            found[name] = filled
        return found

    def check(self, answer: Answer | None) -> Answer:
        """The answer that a server sent.

        Raises:
            ProtocolError: it is none of this task.
        """
        if not isinstance(answer, self.form) or (isinstance(answer, Tensors) and answer.task != self.name):
            raise ProtocolError(f"the server answered a {self.name} model's frame with something else")
        return answer


TASKS: Registry[type[Task]] = Registry(
    "headtail.tasks",
    "task",
    {
        "classification": "splitters.tasks.classification:ClassificationTask",
        "detection": "splitters.tasks.detection:DetectionTask",
        "keypoints": "splitters.tasks.objects:KeypointsTask",
        "oriented": "splitters.tasks.objects:OrientedTask",
        "instances": "splitters.tasks.objects:InstancesTask",
        "segmentation": "splitters.tasks.dense:SegmentationTask",
        "embedding": "splitters.tasks.dense:EmbeddingTask",
        "tensors": "splitters.tasks.tensors:TensorsTask",
    },
    error=BundleError,
)


def open_task(manifest: Manifest, *, local: bool = False) -> Task:
    """A bundle's task; with ``local`` for the outputs of its local model.

    Raises:
        BundleError: nobody registered the task, or ``postprocess`` does not fit it.
    """
    own = manifest.local if local else None
    preprocess = manifest.preprocess if own is None else own.preprocess
    return make_task(manifest.task, manifest.postprocess, preprocess, decoded=own is not None)


def make_task(name: str, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> Task:
    """A task by its name; see `Task` for the rest.

    Raises:
        BundleError: nobody registered it, or ``spec`` does not fit it.
    """
    try:
        return TASKS.get(name)(spec, preprocess, decoded=decoded)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(f"postprocess in the manifest does not fit the task {name}: {error!r}") from error


def form_of(name: str) -> type[Answer]:
    """How answers of the task of that name travel.

    Raises:
        BundleError: nobody registered it.
    """
    return TASKS.get(name).form


def task_of(answer: Answer) -> type[Task]:
    """Whose answer it is."""
    if isinstance(answer, Classification):
        return TASKS.get("classification")
    return TASKS.get("detection" if isinstance(answer, Detection) else answer.task)


def tensors_of(answer: Answer) -> Mapping[str, NDArray[Any]]:
    """An answer's arrays.

    Raises:
        ProtocolError: it holds none.
    """
    if not isinstance(answer, Tensors):
        raise ProtocolError(f"expected tensors, got a {type(answer).__name__}")
    return answer.arrays
