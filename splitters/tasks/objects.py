"""Objects that carry more than a box: key points, an angle, or a mask.

Their answers travel as arrays: ``boxes`` (K, 4) xyxy in source pixels, ``scores`` (K,), ``class_ids`` (K,), the surest first, and
what the task adds. Everything before that, suppression included, is a detection's and is declared in the same way.

Shape legend: K objects of a frame, J key points of an object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ProtocolError
from protos.messages import Answer, Box, Detection, Tensors
from splitters.bundle.manifest import Preprocess
from splitters.tasks import runs
from splitters.tasks.base import Arrays, Floats, Labels, SizePx, Task, tensors_of
from splitters.tasks.canvas import Canvas, class_colour, label_of
from splitters.tasks.decoding import Kept, declared, declared_decoding
from splitters.tasks.detection import DetectionTask
from splitters.tasks.preprocess import geometry

_SURE = 0.5  # a key point below is not drawn
_SHADE = 0.45
_OWN = ("boxes", "scores", "class_ids")


class ObjectsTask(Task):
    """What the three have in common; ``spec`` is declared, see `splitters.tasks.decoding`."""

    added: ClassVar[Mapping[str, tuple[str, tuple[int, ...]]]] = {}
    """The arrays of `more`, as `Task.signature` gives them."""

    def __init__(self, spec: Mapping[str, Any], preprocess: Preprocess, *, decoded: bool = False) -> None:
        super().__init__(spec, preprocess, decoded=decoded)
        self.how = declared_decoding(spec)
        if self.how.task != self.name:
            raise BundleError(f"the decoding declares {self.how.task}, the manifest's task is {self.name}")
        self._declared = declared(spec, preprocess)

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See `Task.decode`."""
        answers: list[Answer] = []
        for number, (kept, size) in enumerate(zip(self._declared.kept(outputs), sizes_px, strict=False)):
            boxes = geometry(self.preprocess, *size).to_source(kept.boxes_px, *size)
            own: Arrays = {"boxes": boxes, "scores": np.clip(kept.scores, 0, 1), "class_ids": kept.class_ids}
            answers.append(Tensors(task=self.name, arrays={**own, **self.more(kept, outputs, number, size)}))
        return answers

    def more(self, kept: Kept, outputs: Sequence[Floats], number: int, size_px: SizePx) -> Arrays:
        """The arrays that the task adds, of frame ``number`` of the batch."""
        raise NotImplementedError

    @classmethod
    def object_json(cls, arrays: Mapping[str, NDArray[Any]], index: int) -> dict[str, Any]:
        """What one object's line of JSON says beyond its box."""
        raise NotImplementedError

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """See `Task.signature`."""
        own = {"boxes": ("float32", (-1, -1, 4)), "scores": ("float32", (-1, -1)), "class_ids": ("int64", (-1, -1))}
        return {**own, **self.added}

    @classmethod
    def empty(cls) -> Answer | None:
        """No object."""
        return Tensors(
            task=cls.name,
            arrays={"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0, np.float32), "class_ids": np.zeros(0, np.int64)},
        )

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        """As of a detection, by boxes."""
        return DetectionTask.agreement(as_detection(answer), as_detection(wanted))

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        """``detections``, the surest first, each with what the task adds."""
        arrays = _of(answer)
        rows = DetectionTask.to_json(as_detection(answer), labels)["detections"]
        return {"detections": [{**row, **cls.object_json(arrays, i)} for i, row in enumerate(rows)]}

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        """As of a detection."""
        return DetectionTask.in_words(as_detection(answer), labels, more=more)

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """All boxes with their labels."""
        DetectionTask.draw(canvas, as_detection(answer), labels)

    @classmethod
    def classes(cls, answer: Answer, *, score_min: float = 0.0) -> Counter[int]:
        """See `Task.classes`."""
        return DetectionTask.classes(as_detection(answer), score_min=score_min)

    def check(self, answer: Answer | None) -> Answer:
        """See `Task.check`; arrays that do not fit one another are refused, too."""
        found = super().check(answer)
        as_detection(found)
        return found


class KeypointsTask(ObjectsTask):
    """Adds ``keypoints`` (K, J, 3): x, y in source pixels, and how sure, 0..1."""

    name: ClassVar[str] = "keypoints"
    added: ClassVar[Mapping[str, tuple[str, tuple[int, ...]]]] = {"keypoints": ("float32", (-1, -1, -1, 3))}

    def more(self, kept: Kept, outputs: Sequence[Floats], number: int, size_px: SizePx) -> Arrays:
        """See `ObjectsTask.more`."""
        del outputs, number
        width = self.how.point_values
        if kept.extras.shape[1] % width:
            raise BundleError(f"{kept.extras.shape[1]} columns are no key points of {width} numbers each")
        points = kept.extras.reshape(len(kept.extras), kept.extras.shape[1] // width, width)
        flat = points[..., :2].reshape(-1, 2)
        source = geometry(self.preprocess, *size_px).to_source(np.concatenate([flat, flat], axis=1), *size_px)[:, :2]
        sure = points[..., 2:3] if width == 3 else np.ones((*points.shape[:2], 1), np.float32)
        return {"keypoints": np.concatenate([source.reshape(*points.shape[:2], 2), sure], axis=2).astype(np.float32)}

    @classmethod
    def object_json(cls, arrays: Mapping[str, NDArray[Any]], index: int) -> dict[str, Any]:
        """``keypoints``: [x, y, how sure] of each."""
        points = arrays["keypoints"][index] if "keypoints" in arrays else np.zeros((0, 3))
        return {"keypoints": [[round(float(v), 3) for v in point] for point in points]}

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """Boxes, and a dot at every point that is sure."""
        super().draw(canvas, answer, labels)
        arrays = _of(answer)
        for points, kind in zip(arrays.get("keypoints", np.zeros((0, 0, 3))), arrays["class_ids"], strict=False):
            for x, y, sure in points:
                if sure >= _SURE:
                    at = (round(float(x) * canvas.scale), round(float(y) * canvas.scale))
                    cv2.circle(canvas.picture, at, 4, class_colour(int(kind)), -1, cv2.LINE_AA)


class OrientedTask(ObjectsTask):
    """Adds ``corners`` (K, 4, 2): of the turned box, in source pixels; ``boxes`` are what encloses them."""

    name: ClassVar[str] = "oriented"
    added: ClassVar[Mapping[str, tuple[str, tuple[int, ...]]]] = {"corners": ("float32", (-1, -1, 4, 2))}

    def more(self, kept: Kept, outputs: Sequence[Floats], number: int, size_px: SizePx) -> Arrays:
        """See `ObjectsTask.more`."""
        del outputs, number
        if kept.extras.shape[1] != 1:
            raise BundleError(f"a box has one angle, the decoding reads {kept.extras.shape[1]} columns")
        middle = (kept.boxes_px[:, None, :2] + kept.boxes_px[:, None, 2:]) / 2
        half = (kept.boxes_px[:, None, 2:] - kept.boxes_px[:, None, :2]) / 2
        cos, sin = np.cos(kept.extras)[..., None], np.sin(kept.extras)[..., None]
        local = half * np.asarray([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32)
        turned = np.concatenate([local[..., :1] * cos - local[..., 1:] * sin, local[..., :1] * sin + local[..., 1:] * cos], axis=2)
        where = geometry(self.preprocess, *size_px)
        offset = np.asarray([where.offset_x_px, where.offset_y_px], np.float32)
        corners = ((middle + turned - offset) / np.asarray([where.scale_x, where.scale_y], np.float32)).astype(np.float32)
        limit = np.asarray(size_px, np.float32)
        low, high = np.clip(corners.min(axis=1), 0, limit), np.clip(corners.max(axis=1), 0, limit)
        return {"corners": corners, "boxes": np.concatenate([low, high], axis=1).astype(np.float32)}

    @classmethod
    def object_json(cls, arrays: Mapping[str, NDArray[Any]], index: int) -> dict[str, Any]:
        """``corners_px``: the four, going round."""
        return {"corners_px": [[round(float(v), 2) for v in corner] for corner in arrays["corners"][index]]}

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """The turned boxes."""
        arrays = _of(answer)
        for corners, kind, score in zip(arrays.get("corners", ()), arrays["class_ids"], arrays["scores"], strict=False):
            line = np.rint(corners * canvas.scale).astype(np.int32)
            cv2.polylines(canvas.picture, [line], True, class_colour(int(kind)), 2, cv2.LINE_AA)
            text = f"{label_of(int(kind), labels)} {float(score):.2f}"
            x, y = line.min(axis=0)
            cv2.putText(canvas.picture, text, (int(x), max(12, int(y))), cv2.FONT_HERSHEY_SIMPLEX, 0.5, class_colour(int(kind)), 1)


class InstancesTask(ObjectsTask):
    """Adds masks as run lengths: ``run_lengths``, ``run_values``, ``runs`` (K,) how many are each object's, ``mask_size`` (2,)."""

    name: ClassVar[str] = "instances"
    added: ClassVar[Mapping[str, tuple[str, tuple[int, ...]]]] = {
        "run_lengths": ("int32", (-1, -1)), "run_values": ("uint8", (-1, -1)),
        "runs": ("int32", (-1, -1)), "mask_size": ("int32", (-1, 2)),
    }  # fmt: skip

    def more(self, kept: Kept, outputs: Sequence[Floats], number: int, size_px: SizePx) -> Arrays:
        """See `ObjectsTask.more`."""
        which = self.how.prototypes
        if not isinstance(which, int) or which >= len(outputs) or outputs[which].ndim != 4:
            raise BundleError(f"output {which} holds no prototypes (N, coefficients, h, w)")
        prototypes = outputs[which][number].astype(np.float32)
        if prototypes.shape[0] != kept.extras.shape[1]:
            raise BundleError(f"{kept.extras.shape[1]} coefficients come with {prototypes.shape[0]} prototypes")
        boxes = geometry(self.preprocess, *size_px).to_source(kept.boxes_px, *size_px)
        height, width = runs.mask_size(*size_px)
        lengths, values, counts = [], [], []
        for coefficients, box in zip(kept.extras, boxes, strict=True):
            logits = np.tensordot(coefficients, prototypes, axes=1).astype(np.float32)
            inside = np.zeros((height, width), bool)
            x1, y1, x2, y2 = box * np.asarray([width / size_px[0], height / size_px[1]] * 2, np.float32)
            area = (slice(int(y1), int(np.ceil(y2))), slice(int(x1), int(np.ceil(x2))))
            inside[area] = runs.to_frame(logits, self.preprocess, *size_px)[area] > 0
            each = runs.encode(inside)
            lengths.append(each[0])
            values.append(each[1].astype(np.uint8))
            counts.append(len(each[0]))
        return {
            "run_lengths": np.concatenate(lengths) if lengths else np.zeros(0, np.int32),
            "run_values": np.concatenate(values) if values else np.zeros(0, np.uint8),
            "runs": np.asarray(counts, np.int32), "mask_size": np.asarray([height, width], np.int32),
        }  # fmt: skip

    @classmethod
    def object_json(cls, arrays: Mapping[str, NDArray[Any]], index: int) -> dict[str, Any]:
        """``mask``: its size and the lengths of its runs, row by row; the first run is outside."""
        lengths, values = _mask_runs(arrays, index)
        first = [0] if len(values) and values[0] else []
        return {"mask": {"size": arrays["mask_size"].tolist(), "counts": [*first, *lengths.tolist()]}}

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        """Masks as shades, then boxes."""
        arrays = _of(answer)
        for index, kind in enumerate(arrays["class_ids"]):
            shade(canvas, mask_of(arrays, index), int(kind))
        super().draw(canvas, answer, labels)

    def check(self, answer: Answer | None) -> Answer:
        """See `Task.check`."""
        found = super().check(answer)
        arrays = _of(found)
        for index in range(len(arrays["class_ids"])):
            mask_of(arrays, index)
        return found


def _mask_runs(arrays: Mapping[str, NDArray[Any]], index: int) -> tuple[NDArray[Any], NDArray[Any]]:
    counts = arrays["runs"].astype(np.int64)
    start = int(counts[:index].sum())
    part = slice(start, start + int(counts[index]))
    return arrays["run_lengths"][part], arrays["run_values"][part]


def mask_of(arrays: Mapping[str, NDArray[Any]], index: int) -> NDArray[np.bool_]:
    """One object's mask (H, W).

    Raises:
        ProtocolError: the answer holds none that fits.
    """
    try:
        height, width = (int(v) for v in arrays["mask_size"])
        return runs.decode(*_mask_runs(arrays, index), (height, width)) > 0
    except (KeyError, IndexError, ValueError) as error:
        raise ProtocolError(f"the answer's masks do not hold together: {error!r}") from error


def shade(canvas: Canvas, mask: NDArray[np.bool_], number: int) -> None:
    """Tints what a mask covers."""
    height, width = canvas.picture.shape[:2]
    covered = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    colour = np.asarray(class_colour(number), np.float32)
    canvas.picture[covered] = (canvas.picture[covered] * (1 - _SHADE) + colour * _SHADE).astype(np.uint8)


def _of(answer: Answer) -> Mapping[str, NDArray[Any]]:
    return tensors_of(answer)


def as_detection(answer: Answer) -> Detection:
    """Boxes, scores and classes alone.

    Raises:
        ProtocolError: the arrays do not fit one another.
    """
    arrays = _of(answer)
    try:
        boxes, scores, kinds = (arrays[name] for name in _OWN)
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes) == len(scores) == len(kinds):
            raise ValueError(f"{boxes.shape}, {scores.shape} and {kinds.shape}")
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all() and (kinds >= 0).all()):
            raise ValueError("numbers out of range")
        rows = zip(boxes.tolist(), scores.tolist(), kinds.tolist(), strict=True)
        return Detection(boxes=tuple(Box(class_id=k, score=s, box_px=(b[0], b[1], b[2], b[3])) for b, s, k in rows))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ProtocolError(f"boxes, scores and class_ids of an answer do not fit one another: {error}") from error
