"""Where objects are: boxes (N, P, 4) and scores (N, P, C) to detections in source-frame pixels.

Shape legend: N batch, P positions or candidate boxes, C classes, K boxes kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ProtocolError
from protos.messages import Answer, Box, Detection
from splitters.bundle.manifest import Preprocess
from splitters.tasks.base import Arrays, Floats, Labels, SizePx, Task
from splitters.tasks.canvas import Canvas, label_of
from splitters.tasks.classification import padded
from splitters.tasks.decoding import declared
from splitters.tasks.decoding.boxes import iou_matrix, select, yolox_boxes
from splitters.tasks.preprocess import geometry

_NAMED = 6  # classes in one line of text
_SAME = 0.5  # overlap from which on two boxes are the same object

Decoding = Callable[[Sequence[Floats], Preprocess], tuple[Floats, Floats]]
"""Raw outputs to boxes (N, P, 4) xyxy in input pixels and scores (N, P, C)."""

DECODINGS: Mapping[str, Decoding] = {
    "dense_boxes": lambda outputs, _: (outputs[0], outputs[1]),
    "yolox": lambda outputs, preprocess: yolox_boxes(outputs[0], preprocess.size_px),
}


class DetectionTask(Task):
    """Raw outputs to boxes, after non-maximum suppression.

    ``spec`` has ``kind``: ``declared`` (see `splitters.tasks.decoding`), empty (the tail decodes by itself), or one of `DECODINGS`,
    with ``class_ids`` (C,), the id of each score column, and perhaps ``score_min``, ``iou`` and ``keep``.
    """

    name: ClassVar[str] = "detection"
    form: ClassVar[type[Answer]] = Detection

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> None:
        super().__init__(spec, preprocess, decoded=decoded)
        kind = spec.get("kind", "")
        if kind not in ("", "declared", *DECODINGS):
            raise BundleError(f"postprocess kind {kind!r} is unknown; a detection has one of {', '.join(DECODINGS)}, declared")
        self._declared = declared(spec, preprocess) if kind == "declared" else None
        self._decoding = DECODINGS["dense_boxes" if decoded else kind] if kind in DECODINGS else None
        self._ids = np.asarray(spec["class_ids"] if kind in DECODINGS else [], np.int64)
        self._score_min = float(spec.get("score_min", 0.05))
        self._iou = float(spec.get("iou", 0.65))
        self._keep = int(spec.get("keep", 100))

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See `Task.decode`."""
        if self._declared is not None:
            return self._declared(outputs, sizes_px)
        if self._decoding is None:
            raise BundleError("the manifest does not say how the outputs become boxes")
        boxes, scores = self._decoding(outputs, self.preprocess)
        return [self._frame(b, s, size) for b, s, size in zip(boxes, scores, sizes_px, strict=False)]

    def _frame(self, boxes: Floats, scores: Floats, size_px: SizePx) -> Detection:
        found = select(boxes, scores, self._ids, score_min=self._score_min, iou=self._iou, keep=self._keep)
        source = geometry(self.preprocess, *size_px).to_source(found.boxes_px.astype(np.float32), *size_px)
        return detection(source, found.scores, found.class_ids)

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """See `Task.signature`."""
        return {"class_ids": ("int64", (-1, -1)), "scores": ("float32", (-1, -1)), "boxes": ("float32", (-1, -1, 4))}

    @classmethod
    def empty(cls) -> Answer | None:
        """No box."""
        return Detection(boxes=())

    @classmethod
    def arrays(cls, answers: Sequence[Answer]) -> Arrays:
        """See `Task.arrays`; short rows are padded with class -1."""
        rows = [boxes_of(a) for a in answers]
        found = padded([[(b.class_id, b.score) for b in row] for row in rows])
        boxes = np.zeros((*found["scores"].shape, 4), np.float32)
        for i, row in enumerate(rows):
            boxes[i, : len(row)] = [b.box_px for b in row] if row else np.zeros((0, 4))
        return {**found, "boxes": boxes}

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        """Boxes of both sides that agree, of all: summed over photos, F1.

        A box agrees with one of the wanted of its class that it overlaps by half or more; each counts once, the surest first.
        """
        mine, theirs = boxes_of(answer), boxes_of(wanted)
        hits = 0
        for class_id in {b.class_id for b in theirs} & {b.class_id for b in mine}:
            pair = ([b.box_px for b in boxes if b.class_id == class_id] for boxes in (mine, theirs))
            overlap = iou_matrix(*(np.array(corners, np.float32) for corners in pair))
            for row in overlap:
                best = int(row.argmax())
                if row[best] >= _SAME:
                    hits += 1
                    overlap[:, best] = -1.0
        return 2.0 * hits, float(len(mine) + len(theirs))

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        """``detections``, the surest first."""
        return {
            "detections": [
                {
                    "class_id": b.class_id, "label": labels.get(b.class_id, str(b.class_id)), "score": round(b.score, 6),
                    "box_px": [round(v, 2) for v in b.box_px],
                }
                for b in boxes_of(answer)
            ]
        }  # fmt: skip

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        """How many of each class; with ``more`` the surest boxes, too."""
        boxes = boxes_of(answer)
        counts = Counter(label_of(box.class_id, labels) for box in boxes).most_common()
        rest = f" and {len(counts) - _NAMED} more kinds" if len(counts) > _NAMED else ""
        words = ", ".join(f"{name} {n}" for name, n in counts[:_NAMED]) + rest if counts else "nothing"
        if more and boxes:
            words += "  (" + ", ".join(f"{label_of(b.class_id, labels)} {b.score:.2f}" for b in boxes[:_NAMED]) + ")"
        return words

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """All boxes with their labels."""
        canvas.boxes([(b.box_px, f"{label_of(b.class_id, labels)} {b.score:.2f}", b.class_id) for b in boxes_of(answer)])

    @classmethod
    def classes(cls, answer: Answer, *, score_min: float = 0.0) -> Counter[int]:
        """See `Task.classes`."""
        return Counter(box.class_id for box in boxes_of(answer) if box.score >= score_min)


def boxes_of(answer: Answer) -> tuple[Box, ...]:
    """The boxes of a detection.

    Raises:
        ProtocolError: the answer is of another task.
    """
    if not isinstance(answer, Detection):
        raise ProtocolError(f"expected a detection, got a {type(answer).__name__}")
    return answer.boxes


def detection(boxes_px: Floats, scores: NDArray[Any], class_ids: NDArray[Any]) -> Detection:
    """Arrays (K, 4), (K,), (K,) as an answer."""
    rows = zip(boxes_px.tolist(), scores.tolist(), class_ids.tolist(), strict=True)
    return Detection(boxes=tuple(Box(class_id=int(c), score=float(s), box_px=(b[0], b[1], b[2], b[3])) for b, s, c in rows))
