"""What ``cut`` and ``train any`` share: how a model's input is made and its output read, once it is served."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import ConfigError
from splitters.bundle.manifest import Preprocess, Task
from splitters.commands.model_arguments import default_preprocess

if TYPE_CHECKING:
    from splitters.cutting.sources import Source

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
        "--output", choices=("softmax", "yolox", "boxes"), default="softmax",
        help="what the model returns: class logits; YOLOX's raw grid; or boxes xyxy and class scores (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--score-min", type=float, default=0.05, help="detectors: lowest score reported (default: %(default)s)")
    parser.add_argument("--iou", type=float, default=0.65, help="detectors: overlap above which the lesser box goes")
    parser.add_argument("--preprocess", type=Path, metavar="FILE.json", help="the manifest's preprocess, where the source has none")
    parser.add_argument("--labels", type=Path, metavar="FILE.json", help="class id → name, where the source has none")
    parser.add_argument("--licence", default="unknown: ask whoever gave you the weights", help="of the weights")


def described(source: Source, args: argparse.Namespace) -> Described:
    """What the arguments, and the source where they are silent, say.

    Raises:
        ConfigError: a file cannot be read, or does not hold what it should.
    """
    labels = dict(source.labels)
    if args.labels:
        labels = {int(k): str(v) for k, v in _read_json(args.labels).items()}
    spec = default_preprocess(source)
    postprocess: dict[str, Any] = {"kind": "softmax"}
    if args.output != "softmax":
        from splitters.tasks.coco_classes import NAME_OF

        labels = labels or dict(NAME_OF)
        kind = "yolox" if args.output == "yolox" else "dense_boxes"
        postprocess = {"kind": kind, "class_ids": sorted(labels), "score_min": args.score_min, "iou": args.iou}
        if args.output == "yolox":
            spec = Preprocess(size_px=spec.size_px, **YOLOX_PREPROCESS)
    if args.preprocess:
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in _read_json(args.preprocess).items()}
            spec = Preprocess(**fields)
        except TypeError as error:
            raise ConfigError(f"{args.preprocess}: {error}") from error
    task: Task = "classification" if args.output == "softmax" else "detection"
    return Described(task=task, preprocess=spec, postprocess=postprocess, labels=labels)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return data
