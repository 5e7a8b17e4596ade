"""A class for every pixel, and a vector for every picture.

Shape legend: N batch, C classes, D numbers of a vector; a map lies over the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ProtocolError
from protos.messages import Answer, Tensors
from splitters.bundle.manifest import Preprocess
from splitters.tasks import runs
from splitters.tasks.base import Floats, Labels, SizePx, Task, tensors_of
from splitters.tasks.canvas import Canvas, label_of
from splitters.tasks.decoding import declared_decoding
from splitters.tasks.objects import shade

_WRITTEN = 20_000  # runs that a line of JSON holds
_NAMED = 5


class SegmentationTask(Task):
    """Logits (N, C, h, w), a logit or a share (N, 1, h, w), or class numbers (N, h, w), to a class map of the source frame.

    Arrays: ``run_lengths`` and ``run_values`` of the map row by row, ``mask_size`` (2,).
    """

    name: ClassVar[str] = "segmentation"

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> None:
        super().__init__(spec, preprocess, decoded=decoded)
        how = declared_decoding(spec)
        self._which, self._threshold = how.scores.outputs[0], how.threshold

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See `Task.decode`."""
        values = _declared(outputs, self._which)
        if values.ndim not in (3, 4):
            raise BundleError(f"a class map is (N, C, h, w) or (N, h, w), output {self._which} has shape {values.shape}")
        return [self._frame(each, size) for each, size in zip(values, sizes_px, strict=False)]

    def _frame(self, values: NDArray[Any], size_px: SizePx) -> Tensors:
        grids = values[None] if values.ndim == 2 else values
        moved = [runs.to_frame(g, self.preprocess, *size_px, smooth=values.ndim == 3) for g in grids]
        if len(moved) > 1:
            best = np.argmax(moved, axis=0)
        else:
            best = np.rint(moved[0]).astype(np.int64) if values.ndim == 2 else (moved[0] > self._threshold).astype(np.int64)
        lengths, kinds = runs.encode(best)
        size = np.asarray(runs.mask_size(*size_px), np.int32)
        return Tensors(task=self.name, arrays={"run_lengths": lengths, "run_values": kinds, "mask_size": size})

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """See `Task.signature`."""
        return {"run_lengths": ("int32", (-1, -1)), "run_values": ("int32", (-1, -1)), "mask_size": ("int32", (-1, 2))}

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        """The mean over classes of intersection over union, of one."""
        mine, theirs = class_map(answer), class_map(wanted)
        if mine.shape != theirs.shape:
            return 0.0, 1.0
        shares = [
            float(((mine == k) & (theirs == k)).sum()) / float(((mine == k) | (theirs == k)).sum())
            for k in np.unique([mine, theirs])
        ]
        return float(np.mean(shares)), 1.0

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        """``segmentation``: the share of each class, the map's size, and its runs where there are not too many."""
        arrays = tensors_of(answer)
        kinds, counts = np.unique(class_map(answer), return_counts=True)
        total = max(1, int(counts.sum()))
        told: dict[str, Any] = {
            "size": arrays["mask_size"].tolist(),
            "classes": [
                {"class_id": int(k), "label": labels.get(int(k), ""), "share": round(int(n) / total, 6)}
                for k, n in zip(kinds, counts, strict=True)
            ],
        }
        if arrays["run_lengths"].size <= _WRITTEN:
            told |= {"lengths": arrays["run_lengths"].tolist(), "values": arrays["run_values"].tolist()}
        return {"segmentation": told}

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        """The largest classes and their shares."""
        del more
        rows = cls.to_json(answer, labels)["segmentation"]["classes"]
        largest = sorted(rows, key=lambda r: -r["share"])[:_NAMED]
        return ", ".join(f"{label_of(r['class_id'], labels)} {r['share']:.0%}" for r in largest)

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """Each class but the first as a shade."""
        found = class_map(answer)
        for kind in np.unique(found):
            if kind:
                shade(canvas, found == kind, int(kind))
        canvas.line(cls.in_words(answer, labels))

    def check(self, answer: Answer | None) -> Answer:
        """See `Task.check`."""
        found = super().check(answer)
        class_map(found)
        return found


def class_map(answer: Answer) -> NDArray[np.int32]:
    """The class of every pixel (H, W).

    Raises:
        ProtocolError: the runs do not hold together.
    """
    arrays = tensors_of(answer)
    try:
        height, width = (int(v) for v in arrays["mask_size"])
        return runs.decode(arrays["run_lengths"], arrays["run_values"], (height, width))
    except (KeyError, ValueError) as error:
        raise ProtocolError(f"the answer's class map does not hold together: {error!r}") from error


def _declared(outputs: Sequence[Floats], which: int | str) -> Floats:
    """The one output that a decoding reads.

    Raises:
        BundleError: the model has no such output.
    """
    if not isinstance(which, int) or which >= len(outputs):
        raise BundleError(f"the decoding reads output {which}, the model has {len(outputs)}")
    return outputs[which]


class EmbeddingTask(Task):
    """A vector (N, D), as the model gives it: ``embedding`` (D,)."""

    name: ClassVar[str] = "embedding"

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> None:
        super().__init__(spec, preprocess, decoded=decoded)
        self._which = declared_decoding(spec).scores.outputs[0]

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See `Task.decode`."""
        vectors = _declared(outputs, self._which)
        return [Tensors(task=self.name, arrays={"embedding": v.ravel().astype(np.float32)}) for v in vectors[: len(sizes_px)]]

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """See `Task.signature`."""
        return {"embedding": ("float32", (-1, -1))}

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        """The cosine, not below 0, of one."""
        a, b = (tensors_of(each)["embedding"].astype(np.float64) for each in (answer, wanted))
        if a.shape != b.shape:
            return 0.0, 1.0
        length = float(np.linalg.norm(a) * np.linalg.norm(b))
        return (max(0.0, float(a @ b) / length) if length else float(np.array_equal(a, b))), 1.0

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        """``embedding``: its numbers."""
        del labels
        return {"embedding": [float(f"{v:.6g}") for v in tensors_of(answer)["embedding"].tolist()]}

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        """How many numbers, and its length."""
        del labels, more
        vector = tensors_of(answer)["embedding"]
        return f"a vector of {vector.size} numbers, length {float(np.linalg.norm(vector)):.3g}"

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """Its words."""
        canvas.line(cls.in_words(answer, labels))
