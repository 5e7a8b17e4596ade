"""The prefilter: a small network on the stem's feature map that says whether a frame holds anything of interest.

After the neural filter of Matsubara & Levorato (2020, arXiv 2007.15818), with three differences: its first layers are
pretrained, it is taught where things are, not only that they are, and it scores every class by itself, so one network serves any
set of classes of interest.

Shape legend: N batch, K classes of interest; the stem's map is (N, 32, H / 2, W / 2) for an input of H x W px (multiples of 32),
the heat map (N, K, H / 16, W / 16).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from protos.errors import ConfigError, ModelError
from splitters.tasks.labels.coco_classes import NAME_OF
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0
from splitters.zoo.layers import conv_unit, fold_batch_norm, separable_unit

STEM_CHANNELS = 32
PEAKS = 2
LAST_BLOCK = 5
FEATURE_CHANNELS = 40 + 80
WEIGHTS = Path(__file__).parents[1] / "detector" / "weights" / "prefilter.safetensors"
# The classes the committed weights were trained for, as COCO category ids.
CATEGORY_IDS = (1, 2, 3, 4, 6, 8, 17, 18)  # person, bicycle, car, motorcycle, bus, truck, cat, dog


class Prefilter(nn.Module):
    """Stem map, halved, through pretrained blocks to a heat map per class, and from its peaks one logit per class.

    EfficientNet-Lite0's first six blocks see the map at half its resolution, a quarter of the cost; they stay as ImageNet left
    them, so a few thousand photos suffice to train what follows.

    Args:
        categories: K, the number of classes.
        channels: of the layers after the blocks.
        network: whose blocks are copied; a fresh one when None.
    """

    def __init__(self, categories: int = len(CATEGORY_IDS), channels: int = 64, network: EfficientNetLite0 | None = None) -> None:
        super().__init__()
        blocks = copy.deepcopy((network or EfficientNetLite0()).blocks[: LAST_BLOCK + 1])
        fold_batch_norm(blocks)
        self.blocks = cast("nn.Sequential", blocks.requires_grad_(requires_grad=False))
        self.body = nn.Sequential(
            conv_unit(FEATURE_CHANNELS, channels), separable_unit(channels, channels, 5), separable_unit(channels, channels, 5)
        )
        self.heat = nn.Conv2d(channels, categories, 1)
        self.scene = nn.Linear(channels, categories)
        nn.init.constant_(cast("nn.Parameter", self.heat.bias), -3.0)  # a cell starts at 5 %
        nn.init.zeros_(self.scene.weight)
        nn.init.zeros_(self.scene.bias)

    def features(self, stem: Tensor) -> Tensor:
        """The frozen part: the stem's map to (N, 120, H / 16, W / 16)."""
        fine = self.blocks[:-1](F.avg_pool2d(stem, 2))
        return torch.cat([fine, F.interpolate(self.blocks[-1](fine), scale_factor=2.0, mode="nearest")], dim=1)

    def judge(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The trained part: the heat map's logits, and the image's logit of every class (N, K)."""
        x = self.body(features)
        heat: Tensor = self.heat(x)
        # The mean of the highest few: one hot cell alone is often noise.
        peaks = heat.flatten(2).topk(PEAKS, dim=2).values.mean(dim=2)
        return heat, peaks + self.scene(x.mean(dim=(2, 3)))

    def forward(self, stem: Tensor) -> Tensor:
        """Logit of every class (N, K)."""
        return self.judge(self.features(stem))[1]


class InterestScore(nn.Module):
    """What a bundle's ``prefilter.onnx`` computes: the K classes' probabilities and, last, the highest of those of interest.

    Args:
        prefilter: trained.
        columns: which of its classes are of interest.
    """

    def __init__(self, prefilter: Prefilter, columns: Sequence[int]) -> None:
        super().__init__()
        self.prefilter, self.columns = prefilter, list(columns)

    def forward(self, stem: Tensor) -> Tensor:
        """Maps the stem's map to (N, K + 1) scores in 0..1."""
        scores = self.prefilter(stem).sigmoid()
        return torch.cat([scores, scores[:, self.columns].amax(dim=1, keepdim=True)], dim=1)


def columns_of(interest: Sequence[str], category_ids: Sequence[int] = CATEGORY_IDS) -> list[int]:
    """The columns of the classes named, ``["person", "car"]``.

    Raises:
        ConfigError: a name is no COCO class, or not among those the prefilter was trained for.
    """
    known = {NAME_OF[c]: i for i, c in enumerate(category_ids)}
    for name in interest:
        if name not in known:
            hint = "needs training (`splitters.training.prefilter.loop`)" if name in NAME_OF.values() else "is no COCO class"
            raise ConfigError(f"the prefilter knows {', '.join(known)}; {name!r} {hint}")
    if not interest:
        raise ConfigError("the prefilter needs at least one class of interest")
    return [known[name] for name in interest]


def load_prefilter(weights: Path = WEIGHTS) -> tuple[Prefilter, tuple[int, ...]]:
    """The trained prefilter in eval mode, and the COCO category ids of its columns.

    Raises:
        ModelError: the weights are absent or of another network.
    """
    from safetensors import safe_open

    if not weights.exists():
        raise ModelError(f"no prefilter weights at {weights}; train them with: python -m splitters.training.prefilter.loop --help")
    with safe_open(weights, "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
        meta = opened.metadata() or {}
    category_ids = tuple(int(c) for c in meta["category_ids"].split(",")) if "category_ids" in meta else CATEGORY_IDS
    model = Prefilter(len(category_ids))
    try:
        model.load_state_dict({k: v.float() if v.dtype.is_floating_point else v for k, v in state.items()})
    except RuntimeError as error:
        raise ModelError(f"{weights} does not hold a prefilter's weights: {str(error).splitlines()[0]}") from error
    return model.eval(), category_ids
