"""Trains the prefilter on the frozen stem's feature maps within a fixed time.

``python -m splitters.training.prefilter.loop --data DIR --out runs/prefilter --minutes 12``

A share of the labelled photos (by a hash of their place in the list) is held out, for calibration; ``held_out`` tells which.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from safetensors.torch import save_file
from torch import Tensor, nn

from splitters.tasks.decoding.boxes import Floats, Pixels
from splitters.tasks.labels.coco_classes import INDEX_OF, NAME_OF
from splitters.tasks.labels.coco_classes import NAMES as COCO_NAMES
from splitters.training.detector.augment import Sampler, recolour
from splitters.training.detector.data import Example, build_examples
from splitters.training.detector.loop import freeze_to_onnx
from splitters.training.pictures.photos import normalise
from splitters.training.prefilter.augment import Composer
from splitters.training.schedule import average_in, rise_and_fall, use_one_core
from splitters.zoo.detector.network import INPUT_SIZE_PX
from splitters.zoo.efficientnet_lite0.network import INPUT_MEAN, INPUT_STD, load_efficientnet_lite0
from splitters.zoo.prefilter.network import CATEGORY_IDS, Prefilter

log = logging.getLogger(__name__)
CELL_PX = 16
SOURCE_WEIGHTS = {
    "coco/train": 4.0, "photos/coco_extra": 4.0, "photos/indoor": 3.0, "photos/street": 1.0, "photos/camvid": 1.0,
    "photos/bsds": 2.0, "imagenette160/train": 0.7, "video/vtest.avi": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefilterRecipe:
    """Everything that shapes a run.

    Attributes:
        category_ids: COCO ids of the classes it learns.
        minutes: wall-clock time of the run.
        batch: pictures a step.
        rate: learning rate of AdamW, falling as a cosine of the time spent.
        side_min_px: boxes whose longer side is shorter, in input pixels, do not make a picture positive.
        composed: share of pictures with objects pasted on foreign ground.
        held_out: share of the labelled photos kept for calibration.
        seed: of all chance.
    """

    category_ids: tuple[int, ...] = CATEGORY_IDS
    minutes: float = 12.0
    batch: int = 16
    rate: float = 4e-3
    side_min_px: float = 16.0
    composed: float = 0.3125
    held_out: float = 0.15
    seed: int = 7


def held_out(index: int, share: float) -> bool:
    """Whether the ``index``-th example is kept out of the prefilter's training; the same on every machine."""
    return zlib.crc32(f"prefilter {index}".encode()) / 2**32 < share


def heat_targets(boxes: Sequence[Floats], category_ids: Sequence[int], size_px: int, side_min_px: float) -> tuple[Tensor, Tensor]:
    """What the heat map (N, K, s, s) and the image's scores (N, K) are told.

    A box warms the cells within the middle half of its sides, at least one, with its confidence; the image's target is the highest
    confidence among boxes large enough, and NaN (no opinion) where only smaller ones are.
    """
    side = size_px // CELL_PX
    heat = np.zeros((len(boxes), len(category_ids), side, side), np.float32)
    image = np.zeros((len(boxes), len(category_ids)), np.float32)
    column = {INDEX_OF[c]: k for k, c in enumerate(category_ids)}
    for n, found in enumerate(boxes):
        for x1, y1, x2, y2, label, confidence in found:
            k = column.get(int(label))
            if k is None:
                continue
            cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 4, (y2 - y1) / 4
            left, right = int(max(0, cx - w) // CELL_PX), int(min(size_px - 1, cx + w) // CELL_PX)
            top, bottom = int(max(0, cy - h) // CELL_PX), int(min(size_px - 1, cy + h) // CELL_PX)
            area = heat[n, k, top : bottom + 1, left : right + 1]
            np.maximum(area, confidence, out=area)
            large = max(x2 - x1, y2 - y1) >= side_min_px
            if large:
                image[n, k] = np.fmax(image[n, k], confidence)
            elif image[n, k] == 0:
                image[n, k] = np.nan
    return torch.from_numpy(heat), torch.from_numpy(image)


class _Frozen(nn.Module):
    def __init__(self, stem: nn.Module, model: Prefilter) -> None:
        super().__init__()
        self.stem, self.model = stem, model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.features(self.stem(x))


def prefilter_loss(model: Prefilter, features: Tensor, heat: Tensor, image: Tensor) -> Tensor:
    """Focal loss on the heat map, cross-entropy on the images' logits where there is an opinion."""
    cells, logits = model.judge(features)
    focus = (cells.detach().sigmoid() - heat).square()
    dense = (F.binary_cross_entropy_with_logits(cells, heat, reduction="none") * focus).sum() / heat.sum().clamp(min=8)
    known = ~image.isnan()
    return dense + F.binary_cross_entropy_with_logits(logits[known], image[known])


def _draw(sampler: Sampler, composer: Composer, recipe: PrefilterRecipe) -> tuple[Pixels, list[Floats]]:
    composed = round(recipe.batch * recipe.composed) if composer.ready else 0
    pictures, boxes = sampler.batch(recipe.batch - composed, INPUT_SIZE_PX, 0.25)
    for _ in range(composed):
        picture, found = composer.picture(INPUT_SIZE_PX)
        pictures = np.concatenate([pictures, recolour(picture, composer.rng)[None]])
        boxes.append(found)
    return pictures, boxes


def train(recipe: PrefilterRecipe, data: Path, out: Path, *, cache: Path) -> None:
    """Leaves ``prefilter.safetensors`` (fp16, averaged) and ``prefilter.json`` in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    network = load_efficientnet_lite0()
    model = Prefilter(len(recipe.category_ids), network=network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = freeze_to_onnx(_Frozen(network.stem, model), out / "features.onnx", 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    examples = build_examples(data, cache, longest_px=INPUT_SIZE_PX)
    kept: list[Example] = [e for i, e in enumerate(examples) if not held_out(i, recipe.held_out)]
    sampler = Sampler(kept, SOURCE_WEIGHTS, np.random.default_rng(recipe.seed), empty=1.5)
    composer = Composer(kept, [INDEX_OF[c] for c in recipe.category_ids], np.random.default_rng(recipe.seed + 1))
    model.train()
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.01)
    start, step, total = time.monotonic(), 0, 0.0
    while (progress := (time.monotonic() - start) / (60 * recipe.minutes)) < 1:
        pictures, boxes = _draw(sampler, composer, recipe)
        image = normalise(pictures, INPUT_MEAN, INPUT_STD).numpy()
        features = torch.from_numpy(frozen.run(None, {"x": image})[0]).contiguous(memory_format=torch.channels_last)
        targets = heat_targets(boxes, recipe.category_ids, INPUT_SIZE_PX, recipe.side_min_px)
        loss = prefilter_loss(model, features, *targets)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * rise_and_fall(step, 50, progress, floor=0.01)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimiser.step()
        step, total = step + 1, total + float(loss.detach())
        average_in(average, model.state_dict(), step, decay=0.998)
        if step % 50 == 0:
            log.info("step %d, %.3f of the time: loss %.4f", step, progress, total / 50)
            total = 0.0
    meta = {"category_ids": ",".join(map(str, recipe.category_ids))}
    state = {k: v.half().contiguous() if v.dtype.is_floating_point else v for k, v in average.items()}
    save_file(state, out / "prefilter.safetensors", meta)
    text = {"recipe": asdict(recipe), "source_weights": SOURCE_WEIGHTS, "steps": step, "pictures": step * recipe.batch}
    (out / "prefilter.json").write_text(json.dumps(text, indent=2) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with coco/, photos/, weights/ and the rest")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--interest", default=",".join(NAME_OF[c] for c in CATEGORY_IDS), help="classes to learn, comma separated")
    parser.add_argument("--minutes", type=float, default=PrefilterRecipe().minutes)
    parser.add_argument("--seed", type=int, default=PrefilterRecipe().seed)
    args = parser.parse_args()
    names = args.interest.split(",")
    if unknown := [n for n in names if n not in COCO_NAMES]:
        parser.error(f"not COCO classes: {', '.join(unknown)}")
    use_one_core()
    ids = tuple(next(c for c, n in NAME_OF.items() if n == name) for name in names)
    recipe = PrefilterRecipe(category_ids=ids, minutes=args.minutes, seed=args.seed)
    train(recipe, args.data, args.out, cache=args.out / "teacher.npz")


if __name__ == "__main__":
    main()
