"""What an ONNX file's outputs mean and how its picture is made: as asked for, or guessed from shapes and metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from protos.errors import ConfigError
from splitters.bundle.manifest import Preprocess
from splitters.cutting.onnx.feeds import feeds_of
from splitters.cutting.onnx.inputs import Feed
from splitters.cutting.onnx.model import OnnxModel
from splitters.cutting.onnx.pieces import whole_outputs
from splitters.tasks.decoding import Decoding, Preset, read_other_task
from splitters.tasks.decoding.guess import Guess, Outputs, fitted, guess, labels_of
from splitters.tasks.preprocess import Frame

AUTO, TENSORS = "auto", "tensors"
_INTEGERS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "UINT8": ((0.0,) * 3, (1 / 255,) * 3), "INT8": ((128 / 255,) * 3, (1 / 255,) * 3),
}  # fmt: skip
_FLOAT_CLASSIFIER: Mapping[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the person who cuts says of a file; all of it may be left out.

    Attributes:
        output: a preset, a declaration's path, ``auto`` or ``tensors``.
        labels: class id → name; empty: what the file says.
        labels_from: where they are from, in an error's words.
        preprocess: fields of the manifest's ``preprocess`` beyond those of the preset.
        spec: the whole of it, instead.
        score_min, iou: instead of the preset's.
    """

    output: str = AUTO
    labels: Mapping[int, str] = field(default_factory=dict)
    labels_from: str = "the file's metadata"
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    spec: Preprocess | None = None
    score_min: float | None = None
    iou: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Understood:
    """A manifest's fields on both ends of a model."""

    task: str
    postprocess: Mapping[str, Any]
    preprocess: Preprocess
    labels: Mapping[int, str]


def understood(
    model: OnnxModel, asked: Asked, photos: Sequence[Frame], say: Callable[[str], None], examples: Sequence[Feed] = ()
) -> Understood:
    """Task, decoding, preprocessing and labels; says which, and why.

    Args:
        model: ready to be cut.
        asked: what is known already.
        photos: of which the first is run.
        examples: values of inputs that take no picture.
        say: told in one line what was decided.

    Raises:
        ConfigError: a guess is ambiguous, or what was asked for does not fit.
    """
    plain = preprocess_for(model, {"resize": "stretch", "interpolation": "bilinear"})
    values = whole_outputs(model, feeds_of(model, photos[:1], plain, examples)[0])
    outputs = Outputs(names=model.outputs, values=tuple(values), size_px=model.picture.size_px, metadata=model.metadata)
    other = read_other_task(asked.output)
    chosen = _guess(model, outputs) if asked.output == AUTO else Guess(preset=asked.output, why="as asked")
    labels = dict(asked.labels) or labels_of(model.metadata)
    if chosen.preset == TENSORS or other is not None:
        fields = {"resize": "letterbox", "anchor": "centre"} if "stride" in model.metadata else {"resize": "stretch"}
        task, postprocess = other or (TENSORS, {"names": list(model.outputs)})
    else:
        preset = fitted({"boxes": "boxes-scores"}.get(chosen.preset, chosen.preset), outputs)
        changes: dict[str, Any] = {k: v for k, v in (("score_min", asked.score_min), ("iou", asked.iou)) if v is not None}
        how = _numbered(replace(preset.decoding, **changes), labels, outputs, asked.labels_from)
        task, postprocess, fields = how.task, how.to_json(), _preset_fields(preset, how)
    spec = asked.spec or preprocess_for(model, {**fields, **asked.preprocess})
    if spec.size_px != model.picture.size_px:
        raise ConfigError(f"--preprocess makes pictures of {spec.size_px}, the model takes {model.picture.size_px} (height, width)")
    named = labels or task in (TENSORS, "embedding") or other is not None
    taken = [f"{i.name} {i.source} {i.dtype} {list(i.shape)}" for i in model.manifest_inputs()]
    say(f"outputs {outputs.shapes()} are read as {chosen.preset} ({chosen.why}); "
        + (f"inputs {', '.join(taken)}; " if taken else "") + (f"input {_words(spec)}" if model.picture.name else "no picture")
        + ("" if named else "; class names are not known, numbers are shown (--labels)"))  # fmt: skip
    return Understood(task=task, postprocess=postprocess, preprocess=spec, labels=labels)


def _guess(model: OnnxModel, outputs: Outputs) -> Guess:
    """By the outputs' shapes; what a model of other things than a picture returns is named, unless it is class scores."""
    if not model.manifest_inputs() or (model.picture.frames and not model.beside):
        return guess(outputs)
    return Guess(preset=TENSORS, why="the model takes more than one picture, or none")


def _preset_fields(preset: Preset, how: Decoding) -> dict[str, Any]:
    fields = dict(preset.preprocess)
    if how.task == "classification":
        fields = {"resize": "shortest", **(_FLOAT_CLASSIFIER if not fields else {}), **fields}
    return fields


def preprocess_for(model: OnnxModel, fields: Mapping[str, Any]) -> Preprocess:
    """A preset's preprocessing at the model's size; a model of bytes gets the pixels as they are."""
    size = model.picture.size_px
    made: dict[str, Any] = {"resize": "letterbox", "interpolation": "bilinear", **fields, "size_px": size}
    if made["resize"] == "shortest" and "resize_px" not in made:
        made["resize_px"] = max(*size, round(min(size) * 8 / 7)) if "mean" in made else max(size)
    whole_numbers = _INTEGERS.get(model.picture.dtype.name)
    if whole_numbers is not None:
        made["mean"], made["std"] = whole_numbers
    for name, value in made.items():
        if isinstance(value, list):
            made[name] = tuple(value)
    return Preprocess(**made)


def _words(spec: Preprocess) -> str:
    plain = spec.mean == (0.0, 0.0, 0.0)
    scale = "pixels 0..1" if plain and spec.std == (1.0, 1.0, 1.0) else (
        "pixels 0..255" if plain and abs(spec.std[0] - 1 / 255) < 1e-6 else f"mean {list(spec.mean)}, deviation {list(spec.std)}"
    )  # fmt: skip
    return f"{spec.size_px[0]}x{spec.size_px[1]} {spec.resize} {spec.channel_order.upper()}, {scale}"


def _numbered(how: Decoding, labels: Mapping[int, str], outputs: Outputs, where: str) -> Decoding:
    """The decoding with the ids that the names have, where they are not 0, 1, 2…: COCO's categories have gaps.

    Raises:
        ConfigError: class columns and names are not as many.
    """
    if not labels or how.class_id is not None or how.class_ids or how.task in ("segmentation", "embedding"):
        return how
    columns = how.scores.read([np.asarray(v, np.float32) for v in outputs.values]).shape[2] - (how.background != "none")
    ids = tuple(sorted(labels))
    if columns == ids[-1] + 1:
        return how  # a column for every id up to the last, as DETR's 91 for COCO's 80 names
    if len(ids) != columns:
        raise ConfigError(f"{where} names {len(labels)} classes, the model's output has {columns}")
    return how if ids == tuple(range(columns)) else replace(how, class_ids=ids)
