"""What ``cut`` and ``train any`` share: how a model's input is made and its output read, once it is served."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import BundleError, ConfigError
from splitters.bundle.manifest import Preprocess
from splitters.commands.common.model_arguments import assume, default_preprocess
from splitters.tasks.decoding import DECODED, Preset, preset_names, read_other_task, read_preset
from splitters.tasks.labels.imagenet import imagenet_labels
from splitters.tasks.preprocess import Frame, preprocess

if TYPE_CHECKING:
    from splitters.cutting.sources import ModelSource

AUTO, TENSORS = "auto", "tensors"
UNKNOWN_LICENCE = "unknown: ask whoever gave you the weights"
LETTERBOX: dict[str, Any] = {"resize": "letterbox", "anchor": "top_left", "pad": 114, "interpolation": "bilinear"}
YOLOX_PREPROCESS: dict[str, Any] = LETTERBOX | {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A manifest's fields on both ends of a model.

    Attributes:
        task: its registered name.
        preprocess: from a frame to the model's input.
        postprocess: the manifest's ``postprocess``.
        labels: class id → name.
    """

    task: str
    preprocess: Preprocess
    postprocess: Mapping[str, Any]
    labels: Mapping[int, str]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, for a run's recipe."""
        return {
            "task": self.task, "preprocess": asdict(self.preprocess), "postprocess": dict(self.postprocess),
            "labels": {str(k): v for k, v in self.labels.items()},
        }  # fmt: skip


def add_serving_arguments(parser: argparse.ArgumentParser) -> None:
    """--output, --score-min, --iou, --preprocess, --labels and --licence."""
    parser.add_argument(
        "--output", default=AUTO, metavar="PRESET|FILE.json|auto|tensors",
        help=f"what the model returns: {', '.join(preset_names())}; a declaration of your own, also of a task of your own; or "
        "tensors, the outputs as they are. auto guesses it of an ONNX file and says so; other models are taken for classifiers "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--score-min", type=float, help="detectors: lowest score reported (default: the preset's)")
    parser.add_argument("--iou", type=float, help="detectors: overlap above which the lesser box goes (default: the preset's)")
    parser.add_argument("--preprocess", type=Path, metavar="FILE.json", help="the manifest's preprocess, where the source has none")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE|coco|imagenet",
        help="class names, where the source has none: JSON, or a name a line; or those of a data set (default: the class ids)",
    )  # fmt: skip
    parser.add_argument("--licence", help="of the weights (default: what the file says, or that nobody knows)")


def described(source: ModelSource, args: argparse.Namespace, photos: Sequence[Frame]) -> Described:
    """What the arguments, and the source where they are silent, say; tried on photographs.

    What is assumed, since nobody said it, is told on standard error.

    Raises:
        ConfigError: a file cannot be read, or does not hold what it should.
        CutError: the model's outputs are not what --output reads.
        ModelError: the model takes no pictures, or is not what it was converted from.
    """
    from splitters.cutting.answers import PHOTOS, check_answers, count_classes, raw_outputs

    source.check_takes_pictures()
    photos = photos[:PHOTOS]
    output = "softmax" if args.output == AUTO else str(args.output)
    other = (TENSORS, {}) if output == TENSORS else read_other_task(output)
    preset = None if output in _KINDS or other is not None else read_preset(output)
    spec = _preprocess(source, args.preprocess, output, preset)
    if source.check is not None:
        source.check([preprocess(photo, spec) for photo in photos])
    limits = {k: v for k, v in (("score_min", args.score_min), ("iou", args.iou)) if v is not None}
    task: str = "classification" if output == "softmax" else "detection"
    postprocess: dict[str, Any] = {"kind": _KINDS.get(output, "declared")}
    if preset is not None:
        task, postprocess = preset.decoding.task, replace(preset.decoding, **limits).to_json()
    if other is not None:
        task, postprocess = other[0], {**other[1], **limits}
    model = source.module()
    outputs = raw_outputs(model, photos, spec)
    if task == TENSORS:
        postprocess = {"names": [f"output_{i}" for i in range(len(outputs))], **postprocess}
    labels = _labels(source, args.labels, count_classes(postprocess, outputs, spec) if task in DECODED else 0)
    if output in ("yolox", "boxes"):
        postprocess |= {"class_ids": sorted(labels), "score_min": 0.05, "iou": 0.65, **limits}
    check_answers(model, photos, preprocess=spec, postprocess=postprocess, labels=labels, task=task)
    return Described(task=task, preprocess=spec, postprocess=postprocess, labels=labels)


_KINDS = {"softmax": "softmax", "yolox": "yolox", "boxes": "dense_boxes"}


def _preprocess(source: ModelSource, file: Path | None, output: str, preset: Preset | None) -> Preprocess:
    own = source.preprocess
    spec = own or default_preprocess(source)
    if file:
        return read_preprocess(file, spec.size_px)
    if preset is not None and preset.preprocess:
        fields: dict[str, Any] = {"resize": "letterbox", **preset.preprocess, "size_px": spec.size_px}
        fields |= {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
        return Preprocess(**fields)
    detects = output in ("yolox", "boxes") or (preset is not None and preset.decoding.task == "detection")
    if output == "yolox":
        spec = Preprocess(size_px=spec.size_px, **YOLOX_PREPROCESS)
    elif detects and spec.resize != "stretch":  # a crop would hide what lies outside it
        spec = Preprocess(size_px=spec.size_px, mean=spec.mean, std=spec.std, **LETTERBOX)
        if own is not None:
            print("note: a detector's pictures are fitted into its input, not cropped as the source would", file=sys.stderr)
    if own is None:
        assume(source, spec)
    return spec


def _labels(source: ModelSource, file: Path | None, classes: int) -> dict[int, str]:
    """Names by class id; the ids themselves where there are none."""
    if file is not None:
        return read_labels(file)
    return dict(source.labels) if len(source.labels) == classes else {i: str(i) for i in range(classes)}


def read_preprocess(path: Path, size_px: tuple[int, int]) -> Preprocess:
    """The manifest's ``preprocess`` of a file; the model's size where the file does not say one.

    Raises:
        ConfigError: it cannot be read, or has an unknown or impossible field.
    """
    fields: dict[str, Any] = {
        "size_px": size_px,
        **{k: tuple(v) if isinstance(v, list) else v for k, v in _read_json(path).items()},
    }
    try:
        return Preprocess(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except BundleError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def _coco() -> dict[int, str]:
    from splitters.tasks.labels.coco_classes import NAME_OF

    return dict(NAME_OF)


_DATA_SETS: Mapping[str, Callable[[], dict[int, str]]] = {"coco": _coco, "imagenet": imagenet_labels}


def read_labels(path: Path) -> dict[int, str]:
    """Class names: a JSON object (id to name) or list, a text file with a name a line, or a data set's: ``coco``, ``imagenet``.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    if str(path) in _DATA_SETS and not path.exists():
        return _DATA_SETS[str(path)]()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if path.suffix.lower() != ".json":
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    try:
        data = json.loads(text)
        rows = list(enumerate(data) if isinstance(data, list) else data.items())
        labels = {int(k): v for k, v in rows}
        if not labels or len(labels) != len(rows) or not all(isinstance(v, str) for v in labels.values()):
            raise ValueError("names are texts, one an id")
        return labels
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} must hold a JSON object of class id to name, or a list of names: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return data
