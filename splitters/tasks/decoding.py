"""How raw outputs become an answer, declared as data: which columns are box, score and class, in what form, and what remains.

A declaration is JSON: one of the presets that ship with the package, or a user's file. Nothing in it is code.

Shape legend: N batch, P positions, queries or rows, C columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ConfigError, HeadtailError
from protos.messages import Answer, Box, Classification, ClassScore, Detection
from protos.schema import checked, read_json
from splitters.bundle.manifest import Preprocess
from splitters.tasks.boxes import nms, rotated_nms
from splitters.tasks.preprocess import geometry

Floats = NDArray[np.float32]
SizePx = tuple[int, int]

MAX_CANDIDATES = 3000
Axes = Literal["pc", "cp", "chw", "hwc", "p"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Some columns of one or several outputs, which lie one after the other along P.

    Attributes:
        outputs: indices or names of outputs.
        axes: their order after the batch: ``pc`` rows, ``cp`` columns first, ``chw`` and ``hwc`` maps, ``p`` one column.
        start, stop: which columns; without ``stop`` all that follow.
        activation: what is still to be applied.
    """

    outputs: tuple[int | str, ...] = (0,)
    axes: Axes = "pc"
    start: int = 0
    stop: int | None = None
    activation: Literal["none", "sigmoid", "softmax", "tanh"] = "none"

    def read(self, outputs: Sequence[Floats]) -> Floats:
        """(N, P, C).

        Raises:
            BundleError: an output is absent, of another rank, or has too few columns.
        """
        parts = []
        for which in self.outputs:
            if not isinstance(which, int) or not 0 <= which < len(outputs):
                raise BundleError(f"the decoding reads output {which!r}; the model has outputs 0..{len(outputs) - 1}")
            parts.append(_rows(np.asarray(outputs[which]), self.axes, which))
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        columns = joined.shape[2]
        if self.start >= columns or (self.stop is not None and self.stop > columns):
            raise BundleError(
                f"the decoding reads columns {self.start}..{self.stop or 'end'} of output {self.outputs[0]}, which has {columns}"
            )
        return activate(joined[..., self.start : self.stop].astype(np.float32, copy=False), self.activation)


def _rows(array: NDArray[Any], axes: Axes, which: int) -> NDArray[Any]:
    ranks = {"pc": 3, "cp": 3, "chw": 4, "hwc": 4, "p": 2}
    if array.ndim == ranks[axes] + 1 and array.shape[1] == 1:
        array = array[:, 0]
    if axes == "pc" and array.ndim == 2:
        array = array[:, None, :]
    if array.ndim != ranks[axes]:
        raise BundleError(
            f"output {which} has shape {array.shape}; decoding it as (N, {', '.join(axes.upper())}) needs {ranks[axes]} axes"
        )
    if axes == "cp":
        return array.transpose(0, 2, 1)
    if axes == "chw":
        return array.reshape(*array.shape[:2], -1).transpose(0, 2, 1)
    if axes == "hwc":
        return array.reshape(array.shape[0], -1, array.shape[3])
    return array[..., None] if axes == "p" else array


def activate(values: Floats, how: str) -> Floats:
    """Applies an activation over the last axis."""
    if how == "sigmoid":
        return _sigmoid(values)
    if how == "tanh":
        return np.asarray(np.tanh(values), np.float32)
    if how == "softmax":
        shifted = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)
    return values


def _sigmoid(values: Floats) -> Floats:
    half = np.float32(0.5)
    return np.asarray(half * (np.tanh(half * values) + np.float32(1)), np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxForm:
    """What the numbers of a box mean.

    Attributes:
        form: ``cxcywh``, ``xyxy``, ``xywh``, ``yxyx`` or ``ltrb`` (distances from the cell's centre to the sides).
        units: ``pixels`` of the model's input, ``normalised`` to 0..1 of it, or ``grid``: of cells, times the stride.
        size: how width and height are given on a grid: ``exp``, ``plain``, or ``sigmoid_of_input``, a share of the input.
        bins: with a distribution a side (DFL), how many bins a distance has; 0: plain distances.
        strides: of a grid's levels, in the order of the positions.
        cell: where in its cell a distance starts, in cells; with ``shift_px`` added.
        shift_px: see ``cell``.
    """

    form: Literal["cxcywh", "xyxy", "xywh", "yxyx", "ltrb"] = "xyxy"
    units: Literal["pixels", "normalised", "grid"] = "pixels"
    size: Literal["exp", "plain", "sigmoid_of_input"] = "plain"
    bins: int = 0
    strides: tuple[int, ...] = (8, 16, 32)
    cell: float = 0.0
    shift_px: float = 0.0

    def corners(self, raw: Floats, size_px: tuple[int, int]) -> Floats:
        """(N, P, 4 or 4·bins) to xyxy in pixels of the model's input of (height, width).

        Raises:
            BundleError: the columns or positions do not fit.
        """
        wanted = 4 * (self.bins or 1)
        if raw.shape[2] != wanted:
            raise BundleError(f"a box of this form has {wanted} columns, the output has {raw.shape[2]}")
        if self.bins:
            shares = activate(raw.reshape(*raw.shape[:2], 4, self.bins), "softmax")
            raw = (shares @ np.arange(self.bins, dtype=np.float32)).astype(np.float32)
        if self.units == "grid":
            return self._on_grid(raw, size_px)
        scale = np.asarray([size_px[1], size_px[0]] * 2, np.float32) if self.units == "normalised" else np.float32(1)
        if self.form == "yxyx":
            raw = raw[..., [1, 0, 3, 2]]
        return _corners(raw * scale, self.form)

    def _on_grid(self, raw: Floats, size_px: tuple[int, int]) -> Floats:
        cells, stride = grid(size_px, self.strides)
        if len(cells) != raw.shape[1]:
            raise BundleError(
                f"strides {list(self.strides)} give {len(cells)} positions at {size_px} px, the output has {raw.shape[1]}"
            )
        centre = (cells + np.float32(self.cell)) * stride + np.float32(self.shift_px)
        if self.form == "ltrb":
            reach = raw * stride
            return np.concatenate([centre - reach[..., :2], centre + reach[..., 2:]], axis=-1)
        middle = centre + raw[..., :2] * stride
        if self.size == "sigmoid_of_input":
            extent = _sigmoid(raw[..., 2:]) * np.asarray([size_px[1], size_px[0]], np.float32)
        else:
            extent = (np.exp(raw[..., 2:]) if self.size == "exp" else raw[..., 2:]) * stride
        return np.concatenate([middle - extent / 2, middle + extent / 2], axis=-1).astype(np.float32)


def _corners(raw: Floats, form: str) -> Floats:
    if form == "cxcywh":
        half = raw[..., 2:] / 2
        return np.concatenate([raw[..., :2] - half, raw[..., :2] + half], axis=-1)
    if form == "xywh":
        return np.concatenate([raw[..., :2], raw[..., :2] + raw[..., 2:]], axis=-1)
    return raw


def grid(size_px: tuple[int, int], strides: Sequence[int]) -> tuple[Floats, Floats]:
    """Cells (P, 2) as x, y, level after level in row-major order, and the stride (P, 1) of each."""
    cells, scale = [], []
    for stride in strides:
        rows, columns = -(-size_px[0] // stride), -(-size_px[1] // stride)
        y, x = np.mgrid[:rows, :columns]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        scale.append(np.full((x.size, 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(scale).astype(np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """The whole declaration.

    Attributes:
        task: what the answer is.
        scores: class scores; of a classifier, its only field.
        boxes, box: where boxes are and what they mean.
        objectness: a score of its own that the class scores are multiplied by.
        objectness_power: with it, score = objectness^power · class^(1 − power) rather than their product.
        class_id: where each row names its class and has a single score.
        background: a class column that means nothing: ``first`` or ``last``.
        label: ``best``, one class a position; ``every``, each class above the threshold.
        suppression: ``class``, ``agnostic`` or ``none`` (non-maximum suppression).
        score_min, iou, keep: lowest score reported, overlap at which the lesser box goes, and detections at most.
        class_ids: the id of each class column; empty: 0, 1, 2…
        extras: what else each row carries: key points, a box's angle in radians, or the coefficients of its mask.
        point_values: numbers of a key point: 2, or 3 with how sure it is.
        prototypes: the output (N, coefficients, h, w) whose weighted sums are masks.
    """

    task: Literal["classification", "detection", "keypoints", "oriented", "instances", "segmentation", "embedding"]
    scores: Columns = field(default_factory=Columns)
    boxes: Columns | None = None
    box: BoxForm = field(default_factory=BoxForm)
    objectness: Columns | None = None
    objectness_power: float | None = None
    class_id: Columns | None = None
    background: Literal["none", "first", "last"] = "none"
    label: Literal["best", "every"] = "best"
    suppression: Literal["class", "agnostic", "none"] = "class"
    score_min: float = 0.25
    iou: float = 0.65
    keep: int = 100
    class_ids: tuple[int, ...] = ()
    extras: Columns | None = None
    point_values: Literal[2, 3] = 3
    prototypes: int | str | None = None

    def __post_init__(self) -> None:
        objects = self.task in ("detection", "keypoints", "oriented", "instances")
        if objects and self.boxes is None:
            raise ConfigError(f"the decoding of {self.task} must say where its boxes are")
        if objects and self.task != "detection" and self.extras is None:
            raise ConfigError(f"the decoding of {self.task} must say where its extras are")
        if self.task == "instances" and self.prototypes is None:
            raise ConfigError("the decoding of instances must say which output holds their prototypes")
        if not (0 <= self.score_min <= 1 and 0 < self.iou <= 1 and 1 <= self.keep <= 5000):
            raise ConfigError("score_min lies in 0..1, iou in 0..1 and keep in 1..5000")

    def to_json(self) -> dict[str, Any]:
        """For a manifest's ``postprocess``."""
        return {"kind": "declared", **json.loads(json.dumps(asdict(self)))}

    def columns(self) -> list[Columns]:
        """Every field that reads an output."""
        return [c for c in (self.scores, self.boxes, self.objectness, self.class_id, self.extras) if c is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A declaration by name, with the preprocessing that belongs to it.

    Attributes:
        about: one line.
        decoding: the declaration.
        preprocess: fields of the manifest's ``preprocess``; the size comes from the model.
    """

    about: str
    decoding: Decoding
    preprocess: Mapping[str, Any] = field(default_factory=dict)


def preset_names() -> tuple[str, ...]:
    """All that ship with the package."""
    folder = resources.files("splitters.tasks") / "presets"
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


def read_preset(name: str) -> Preset:
    """A preset by its name, or a user's file by its path.

    Raises:
        ConfigError: there is none of that name, or the file is no declaration.
    """
    if name.endswith(".json"):
        try:
            text = Path(name).read_bytes()
        except OSError as error:
            raise ConfigError(f"--output {name} cannot be read: {error.strerror}") from error
        try:
            raw = json.loads(text)
        except ValueError:
            raw = None
        if isinstance(raw, dict) and "decoding" not in raw:  # the declaration alone
            return Preset(about=name, decoding=checked(raw, Decoding, what=name, error=ConfigError))
        return read_json(text, Preset, what=name, error=ConfigError)
    if name not in preset_names():
        raise ConfigError(f"--output {name!r} is unknown; it is auto, a FILE.json, or one of {', '.join(preset_names())}")
    text = (resources.files("splitters.tasks") / "presets" / f"{name}.json").read_bytes()
    return read_json(text, Preset, what=f"preset {name}", error=ConfigError)


class Declared:
    """Decodes as declared.

    Args:
        decoding: outputs named by index.
        preprocess: of the pictures, whose geometry boxes go back through.
    """

    def __init__(self, decoding: Decoding, preprocess: Preprocess) -> None:
        self._how = decoding
        self._preprocess = preprocess

    def __call__(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See ``Postprocess``.

        Raises:
            BundleError: the outputs do not have the form declared.
        """
        if self._how.task == "classification":
            return self._classes(outputs, sizes_px)
        return self._detections(outputs, sizes_px)

    def _ids(self, columns: int) -> NDArray[np.int64]:
        ids = np.asarray(self._how.class_ids or range(columns), np.int64)
        if len(ids) != columns:
            raise BundleError(f"{len(ids)} class ids are declared, the output has {columns} classes")
        return ids

    def _foreground(self, scores: Floats) -> Floats:
        if self._how.background == "none":
            return scores
        return scores[..., 1:] if self._how.background == "first" else scores[..., :-1]

    def _classes(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        scores = self._foreground(self._how.scores.read(outputs))
        if scores.shape[1] != 1:
            raise BundleError(f"a classifier's output is (N, classes), this one has shape {scores.shape}")
        ids = self._ids(scores.shape[2])
        answers: list[Answer] = []
        for row in scores[: len(sizes_px), 0]:
            best = np.argsort(-row, kind="stable")[:5]
            top = tuple(ClassScore(class_id=int(ids[i]), score=float(np.clip(row[i], 0, 1))) for i in best)
            answers.append(Classification(top=top))
        return answers

    def _detections(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        return [
            _detection(geometry(self._preprocess, *size).to_source(k.boxes_px, *size), k.scores, k.class_ids)
            for k, size in zip(self.kept(outputs), sizes_px, strict=False)
        ]

    def kept(self, outputs: Sequence[Floats]) -> list[Kept]:
        """Of every frame the rows that are reported, in pixels of the model's input.

        Raises:
            BundleError: the outputs do not have the form declared.
        """
        how = self._how
        if how.boxes is None:  # checked when it was made
            raise BundleError("the decoding says of no output that it holds boxes")
        boxes = how.box.corners(how.boxes.read(outputs), self._preprocess.size_px)
        scores = self._foreground(how.scores.read(outputs))
        if how.objectness is not None:
            objectness = how.objectness.read(outputs)
            if how.objectness_power is None:
                scores = objectness * scores
            else:
                scores = (objectness**how.objectness_power * scores ** (1 - how.objectness_power)).astype(np.float32)
        named = how.class_id.read(outputs) if how.class_id is not None else None
        extras = how.extras.read(outputs) if how.extras is not None else None
        for each in (scores, named, extras):
            if each is not None and each.shape[1] != boxes.shape[1]:
                raise BundleError(f"{boxes.shape[1]} boxes come with {each.shape[1]} rows of scores, classes or extras")
        ids = self._ids(scores.shape[2]) if named is None else None
        return [
            self._frame(b, s, None if named is None else named[n, :, 0], ids, None if extras is None else extras[n])
            for n, (b, s) in enumerate(zip(boxes, scores, strict=True))
        ]

    def _frame(
        self, boxes: Floats, scores: Floats, named: Floats | None, ids: NDArray[np.int64] | None, extras: Floats | None
    ) -> Kept:
        how = self._how
        if how.label == "best" or named is not None:
            columns = scores.argmax(axis=1)
            values = scores[np.arange(len(scores)), columns]
            rows = np.flatnonzero(values > how.score_min)
            values, columns = values[rows], columns[rows]
        else:
            rows, columns = np.nonzero(scores > how.score_min)
            values = scores[rows, columns]
        if values.size > MAX_CANDIDATES:
            best = np.argpartition(-values, MAX_CANDIDATES)[:MAX_CANDIDATES]
            rows, columns, values = rows[best], columns[best], values[best]
        kinds = np.rint(named[rows]).astype(np.int64) if named is not None else columns if ids is None else ids[columns]
        found, values = boxes[rows].astype(np.float32), values.astype(np.float32)
        groups = kinds if how.suppression == "class" else np.zeros_like(kinds)
        if how.suppression == "none":
            order = np.argsort(-values, kind="stable")[: how.keep]
        elif how.task == "oriented" and extras is not None:
            order = rotated_nms(found, extras[rows, 0], values, groups, iou=how.iou, keep=how.keep)
        else:
            order = nms(found, values, groups, iou=how.iou, keep=how.keep)
        return Kept(
            boxes_px=found[order], scores=values[order], class_ids=kinds[order].astype(np.int64),
            extras=extras[rows[order]] if extras is not None else np.zeros((len(order), 0), np.float32),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The rows of one frame that are reported, the surest first.

    Attributes:
        boxes_px: (K, 4) xyxy in pixels of the model's input.
        scores: (K,).
        class_ids: (K,).
        extras: (K, E) what else each row carries.
    """

    boxes_px: Floats
    scores: Floats
    class_ids: NDArray[np.int64]
    extras: Floats


def _detection(corners: Floats, scores: Floats, kinds: NDArray[np.int64]) -> Detection:
    right_way = (
        (corners[:, 2] >= corners[:, 0]) & (corners[:, 3] >= corners[:, 1]) & np.isfinite(corners).all(axis=1) & (kinds >= 0)
    )
    found = zip(corners[right_way].tolist(), np.clip(scores[right_way], 0, 1).tolist(), kinds[right_way].tolist(), strict=True)
    return Detection(boxes=tuple(Box(class_id=k, score=s, box_px=(b[0], b[1], b[2], b[3])) for b, s, k in found))


def declared(spec: Mapping[str, Any], preprocess: Preprocess) -> Declared:
    """What a manifest's ``postprocess`` of kind ``declared`` says.

    Raises:
        BundleError: it is no declaration.
    """
    return Declared(declared_decoding(spec), preprocess)


def declared_decoding(spec: Mapping[str, Any]) -> Decoding:
    """The declaration in a manifest's ``postprocess``.

    Raises:
        BundleError: it is none.
    """
    fields = {k: v for k, v in spec.items() if k != "kind"}
    try:
        return checked(json.loads(json.dumps(fields)), Decoding, what="the manifest's decoding")
    except HeadtailError as error:
        raise BundleError(error.message) from error
