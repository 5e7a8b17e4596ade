"""The prefilter's part of a detector bundle: its graph, and the promise that goes with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from protos.errors import ConfigError
from splitters.bundle import BundleWriter, sha256_file
from splitters.cutting.onnx_export import export_onnx
from splitters.tasks.labels.coco_classes import NAME_OF
from splitters.zoo.prefilter.network import STEM_CHANNELS, WEIGHTS, InterestScore, columns_of, load_prefilter
from splitters.zoo.prefilter.promise import RECALLS, SURE, promises

HELD_OUT = WEIGHTS.parent / "prefilter_held_out.safetensors"
SURE_OF_DETECTOR = WEIGHTS.parent / "prefilter_sure.json"
PREFILTER_PART = "device/prefilter.onnx"
PROMISE_PART = "device/prefilter.json"
INTEREST = ("person", "bicycle", "car")
RECALL = 0.98
# What people look for: each has a promise of its own, and so has each class, and each two groups together.
GROUPS = {"person": ("person",), "vehicle": ("bicycle", "car", "motorcycle", "bus", "truck"), "animal": ("cat", "dog")}


def write_prefilter(
    writer: BundleWriter,
    interest: Sequence[str] = INTEREST,
    recall: float = RECALL,
    *,
    input_px: int,
    detector: Path,
    score_min: float = 0.25,
) -> str | None:
    """Adds the prefilter and its promise for a set of classes; None where no weights were trained.

    The graph's last output column is the score of ``interest``; the columns before it are the classes of the promise's
    ``category_ids``, in order.

    Args:
        writer: of the detector's bundle.
        interest: class names.
        recall: asked for.
        input_px: side of the detector's input.
        detector: its weights.
        score_min: the bundle's own score threshold; weaker boxes are never reported.
    """
    if not WEIGHTS.exists():
        return None
    model, ids = load_prefilter()
    scorer = InterestScore(model, columns_of(interest, ids)).eval()
    side = input_px // 2
    path = writer.file(PREFILTER_PART, "device")
    export_onnx(scorer, [torch.zeros(1, STEM_CHANNELS, side, side)], path, inputs=["stem"], outputs=["scores"])
    promise = {**prefilter_promise(interest, ids, recall), "sure": max(score_min, sure_score(detector))}
    writer.add(PROMISE_PART, json.dumps(promise, indent=1).encode(), "device")
    return PREFILTER_PART


def prefilter_promise(interest: Sequence[str], category_ids: Sequence[int], recall: float) -> dict[str, Any]:
    """What ``device/prefilter.json`` says: a threshold for ``recall``, the bound that goes with it, and those of other recalls.

    Raises:
        ConfigError: no held-out photo holds anything of interest.
    """
    held_out = load_file(HELD_OUT)
    scores, confidence = (held_out[k].double().numpy() for k in ("scores", "confidence"))

    def calibrated(names: Sequence[str]) -> dict[str, Any] | None:
        columns = columns_of(names, category_ids)
        positive = confidence[:, columns].max(axis=1) >= SURE
        if not positive.any():
            return None
        found = promises(scores, confidence, columns, (*RECALLS, recall))
        stopped = scores[:, columns].max(axis=1)[~positive] < found[-1].threshold
        return {
            "interest": list(names), **found[-1].to_json(), "negatives_stopped": float(stopped.mean()) if stopped.size else 0.0,
            "recalls": [c.to_json() for c in found[:-1]],
        }  # fmt: skip

    own = calibrated(interest)
    if own is None:
        raise ConfigError(f"no photo kept out of the prefilter's training holds {', '.join(interest)}")
    others = [{"name": name, **found} for name, names in _sets(category_ids) if (found := calibrated(names)) is not None]
    return {
        "category_ids": list(category_ids), **own, "unit": "photo",
        "calibrated_on": f"{len(scores)} photos kept out of its training, {own['units']} with something of interest: "
        "ground truth, or YOLOX-nano at 0.5 and more where a class is not labelled; longer side of a box at least 16 of 320 px",
        "calibrated": others,
    }  # fmt: skip


def _sets(category_ids: Sequence[int]) -> list[tuple[str, tuple[str, ...]]]:
    """Groups (with a name), classes, and two groups at a time, each set of classes once."""
    classes = [NAME_OF[i] for i in category_ids]
    groups = {name: kept for name, members in GROUPS.items() if (kept := tuple(n for n in members if n in classes))}
    sets = {frozenset(members): (name, members) for name, members in groups.items()}
    pairs = [(*groups[a], *groups[b]) for a, b in combinations(groups, 2)]
    for members in [*((n,) for n in classes), *pairs, tuple(classes)]:
        sets.setdefault(frozenset(members), ("", members))
    return list(sets.values())


def sure_score(detector: Path) -> float:
    """The detector's score from which its boxes can be believed, as measured for exactly these ``detector`` weights; else 0.5.

    The client counts a probe as a miss of the prefilter where the server reports a box of interest with this score or more.
    """
    if not SURE_OF_DETECTOR.exists():
        return SURE
    stored = json.loads(SURE_OF_DETECTOR.read_text(encoding="utf-8"))
    return float(stored["score"]) if stored["weights_sha256"] == sha256_file(detector) else SURE
