"""What ``cut`` and ``train any`` share: how a model's input is made and its output read, once it is served."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import BundleError, ConfigError
from splitters.bundle.manifest import Preprocess, Task
from splitters.commands.model_arguments import default_preprocess
from splitters.tasks.decoding import preset_names, read_preset

if TYPE_CHECKING:
    from splitters.cutting.sources import Source

AUTO = "auto"
UNKNOWN_LICENCE = "unknown: ask whoever gave you the weights"
YOLOX_PREPROCESS: dict[str, Any] = {
    "resize": "letterbox", "anchor": "top_left", "pad": 114, "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A manifest's fields on both ends of a model.

    Attributes:
        task: ``classification`` or ``detection``.
        preprocess: from a frame to the model's input.
        postprocess: the manifest's ``postprocess``.
        labels: class id → name.
    """

    task: Task
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
        "--output", default=AUTO, metavar="PRESET|FILE.json|auto",
        help=f"what the model returns: {', '.join(preset_names())}; or a declaration of your own. auto guesses it of an ONNX file "
        "and says so; other models are taken for classifiers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--score-min", type=float, help="detectors: lowest score reported (default: the preset's)")
    parser.add_argument("--iou", type=float, help="detectors: overlap above which the lesser box goes (default: the preset's)")
    parser.add_argument("--preprocess", type=Path, metavar="FILE.json", help="the manifest's preprocess, where the source has none")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="class names, where the source has none: JSON, or a name a line"
    )
    parser.add_argument("--licence", help="of the weights (default: what the file says, or that nobody knows)")


def described(source: Source, args: argparse.Namespace) -> Described:
    """What the arguments, and the source where they are silent, say.

    Raises:
        ConfigError: a file cannot be read, or does not hold what it should.
    """
    labels = read_labels(args.labels) if args.labels else dict(source.labels)
    spec = default_preprocess(source)
    postprocess: dict[str, Any] = {"kind": "softmax"}
    task: Task = "classification"
    limits = {k: v for k, v in (("score_min", args.score_min), ("iou", args.iou)) if v is not None}
    if args.output in ("yolox", "boxes"):
        task = "detection"
        kind = "yolox" if args.output == "yolox" else "dense_boxes"
        postprocess = {"kind": kind, "class_ids": sorted(labels), "score_min": 0.05, "iou": 0.65, **limits}
        if args.output == "yolox":
            spec = Preprocess(size_px=spec.size_px, **YOLOX_PREPROCESS)
    elif args.output not in (AUTO, "softmax"):
        preset = read_preset(str(args.output))
        task, postprocess = preset.decoding.task, replace(preset.decoding, **limits).to_json()
        if preset.preprocess:
            fields: dict[str, Any] = {"resize": "letterbox", **preset.preprocess, "size_px": spec.size_px}
            fields |= {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
            spec = Preprocess(**fields)
    if args.preprocess:
        spec = read_preprocess(args.preprocess, spec.size_px)
    return Described(task=task, preprocess=spec, postprocess=postprocess, labels=labels)


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


def read_labels(path: Path) -> dict[int, str]:
    """Class names: a JSON object (id to name) or list, or a text file with a name a line.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if path.suffix.lower() != ".json":
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    try:
        data = json.loads(text)
        rows = enumerate(data) if isinstance(data, list) else data.items()
        return {int(k): str(v) for k, v in rows}
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path} must hold a JSON object of class id to name, or a list of names: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return data
