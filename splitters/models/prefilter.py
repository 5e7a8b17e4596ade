"""The prefilter: a small network on the stem's feature map that says whether a frame holds anything of interest.

After the neural filter of Matsubara & Levorato (2020, arXiv 2007.15818), with two differences: it is taught where things are, not
only that they are, and it scores every class by itself, so one network serves any set of classes of interest.

Shape legend: N batch, K classes of interest; the stem's map is (N, 32, H / 2, W / 2) for an input of H x W px (multiples of 32),
the heat map (N, K, H / 16, W / 16).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from protos.errors import ConfigError, ModelError
from splitters.models.coco_classes import NAME_OF
from splitters.models.fpn import separable_unit

STEM_CHANNELS = 32
PEAKS = 2
WEIGHTS = Path(__file__).parent.parent / "weights" / "detector" / "prefilter.safetensors"
# The classes the committed weights were trained for, as COCO category ids.
CATEGORY_IDS = (1, 2, 3, 4, 6, 8, 17, 18)  # person, bicycle, car, motorcycle, bus, truck, cat, dog


class _Residual(nn.Module):
    """A separable convolution added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unit = separable_unit(channels, channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        y: Tensor = x + self.unit(x)
        return y


class Prefilter(nn.Module):
    """Stem map to a heat map per class, and from its peaks one logit per class.

    Args:
        categories: K, the number of classes.
        channels: of the middle layers.
    """

    def __init__(self, categories: int = len(CATEGORY_IDS), channels: int = 64) -> None:
        super().__init__()
        wide = channels + channels // 2
        self.body = nn.Sequential(
            separable_unit(STEM_CHANNELS, channels // 2, 5, stride=2),
            separable_unit(channels // 2, channels, 5, stride=2),
            _Residual(channels),
            _Residual(channels),
            separable_unit(channels, wide, 5, stride=2),
            _Residual(wide),
            _Residual(wide),
            _Residual(wide),
        )
        self.heat = nn.Conv2d(wide, categories, 1)
        self.scene = nn.Linear(wide, categories)
        nn.init.constant_(cast("nn.Parameter", self.heat.bias), -3.0)  # a cell starts at 5 %
        nn.init.zeros_(self.scene.weight)
        nn.init.zeros_(self.scene.bias)

    def maps(self, stem: Tensor) -> tuple[Tensor, Tensor]:
        """The heat map's logits, and the image's logit of every class (N, K)."""
        x = self.body(stem)
        heat: Tensor = self.heat(x)
        # The mean of the highest few: one hot cell alone is often noise.
        peaks = heat.flatten(2).topk(PEAKS, dim=2).values.mean(dim=2)
        return heat, peaks + self.scene(x.mean(dim=(2, 3)))

    def forward(self, stem: Tensor) -> Tensor:
        """Logit of every class (N, K)."""
        return self.maps(stem)[1]


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
            hint = "needs training (splitters.train.prefilter_loop --interest)" if name in NAME_OF.values() else "is no COCO class"
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
        raise ModelError(f"no prefilter weights at {weights}; train them with: python -m splitters.train.prefilter_loop --help")
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
