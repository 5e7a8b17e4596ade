"""The prefilter's part of a detector bundle: its graph, and the promise that goes with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from splitters.bundle import BundleWriter, sha256_file
from splitters.cutting.onnx_export import export_onnx
from splitters.zoo.prefilter.network import STEM_CHANNELS, WEIGHTS, InterestScore, columns_of, load_prefilter
from splitters.zoo.prefilter.promise import RECALLS, SURE, promises

HELD_OUT = WEIGHTS.parent / "prefilter_held_out.safetensors"
SURE_OF_DETECTOR = WEIGHTS.parent / "prefilter_sure.json"
PREFILTER_PART = "device/prefilter.onnx"
PROMISE_PART = "device/prefilter.json"
INTEREST = ("person", "bicycle", "car")
RECALL = 0.98


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
    columns = columns_of(interest, category_ids)
    scores, confidence = (held_out[k].double().numpy() for k in ("scores", "confidence"))
    found = promises(scores, confidence, columns, (*RECALLS, recall))
    positive = confidence[:, columns].max(axis=1) >= SURE
    best = scores[:, columns].max(axis=1)
    return {
        "category_ids": list(category_ids), "interest": list(interest), **found[-1].to_json(), "unit": "photo",
        "calibrated_on": f"{len(scores)} photos kept out of its training, {int(positive.sum())} with something of interest: "
        "ground truth, or YOLOX-nano at 0.5 and more where a class is not labelled; longer side of a box at least 16 of 320 px",
        "negatives_stopped": float((best[~positive] < found[-1].threshold).mean()) if (~positive).any() else 0.0,
        "recalls": [c.to_json() for c in found[:-1]],
    }  # fmt: skip


def sure_score(detector: Path) -> float:
    """The detector's score from which its boxes can be believed, as measured for exactly these ``detector`` weights; else 0.5.

    The client counts a probe as a miss of the prefilter where the server reports a box of interest with this score or more.
    """
    if not SURE_OF_DETECTOR.exists():
        return SURE
    stored = json.loads(SURE_OF_DETECTOR.read_text(encoding="utf-8"))
    return float(stored["score"]) if stored["weights_sha256"] == sha256_file(detector) else SURE
