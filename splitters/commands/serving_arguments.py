"""What ``cut`` and ``train any`` share: how a model's input is made and its output read, once it is served."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import ConfigError
from protos.schema import checked
from splitters.bundle.manifest import Preprocess, Task
from splitters.commands.model_arguments import assume, default_preprocess
from splitters.tasks.imagenet import imagenet_labels
from splitters.tasks.preprocess import Frame, preprocess

if TYPE_CHECKING:
    from splitters.cutting.sources import Source

LETTERBOX: dict[str, Any] = {"resize": "letterbox", "anchor": "top_left", "pad": 114, "interpolation": "bilinear"}
YOLOX_PREPROCESS: dict[str, Any] = LETTERBOX | {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


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
    parser.add_argument(
        "--labels", type=Path, metavar="FILE.json|coco|imagenet",
        help="class id → name, or a list of names; or those of a data set (default: the source's, else the ids themselves)",
    )  # fmt: skip
    parser.add_argument("--licence", default="unknown: ask whoever gave you the weights", help="of the weights")


def described(source: Source, args: argparse.Namespace, photos: Sequence[Frame]) -> Described:
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
    spec = _preprocess(source, args)
    if source.check is not None:
        source.check([preprocess(photo, spec) for photo in photos])
    kind = {"softmax": "softmax", "yolox": "yolox", "boxes": "dense_boxes"}[args.output]
    model = source.module()
    classes = count_classes(kind, raw_outputs(model, photos, spec), spec)
    labels = _labels(source, args, classes)
    postprocess: dict[str, Any] = {"kind": kind}
    if kind != "softmax":
        postprocess |= {"class_ids": sorted(labels), "score_min": args.score_min, "iou": args.iou}
    check_answers(model, photos, preprocess=spec, postprocess=postprocess, labels=labels)
    task: Task = "classification" if args.output == "softmax" else "detection"
    return Described(task=task, preprocess=spec, postprocess=postprocess, labels=labels)


def _preprocess(source: Source, args: argparse.Namespace) -> Preprocess:
    if args.preprocess:
        return checked(_read_json(args.preprocess), Preprocess, what=str(args.preprocess), error=ConfigError)
    own, detects = source.preprocess, args.output != "softmax"
    spec = own or default_preprocess(source)
    if args.output == "yolox":
        spec = Preprocess(size_px=spec.size_px, **YOLOX_PREPROCESS)
    elif detects and spec.resize != "stretch":  # a crop would hide what lies outside it
        spec = Preprocess(size_px=spec.size_px, mean=spec.mean, std=spec.std, **LETTERBOX)
        if own is not None:
            print("note: a detector's pictures are fitted into its input, not cropped as the source would", file=sys.stderr)
    if own is None:
        assume(source, spec)
    return spec


def _labels(source: Source, args: argparse.Namespace, classes: int) -> dict[int, str]:
    """Names by class id; the ids themselves where there are none."""
    numbers = {i: str(i) for i in range(classes)}
    if args.labels is None:
        return dict(source.labels) if len(source.labels) == classes else numbers
    if str(args.labels) in _DATA_SETS and not args.labels.exists():
        return _DATA_SETS[str(args.labels)]()
    data = _read_json(args.labels)
    rows = list(enumerate(data)) if isinstance(data, list) else list(data.items())
    try:
        labels = {int(k): str(v) for k, v in rows}
    except (TypeError, ValueError):
        labels = {}
    if not labels or len(labels) != len(rows) or not all(isinstance(v, str) for _, v in rows):
        raise ConfigError(f'{args.labels} must hold names by class id, {{"0": "cat", …}}, or a list of names')
    return labels


def _coco() -> dict[int, str]:
    from splitters.tasks.coco_classes import NAME_OF

    return dict(NAME_OF)


_DATA_SETS: Mapping[str, Callable[[], dict[int, str]]] = {"coco": _coco, "imagenet": imagenet_labels}


def _read_json(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict | list):
        raise ConfigError(f"{path} must hold a JSON object")
    return data
