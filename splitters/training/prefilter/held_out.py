"""Scores the photos kept out of the prefilter's training: what bundles calibrate its threshold on, for any classes of interest.

``python -m splitters.training.prefilter.held_out --data DIR --run runs/prefilter`` writes ``prefilter_held_out.safetensors`` there:
``scores`` (M, K) and ``confidence`` (M, K) of the surest box of each class with a longer side of at least ``--side-min`` px.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from splitters.tasks.labels.coco_classes import INDEX_OF
from splitters.tasks.preprocess import preprocess
from splitters.training.detector.data import Example, build_examples
from splitters.training.prefilter.loop import PrefilterRecipe, held_out
from splitters.zoo.detector.network import INPUT_SIZE_PX, PREPROCESS
from splitters.zoo.efficientnet_lite0.network import load_efficientnet_lite0
from splitters.zoo.prefilter.network import load_prefilter


def confidence_of(example: Example, category_ids: Sequence[int], side_min_px: float) -> list[float]:
    """The surest large enough box of each class (K,), 0 where there is none; sides as in the detector's input."""
    scale = INPUT_SIZE_PX / max(example.image.shape[:2])
    found = [0.0] * len(category_ids)
    column = {INDEX_OF[c]: k for k, c in enumerate(category_ids)}
    for x1, y1, x2, y2, label, confidence in example.boxes:
        k = column.get(int(label))
        if k is not None and max(x2 - x1, y2 - y1) * scale >= side_min_px:
            found[k] = max(found[k], float(confidence))
    return found


def main() -> None:
    """The command line."""
    recipe = PrefilterRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with coco/, photos/, weights/ and the rest")
    parser.add_argument("--run", type=Path, required=True, help="run directory with prefilter.safetensors")
    parser.add_argument("--side-min", type=float, default=recipe.side_min_px, help="least longer side of a box that counts, px")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, ids = load_prefilter(args.run / "prefilter.safetensors")
    stem = load_efficientnet_lite0().stem
    scores, confidence = [], []
    for index, example in enumerate(build_examples(args.data, args.run / "teacher.npz", longest_px=INPUT_SIZE_PX)):
        if not held_out(index, recipe.held_out):
            continue
        image = np.ascontiguousarray(example.image[..., ::-1])
        with torch.inference_mode():
            scores.append(model(stem(torch.from_numpy(preprocess(image, PREPROCESS))))[0].sigmoid())
        confidence.append(confidence_of(example, ids, args.side_min))
    tensors = {"scores": torch.stack(scores).contiguous(), "confidence": torch.tensor(confidence)}
    meta = {"category_ids": ",".join(map(str, ids)), "side_min_px": str(args.side_min)}
    save_file(tensors, args.run / "prefilter_held_out.safetensors", meta)


if __name__ == "__main__":
    main()
