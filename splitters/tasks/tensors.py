"""Named raw outputs: the task of whatever has no other. Nothing is decoded; the caller knows what the numbers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from protos.errors import ModelError
from protos.messages import Answer, Tensors
from splitters.bundle.manifest import Preprocess
from splitters.tasks.base import Floats, Labels, SizePx, Task, tensors_of
from splitters.tasks.canvas import Canvas

_WRITTEN = 1024  # values of one tensor that a line of JSON holds


class TensorsTask(Task):
    """The model's outputs as they are.

    ``spec`` may have ``names``, one an output; ``output_0``, ``output_1`` … where it has none.
    """

    name: ClassVar[str] = "tensors"

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> None:
        super().__init__(spec, preprocess, decoded=decoded)
        names = spec.get("names", [])
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
            raise ValueError("names must be a list of different names")
        self._names = tuple(names)

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See `Task.decode`."""
        names = self._names or tuple(f"output_{i}" for i in range(len(outputs)))
        if len(names) != len(outputs):
            raise ModelError(f"the model has {len(outputs)} outputs, the manifest names {len(names)}")
        return [
            Tensors(task=self.name, arrays={name: output[i] for name, output in zip(names, outputs, strict=True)})
            for i in range(len(sizes_px))
        ]

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """See `Task.signature`; the shapes are known once the model has run."""
        return dict.fromkeys(self._names, ("float32", (-1,)))

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        """How close the tensors are, and how many there are.

        Each counts 1 less its distance from the wanted one over that one's length, and never less than 0.
        """
        mine, theirs = tensors_of(answer), tensors_of(wanted)
        if {n: a.shape for n, a in mine.items()} != {n: a.shape for n, a in theirs.items()}:
            return 0.0, 1.0
        return sum(_closeness(mine[name], theirs[name]) for name in theirs), float(len(theirs))

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        """``tensors``: dtype, shape, and the values where there are not too many."""
        del labels
        return {"tensors": {name: _described(array) for name, array in tensors_of(answer).items()}}

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        """Names and shapes."""
        del labels, more
        return ", ".join(f"{name} {'x'.join(map(str, a.shape)) or 'scalar'}" for name, a in tensors_of(answer).items())

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """Names and shapes, as a line of text."""
        canvas.line(cls.in_words(answer, labels))


def _closeness(mine: NDArray[Any], wanted: NDArray[Any]) -> float:
    if np.array_equal(mine, wanted, equal_nan=mine.dtype.kind == "f"):
        return 1.0
    a, b = (np.nan_to_num(array.astype(np.float64)) for array in (mine, wanted))
    return max(0.0, 1 - float(np.linalg.norm(a - b)) / (float(np.linalg.norm(b)) or 1.0))


def _described(array: NDArray[Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.size <= _WRITTEN:
        finite = array if array.dtype.kind != "f" else np.where(np.isfinite(array), array, np.nan)
        told["values"] = [None if v != v else v for v in finite.ravel().tolist()]
    return told
