"""A light feature pyramid: top-down then bottom-up (PAN, Liu et al. 2018, arXiv 1803.01534), depthwise separable throughout.

Shape legend: N batch, C the pyramid's channels, H and W the detector's input size; levels have strides 8, 16, 32 px.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from splitters.zoo.layers import conv_unit, separable_unit


class LightPan(nn.Module):
    """Pyramid over three feature maps.

    Args:
        channels_in: channels of the maps at strides 8, 16 and 32.
        channels: C of every output level.
    """

    def __init__(self, channels_in: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(conv_unit(c, channels) for c in channels_in)
        self.down = nn.ModuleList(separable_unit(2 * channels, channels) for _ in channels_in[1:])
        self.shrink = nn.ModuleList(separable_unit(channels, channels, stride=2) for _ in channels_in[1:])
        self.up = nn.ModuleList(separable_unit(2 * channels, channels) for _ in channels_in[1:])

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (N, C_i, H / s, W / s), fine to coarse, to as many (N, C, H / s, W / s)."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(levels) - 2, -1, -1):
            above = F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
            levels[i] = self.down[i](torch.cat([levels[i], above], dim=1))
        for i in range(1, len(levels)):
            levels[i] = self.up[i - 1](torch.cat([levels[i], self.shrink[i - 1](levels[i - 1])], dim=1))
        return tuple(levels)
