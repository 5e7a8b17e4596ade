"""The declaration of how outputs become an answer, as JSON: a preset that ships with the package, or a user's file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from protos.errors import BundleError, ConfigError, HeadtailError
from protos.schema import checked, read_json
from splitters.tasks.base import TASKS
from splitters.tasks.decoding.box_form import BoxForm
from splitters.tasks.decoding.columns import Columns

Decoded = Literal["classification", "detection", "keypoints", "oriented", "instances", "segmentation", "embedding"]
DECODED: tuple[str, ...] = get_args(Decoded)


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
        threshold: of a map of one class, from which value on a pixel is of it; 0 fits logits.
        prototypes: the output (N, coefficients, h, w) whose weighted sums are masks.
    """

    task: Decoded
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
    threshold: float = 0.0

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


def read_other_task(output: str) -> tuple[str, dict[str, Any]] | None:
    """A task that no declaration describes, as ``--output FILE.json`` names it: ``{"task": "mine", …}``, and its settings.

    Returns:
        The task's name and the manifest's ``postprocess``, which is the rest of the file; None of any other ``--output``.

    Raises:
        ConfigError: nobody registered the task, or the file cannot be read.
    """
    if not output.endswith(".json"):
        return None
    try:
        raw = json.loads(Path(output).read_bytes())
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be read: {error.strerror}") from error
    except ValueError:
        return None  # `read_preset` says what is wrong with it
    task = raw.get("task") if isinstance(raw, dict) else None
    if not isinstance(task, str) or task in DECODED:
        return None
    if task not in TASKS:
        raise ConfigError(
            f"{output}: task {task[:100]!r} is unknown; there are {', '.join(TASKS)}; an installed package can add one by an "
            f"entry point of the group {TASKS.group}"
        )
    return task, {k: v for k, v in raw.items() if k != "task"}


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
