"""What a model's outputs mean, guessed from their shapes and values and from what its exporter wrote beside the graph.

A guess is said aloud, with its reason. Where two forms fit, none is taken: the error names both.

Shape legend: N batch (1 here), P positions, C columns.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.tasks.decoding import Columns, Decoding, Preset, grid, read_preset

Array = NDArray[Any]

_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32))
_EXTRAS = {"pose": "yolo-pose", "obb": "yolo-obb", "segment": "yolo-segment"}
_ULTRALYTICS = {"detect", "segment", "pose", "obb", "classify"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """A preset, and why."""

    preset: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What is known of a model's outputs.

    Attributes:
        names: in order.
        values: of one picture, batch of one.
        size_px: (height, width) of the input.
        metadata: of the file.
    """

    names: tuple[str, ...]
    values: tuple[Array, ...]
    size_px: tuple[int, int]
    metadata: Mapping[str, str]

    def shapes(self) -> str:
        """For messages."""
        return ", ".join(f"{n} {tuple(v.shape)}" for n, v in zip(self.names, self.values, strict=True))


def labels_of(metadata: Mapping[str, str]) -> dict[int, str]:
    """Class names as Ultralytics writes them: a dict or list as Python or JSON text; empty where there are none."""
    for key in ("names", "classes", "labels"):
        text = metadata.get(key, "")
        if not text or len(text) > 1 << 20:
            continue
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list | tuple):
            found = dict(enumerate(found))
        if isinstance(found, dict) and all(isinstance(k, int) and 0 <= k < 10**6 for k in found):
            return {k: str(v)[:200] for k, v in found.items()}
    return {}


def guess(outputs: Outputs) -> Guess:
    """The preset that fits.

    Raises:
        ConfigError: none fits, or more than one does.
    """
    task = outputs.metadata.get("task", "")
    if task in _ULTRALYTICS and "stride" in outputs.metadata:
        return _ultralytics(outputs, task)
    found = [g for rule in (_classifier, _named, _map, _queries, _levels, _one_detector) for g in rule(outputs)]
    if not found:
        raise ConfigError(
            f"nothing is known of outputs like these: {outputs.shapes()}; say what they are with --output PRESET or FILE.json"
        )
    if len({g.preset for g in found}) > 1:
        names = " or ".join(f"{g.preset} ({g.why})" for g in found)
        raise ConfigError(f"the outputs {outputs.shapes()} may be {names}; say which with --output")
    return found[0]


def _ultralytics(outputs: Outputs, task: str) -> Guess:
    first = outputs.values[0]
    said = f"Ultralytics wrote task={task}"
    classes = len(labels_of(outputs.metadata))
    if task == "classify":
        return Guess(preset="yolo-classify" if _is_shares(first) else "softmax", why=said)
    if task == "detect":
        shape = f"{said}; output {tuple(first.shape)}"
        if first.ndim == 3 and first.shape[2] == 6 and (classes != 2 or first.shape[1] <= 300):
            return Guess(preset="end-to-end", why=f"{shape}: suppression is in the graph")
        if first.ndim == 3 and classes and first.shape[1] == 4 + classes:
            return Guess(preset="yolov8", why=shape)
        if first.ndim == 3 and classes and first.shape[2] == 4 + classes:
            return Guess(preset="rtdetr-ultralytics", why=shape)
        if first.ndim == 3 and classes and first.shape[2] == 5 + classes:
            return Guess(preset="yolov5", why=shape)
    if task in _EXTRAS and first.ndim == 3:
        return Guess(preset=_EXTRAS[task], why=f"{said}; output {tuple(first.shape)}")
    raise ConfigError(
        f"{said}, and outputs {outputs.shapes()} of {classes or 'unknown'} classes have no preset; use --output FILE.json"
    )


def _is_shares(values: Array) -> bool:
    """Whether each row of the last axis is a set of shares: 0..1, with the sum 1."""
    flat = values.astype(np.float64)
    return bool((flat >= -1e-6).all() and (flat <= 1 + 1e-6).all() and np.allclose(flat.sum(axis=-1), 1, atol=1e-2))


def _given(values: Array) -> bool:
    """Whether values are scores already."""
    return bool(values.size and values.min() >= -1e-4 and values.max() <= 1 + 1e-4)


def _classifier(outputs: Outputs) -> list[Guess]:
    values = outputs.values[0]
    if len(outputs.values) != 1 or values.ndim != 2 or values.shape[0] != 1 or values.shape[1] < 2 or values.dtype.kind != "f":
        return []
    length = float(np.linalg.norm(values.astype(np.float64)))
    if any(word in outputs.names[0].lower() for word in ("embed", "feature")) or (abs(length - 1) < 1e-3 and values.min() < -1e-3):
        return [
            Guess(preset="embedding", why=f"one output {tuple(values.shape)}, by its name or its length of {length:.3g} a vector")
        ]
    if _is_shares(values):
        return [Guess(preset="probabilities", why=f"one output {tuple(values.shape)} whose row sums to 1")]
    return [Guess(preset="softmax", why=f"one output {tuple(values.shape)} of class logits")]


def _named(outputs: Outputs) -> list[Guess]:
    """Forms that are known by their outputs' names."""
    names = {n.lower().rpartition("/")[2].split(":")[0] for n in outputs.names}
    if {"labels", "boxes", "scores"} <= names:
        return [Guess(preset="labels-boxes-scores", why="outputs labels, boxes and scores")]
    if {"detection_boxes", "detection_scores", "detection_classes"} <= names:
        return [Guess(preset="ssd", why="outputs detection_boxes, detection_scores and detection_classes")]
    return []


def _map(outputs: Outputs) -> list[Guess]:
    values = outputs.values[0]
    height, width = outputs.size_px
    if len(outputs.values) != 1 or values.ndim not in (3, 4) or values.shape[0] != 1:
        return []
    over = values.shape[-2] * width == values.shape[-1] * height and 8 * values.shape[-2] >= height
    if over and values.ndim == 3 and values.dtype.kind in "iu":
        return [Guess(preset="segmentation", why=f"one map of class numbers {tuple(values.shape)}")]
    if over and values.ndim == 4 and values.shape[1] >= 2 and not (values.shape[1] == 3 and values.shape[2] >= height):
        return [Guess(preset="segmentation", why=f"one map {tuple(values.shape)} of {values.shape[1]} classes over the picture")]
    if over and values.ndim == 4 and values.shape[1] == 1 and "sigmoid" in outputs.names[0].lower() and _given(values):
        return [Guess(preset="mask", why=f"one map {tuple(values.shape)} of shares over the picture")]
    if len(outputs.values) == 1 and values.ndim == 4 and values.shape[1] > 5 and values.shape[2:] == (height // 16, width // 16):
        return [Guess(preset="fastestdet", why=f"one map {tuple(values.shape)} of stride 16")]
    return []


def _queries(outputs: Outputs) -> list[Guess]:
    """DETR and its kin: logits and boxes of as many queries."""
    if len(outputs.values) < 2:
        return []
    by_name = dict(zip(outputs.names, outputs.values, strict=True))
    logits = next((v for n, v in by_name.items() if n.lower() in ("logits", "pred_logits", "labels")), None)
    boxes = next((v for n, v in by_name.items() if n.lower() in ("pred_boxes", "boxes", "dets")), None)
    if logits is None or boxes is None or logits.ndim != 3 or boxes.ndim != 3:
        return []
    if boxes.shape[2] != 4 or boxes.shape[:2] != logits.shape[:2] or not _given(boxes) or logits.shape[2] == 1:
        return []
    why = f"{logits.shape[2]} logits and a normalised box for each of {boxes.shape[1]} queries"
    if next(iter(by_name.values())) is boxes:
        return [Guess(preset="rfdetr", why=why)]
    if logits.shape[2] == 92:
        return [Guess(preset="detr", why=f"{why}: COCO's 91 and a class of nothing")]
    if logits.shape[2] == 80:
        return [Guess(preset="rtdetr", why=f"{why}: COCO's 80, none of nothing")]
    return [
        Guess(preset="detr", why="a softmax whose last class is nothing"),
        Guess(preset="rtdetr", why="a sigmoid for each class"),
    ]


def _levels(outputs: Outputs) -> list[Guess]:
    """NanoDet and PicoDet: scores and distances, a pair of outputs a level."""
    values = [v for v in outputs.values if v.ndim in (2, 3)]
    if len(values) != len(outputs.values) or len(values) not in (6, 8):
        return []
    levels = len(values) // 2
    cells = sorted({v.shape[-2] for v in values}, reverse=True)
    strides = (8, 16, 32, 64)[:levels]
    if cells != [len(grid(outputs.size_px, [s])[0]) for s in strides]:
        return []
    name = "nanodet" if levels == 3 else "picodet"
    return [Guess(preset=name, why=f"scores and distances of {levels} levels, {cells} positions")]


def _one_detector(outputs: Outputs) -> list[Guess]:
    values = outputs.values[0]
    if len(outputs.values) != 1 or values.ndim != 3 or values.shape[0] != 1:
        return []
    shape, (rows, columns) = tuple(values.shape), values.shape[1:]
    positions = {len(grid(outputs.size_px, s)[0]): s for s in _STRIDES}
    if columns == 6 and rows not in positions and rows // 3 not in positions:
        last = values[0, :, 5]
        if np.allclose(last, np.rint(last), atol=1e-3) and _given(values[0, :, 4]):
            return [Guess(preset="end-to-end", why=f"one output {shape} of box, score and class")]
        return []
    if columns == 7 and rows not in positions and not values[0, :, 0].any() and _given(values[0, :, 6]):
        return [Guess(preset="yolov7-end-to-end", why=f"one output {shape} of picture, box, class and score")]
    if columns in positions and 5 <= rows < columns:
        if _given(values[0, 4:]):
            return [Guess(preset="yolov8", why=f"one output {shape}: {rows - 4} class scores for each of {columns} positions")]
        return []
    if rows in positions and columns > 5 and _given(values[0, :, 4:]):
        if float(np.abs(values[0, :, :2]).max()) < 0.25 * max(outputs.size_px):
            why = f"one output {shape}: a box on its grid, objectness and {columns - 5} class scores for each position"
            return [
                Guess(preset="yolox", why=f"{why}; RGB with ImageNet's mean and deviation"),
                Guess(preset="yolox-raw255", why=f"{why}; BGR 0..255"),
            ]
        return [Guess(preset="yolov5", why=f"one output {shape} with boxes in pixels")]
    if rows % 3 == 0 and rows // 3 in positions and columns > 5 and _given(values[0, :, 4:]):
        return [Guess(preset="yolov5", why=f"one output {shape}: three anchors for each position")]
    return []


def fitted(name: str, outputs: Outputs) -> Preset:
    """A preset, or a user's file, for these outputs: names resolved, levels put in the order of their strides.

    Raises:
        ConfigError: it reads an output that the model does not have.
    """
    preset = read_preset(name)
    how = preset.decoding
    if name in ("nanodet", "picodet"):
        how = _paired(how, outputs)
    elif name == "rtdetr" or name == "detr":
        how = _by_columns(how, outputs)
    elif name in _EXTRAS.values():
        how = _with_extras(how, outputs)
    elif name == "labels-boxes-scores":
        how = _renamed(how, outputs)
    return replace(preset, decoding=_resolved(how, outputs))


def _paired(how: Decoding, outputs: Outputs) -> Decoding:
    """Of six or eight outputs in any order: the distances by their columns, each kind from the finest level on."""
    wide = 4 * how.box.bins
    order = sorted(range(len(outputs.values)), key=lambda i: -outputs.values[i].shape[-2])
    boxes = tuple(i for i in order if outputs.values[i].shape[-1] == wide)
    scores = tuple(i for i in order if i not in boxes)
    if how.boxes is None or len(boxes) != len(scores):
        raise ConfigError(f"the outputs {outputs.shapes()} are no pairs of class scores and {wide} distances")
    return replace(how, boxes=replace(how.boxes, outputs=boxes), scores=replace(how.scores, outputs=scores))


def _with_extras(how: Decoding, outputs: Outputs) -> Decoding:
    """Columns of a model with extras: the classes are what box and extras leave; fewer rows than columns: picked in the graph."""
    first = outputs.values[0]
    if how.task == "instances":
        if len(outputs.values) < 2 or outputs.values[1].ndim != 4:
            raise ConfigError(
                f"instances need an output of prototypes (N, C, h, w) beside the first, the model has {outputs.shapes()}"
            )
        count = outputs.values[1].shape[1]
    elif how.task == "oriented":
        count = 1
    else:
        points = [int(t) for t in outputs.metadata.get("kpt_shape", "").strip("[]() ").replace(",", " ").split() if t.isdecimal()]
        count = points[0] * points[1] if len(points) == 2 else (min(first.shape[1:]) - 5)
        if len(points) == 2:
            how = replace(how, point_values=2 if points[1] == 2 else 3)
    if how.boxes is None or first.ndim != 3:
        raise ConfigError(f"the outputs {outputs.shapes()} are not what this preset reads")
    if first.shape[2] == 6 + count:
        box = how.box if how.task == "oriented" else replace(how.box, form="xyxy")
        return replace(
            how, boxes=Columns(stop=4), box=box, scores=Columns(start=4, stop=5), class_id=Columns(start=5, stop=6),
            extras=Columns(start=6), suppression="none",
        )  # fmt: skip
    classes = first.shape[1] - 4 - count
    if classes < 1:
        raise ConfigError(f"the outputs {outputs.shapes()} leave no class column beside a box and {count} more")
    return replace(
        how,
        scores=Columns(axes="cp", start=4, stop=4 + classes),
        extras=Columns(axes="cp", start=4 + classes, stop=4 + classes + count),
    )


def _by_columns(how: Decoding, outputs: Outputs) -> Decoding:
    """Logits and boxes among further outputs (auxiliary ones, hidden states)."""
    named = {n.lower(): i for i, n in enumerate(outputs.names)}
    logits = named.get("logits", named.get("pred_logits"))
    boxes = named.get("pred_boxes", named.get("boxes"))
    if how.boxes is None or logits is None or boxes is None:
        return how
    return replace(how, boxes=replace(how.boxes, outputs=(boxes,)), scores=replace(how.scores, outputs=(logits,)))


def _renamed(how: Decoding, outputs: Outputs) -> Decoding:
    named = {n.lower().rpartition("/")[2]: i for i, n in enumerate(outputs.names)}
    if how.boxes is None or how.class_id is None or not {"labels", "boxes", "scores"} <= set(named):
        return how
    return replace(
        how, class_id=replace(how.class_id, outputs=(named["labels"],)), boxes=replace(how.boxes, outputs=(named["boxes"],)),
        scores=replace(how.scores, outputs=(named["scores"],)),
    )  # fmt: skip


def _resolved(how: Decoding, outputs: Outputs) -> Decoding:
    """Names of outputs as indices."""

    def index(which: int | str) -> int:
        if isinstance(which, int):
            if not 0 <= which < len(outputs.names):
                raise ConfigError(f"the decoding reads output {which}; the model has {outputs.shapes()}")
            return which
        for i, name in enumerate(outputs.names):
            if which in (name, name.split(":")[0], name.rpartition("/")[2]):
                return i
        raise ConfigError(f"the decoding reads output {which!r}; the model has {outputs.shapes()}")

    def resolve(columns: Columns | None) -> Columns | None:
        return None if columns is None else replace(columns, outputs=tuple(index(o) for o in columns.outputs))

    scores = resolve(how.scores)
    return replace(
        how, scores=scores or how.scores, boxes=resolve(how.boxes), objectness=resolve(how.objectness),
        class_id=resolve(how.class_id), extras=resolve(how.extras),
        prototypes=None if how.prototypes is None else index(how.prototypes),
    )  # fmt: skip
