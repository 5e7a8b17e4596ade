"""A task: which output is the largest, and how large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from protos.messages import Answer, Tensors
from splitters.tasks.base import Floats, Labels, SizePx, Task, tensors_of
from splitters.tasks.canvas import Canvas


class Brightest(Task):
    name: ClassVar[str] = "brightest"

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        rows = outputs[0][: len(sizes_px)]
        return [Tensors(task=self.name, arrays={"index": np.array(row.argmax()), "value": np.array(row.max())}) for row in rows]

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {"index": ("int64", (-1,)), "value": ("float32", (-1,))}

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        return float(tensors_of(answer)["index"] == tensors_of(wanted)["index"]), 1.0

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        index = int(tensors_of(answer)["index"])
        return {"brightest": {"index": index, "label": labels[index], "value": float(tensors_of(answer)["value"])}}

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        return labels[int(tensors_of(answer)["index"])]

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        canvas.line(f"brightest: {cls.in_words(answer, labels)}")
