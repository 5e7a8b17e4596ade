"""Encoders that all start from the shared stem's feature map and meet in one latent.

Shape legend: N batch, S stem channels, C latent channels; the stem's map is (N, S, H0, W0), the latent (N, C, h, w).
The latent's shape never depends on the tier.

After the slimmable ensemble of Assine et al. 2023 (arXiv 2306.12691): small encoders whose latents are summed, of
which a device runs as many as it can afford. The largest encoder here is the base model's own first blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protos.errors import ConfigError
from splitters.bottleneck.narrow import narrow
from splitters.bottleneck.slimmable import SlimmableBatchNorm2d, SlimmableConv2d, at_width


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallEncoderConfig:
    """A small depthwise-separable encoder.

    Attributes:
        channels: outputs of each strided stage at width 1.
        strides: stride of each stage, 1 or 2; their product takes the stem's map to the latent's.
        kernels: depthwise kernel of each stage.
        depth: residual blocks at the latent's resolution.
        deep: further residual blocks there that start as the identity, so that they can join a trained encoder.
        widths: the widths it can run at.
        trunk: how many of the base's own blocks after the stem it keeps, frozen, in front.
    """

    channels: tuple[int, ...] = (64, 128, 224)
    strides: tuple[int, ...] = (2, 2, 2)
    kernels: tuple[int, ...] = (3, 5, 5)
    depth: int = 1
    deep: int = 0
    widths: tuple[float, ...] = (1.0,)
    trunk: int = 0

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.strides) == len(self.kernels):
            raise ConfigError("channels, strides and kernels name one value for each stage")
        if not self.widths or any(not 0 < w <= 1 for w in self.widths):
            raise ConfigError("widths lie in (0, 1]")


class _Residual(nn.Module):
    """x + pointwise(depthwise(x)), slimmable."""

    def __init__(self, channels: int, widths: Iterable[float], kernel: int = 5) -> None:
        super().__init__()
        widths = tuple(widths)
        self.body = nn.Sequential(*_separable(channels, channels, kernel, 1, widths))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C', h, w) to the same."""
        y: Tensor = self.body(x)
        return x + y


class _Deep(_Residual):
    """A residual block whose branch ends linearly and starts at zero."""

    def __init__(self, channels: int, widths: Iterable[float], kernel: int = 5) -> None:
        super().__init__(channels, widths, kernel)
        self.body = nn.Sequential(*list(self.body)[:-1])
        for norm in narrow(self.body[-1], SlimmableBatchNorm2d).norms:
            nn.init.zeros_(narrow(norm, nn.BatchNorm2d).weight)


def _separable(
    c_in: int, c_out: int, kernel: int, stride: int, widths: tuple[float, ...], *, slim_in: bool = True
) -> list[nn.Module]:
    depthwise = SlimmableConv2d(c_in, c_in, kernel, stride, depthwise=True, slim_in=slim_in, slim_out=slim_in)
    first: nn.Module = SlimmableBatchNorm2d(c_in, widths) if slim_in else nn.BatchNorm2d(c_in, momentum=0.02)
    pointwise = SlimmableConv2d(c_in, c_out, 1, slim_in=slim_in)
    return [depthwise, first, nn.ReLU(), pointwise, SlimmableBatchNorm2d(c_out, widths), nn.ReLU()]


class SmallEncoder(nn.Module):
    """Depthwise-separable, slimmable; optionally behind frozen first blocks of the base model.

    Args:
        config: its layers.
        c_in: channels of the map it starts from (the trunk's output, where there is one).
        c_latent: latent channels, the same at every width.
        trunk: frozen blocks in front, None for none.
    """

    def __init__(self, config: SmallEncoderConfig, c_in: int, c_latent: int, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.widths = config.widths
        self.trunk = nn.Identity() if trunk is None else trunk.requires_grad_(False)
        layers: list[nn.Module] = []
        for i, (c_out, stride, kernel) in enumerate(zip(config.channels, config.strides, config.kernels, strict=True)):
            layers += _separable(c_in, c_out, kernel, stride, config.widths, slim_in=i > 0)
            c_in = c_out
        layers += [_Residual(c_in, config.widths) for _ in range(config.depth)]
        self.body = nn.Sequential(*layers)
        self.deep = nn.Sequential(*(_Deep(c_in, config.widths) for _ in range(config.deep)))
        self.project = SlimmableConv2d(c_in, c_latent, 1, bias=True, slim_out=False)

    def train(self, mode: bool = True) -> SmallEncoder:
        """As ``nn.Module.train``, but the trunk stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Maps the stem's (N, S, H0, W0) to its share of the latent, (N, C, h, w)."""
        y: Tensor = self.project(self.deep(self.body(self.trunk(x))))
        return y


class OwnEncoder(nn.Module):
    """The base model's own blocks up to the cut (pruned or not), then one 1x1 convolution: the largest encoder.

    Args:
        body: stem map to cut tensor.
        c_cut: channels at the cut.
        c_latent: latent channels.
    """

    widths = (1.0,)

    def __init__(self, body: nn.Module, c_cut: int, c_latent: int) -> None:
        super().__init__()
        self.body = body
        self.project = nn.Conv2d(c_cut, c_latent, 1)

    def train(self, mode: bool = True) -> OwnEncoder:
        """As ``nn.Module.train``, but the body's norms keep their statistics."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Maps the stem's (N, S, H0, W0) to the latent (N, C, h, w)."""
        y: Tensor = self.project(self.body(x))
        return y


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """Which encoders run together, and how wide: one setting of the compute knob.

    Attributes:
        name: short, goes into operating-point ids.
        runs: (encoder index, width) pairs whose latents are summed.
    """

    name: str
    runs: tuple[tuple[int, float], ...]


class EncoderEnsemble(nn.Module):
    """Encoders and the tiers in which they may run.

    Args:
        encoders: each maps the stem's map to (N, C, h, w).
        tiers: cheapest first.
    """

    def __init__(self, encoders: Sequence[nn.Module], tiers: Sequence[Tier]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.tiers = tuple(tiers)
        for tier in self.tiers:
            for index, width in tier.runs:
                known: tuple[float, ...] = getattr(encoders[index], "widths", (1.0,))
                if width not in known:
                    raise ConfigError(f"tier {tier.name!r} wants encoder {index} at width {width}, which knows {known}")

    def run(self, index: int, width: float, stem_map: Tensor) -> Tensor:
        """One encoder's share of the latent."""
        with at_width(self.encoders[index], width) as encoder:
            share: Tensor = encoder(stem_map)
        return share

    def forward(self, stem_map: Tensor, tier: int) -> Tensor:
        """The latent (N, C, h, w) of ``stem_map`` in tier number ``tier``."""
        shares = [self.run(index, width, stem_map) for index, width in self.tiers[tier].runs]
        return torch.stack(shares).sum(0) if len(shares) > 1 else shares[0]
