"""Which of C classes a frame shows: logits (N, C) to the most probable ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ProtocolError
from protos.messages import Answer, Classification, ClassScore
from splitters.bundle.manifest import Preprocess
from splitters.tasks.base import Arrays, Floats, Labels, SizePx, Task
from splitters.tasks.canvas import Canvas, label_of
from splitters.tasks.decoding import declared

TOP = 5
_DRAWN = 3


class ClassificationTask(Task):
    """Logits to the five most probable classes, or what ``spec`` declares; see `splitters.tasks.decoding`."""

    name: ClassVar[str] = "classification"
    form: ClassVar[type[Answer]] = Classification

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> None:
        super().__init__(spec, preprocess, decoded=decoded)
        kind = spec.get("kind", "softmax")
        if kind not in ("softmax", "declared"):
            raise BundleError(f"postprocess kind {kind!r} is unknown; a classification has softmax or declared")
        self._declared = declared(spec, preprocess) if kind == "declared" else None

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See `Task.decode`."""
        if self._declared is not None:
            return self._declared(outputs, sizes_px)
        logits = outputs[0].astype(np.float64)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        return [_top(row) for row in probabilities[: len(sizes_px)]]

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """See `Task.signature`."""
        return {"class_ids": ("int64", (-1, -1)), "scores": ("float32", (-1, -1))}

    @classmethod
    def arrays(cls, answers: Sequence[Answer]) -> Arrays:
        """See `Task.arrays`; short rows are padded with class -1."""
        return padded([[(s.class_id, s.score) for s in classes_of(a)] for a in answers])

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        """Whether the first class is the same, of one."""
        return float(classes_of(answer)[0].class_id == classes_of(wanted)[0].class_id), 1.0

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        """``predictions``, the most probable first."""
        rows = classes_of(answer)
        return {
            "predictions": [
                {"class_id": s.class_id, "label": labels.get(s.class_id, str(s.class_id)), "score": round(s.score, 6)} for s in rows
            ]
        }

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        """The first class and its probability."""
        del more
        return ", ".join(f"{label_of(s.class_id, labels)} {s.score:.2f}" for s in classes_of(answer)[:1])

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """The first classes as lines of text."""
        for s in classes_of(answer)[:_DRAWN]:
            canvas.line(f"{s.score:5.1%}  {label_of(s.class_id, labels)}")

    @classmethod
    def classes(cls, answer: Answer, *, score_min: float = 0.0) -> Counter[int]:
        """Of the first class, one."""
        return Counter(s.class_id for s in classes_of(answer)[:1] if s.score >= score_min)


def _top(probabilities: NDArray[np.float64]) -> Classification:
    count = min(TOP, probabilities.size)
    best = np.argsort(-probabilities, kind="stable")[:count]
    return Classification(top=tuple(ClassScore(class_id=int(i), score=float(probabilities[i])) for i in best))


def classes_of(answer: Answer) -> tuple[ClassScore, ...]:
    """The classes of a classification.

    Raises:
        ProtocolError: the answer is of another task.
    """
    if not isinstance(answer, Classification):
        raise ProtocolError(f"expected a classification, got a {type(answer).__name__}")
    return answer.top


def padded(rows: Sequence[Sequence[tuple[int, float]]]) -> Arrays:
    """Rows of (class, score) as arrays ``class_ids`` and ``scores`` (N, longest row)."""
    most = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), most), -1, np.int64)
    scores = np.zeros((len(rows), most), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = [class_id for class_id, _ in row]
        scores[i, : len(row)] = [score for _, score in row]
    return {"class_ids": ids, "scores": scores}
