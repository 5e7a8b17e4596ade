"""The learned bottleneck's middle and server side: gain tiers, entropy proxy, decoder.

Shape legend: N batch, C latent channels, T gain tiers; latents are (N, C, h, w), cut tensors (N, D, h, w).

The bitrate knob lives in one checkpoint: gain units (Cui et al. 2021, arXiv 2003.02012) scale each channel before
rounding, and channels are ordered by importance through random truncation in training (tail-drop, Koike-Akino &
Wang 2020), so every prefix of channels decodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_MIN_PROBABILITY = 2.0**-16
_BISECTIONS = 14


class GainQuantiser(nn.Module):
    """Per-channel gains for every tier, rounding, and a factorised logistic estimate of the bits.

    Args:
        channels: C.
        steps: quantiser step of each tier in units of the latent's scale, finest first.
        scale: the latent's rough standard deviation, sets the initial prior.
    """

    def __init__(self, channels: int, steps: tuple[float, ...], scale: float = 1.0) -> None:
        super().__init__()
        start = torch.tensor([-math.log(step) for step in steps])[:, None].repeat(1, channels)
        self.log_gain = nn.Parameter(start.clone())
        self.log_ungain = nn.Parameter(-start.clone())
        self.prior_mean = nn.Parameter(torch.zeros(len(steps), channels))
        self.prior_log_scale = nn.Parameter(start + math.log(scale / 1.8))

    def symbols(self, latent: Tensor, tier: Tensor) -> Tensor:
        """Latent times gain, not yet rounded.

        Args:
            latent: (N, C, h, w).
            tier: (N,) int64, the gain tier of each sample.
        """
        return latent * self.log_gain[tier].exp()[:, :, None, None]

    def restore(self, symbols: Tensor, tier: Tensor) -> Tensor:
        """Symbols (N, C, h, w) back to latent units."""
        return symbols * self.log_ungain[tier].exp()[:, :, None, None]

    def bits(self, symbols: Tensor, tier: Tensor, kept: Tensor) -> Tensor:
        """Estimated bits of each sample, (N,).

        Args:
            symbols: (N, C, h, w), rounded.
            tier: (N,).
            kept: (N, C) 1 where the channel is sent, 0 where it is dropped.
        """
        mean = self.prior_mean[tier][:, :, None, None]
        rate = torch.exp(-self.prior_log_scale[tier])[:, :, None, None]
        centred = -(symbols - mean).abs()  # the left tail keeps its precision
        mass = torch.sigmoid((centred + 0.5) * rate) - torch.sigmoid((centred - 0.5) * rate)
        nats = -torch.log(mass.clamp_min(_MIN_PROBABILITY)).sum((2, 3))
        return (nats * kept).sum(1) / math.log(2.0)

    @torch.no_grad()
    def shift(self, tier: int, amount: float) -> None:
        """Scales a tier's gains by ``exp(amount)``; its inverse gains and prior follow."""
        self.log_gain[tier] += amount
        self.log_ungain[tier] -= amount
        self.prior_log_scale[tier] += amount
        self.prior_mean[tier] *= math.exp(amount)

    @torch.no_grad()
    def aim(self, latent: Tensor, target_bits: Sequence[float]) -> None:
        """Sets every tier's gains and prior so that samples cost what they should from the first step on.

        Args:
            latent: of sample photos (N, C, h, w).
            target_bits: of a sample, per tier.
        """
        mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3)).clamp_min(1e-6)
        kept = torch.ones(latent.shape[:2])
        for number, target in enumerate(target_bits):
            tier = torch.full((len(latent),), number)
            low, high = -12.0, 12.0
            for _ in range(_BISECTIONS):
                gain = (low + high) / 2
                self.log_gain[number], self.log_ungain[number] = gain, -gain
                self.prior_mean[number] = mean * math.exp(gain)
                # A floor keeps channels that round to zero everywhere from a prior so narrow that it cannot recover.
                self.prior_log_scale[number] = (deviation * math.exp(gain) / 1.8).clamp_min(0.08).log()
                above = float(self.bits(self.symbols(latent, tier).round(), tier, kept).mean()) > target
                low, high = (low, gain) if above else (gain, high)

    def forward(self, latent: Tensor, tier: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Quantises for training: straight-through rounding for the decoder and for the bits.

        Uniform noise in the place of rounding, usual for the bits, overrates mostly-zero channels severalfold at the
        small payloads wanted here.

        Returns:
            The restored latent (N, C, h, w), zero where dropped, and the estimated bits (N,).
        """
        y = self.symbols(latent, tier)
        rounded = y + (y.round() - y).detach()
        return self.restore(rounded, tier) * kept[:, :, None, None], self.bits(rounded, tier, kept)


class ConvNextBlock(nn.Module):
    """Residual block: depthwise 7x7, norm over channels, 1x1 up, GELU, 1x1 down (Liu et al. 2022, arXiv 2201.03545)."""

    def __init__(self, channels: int, expansion: int = 3) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.up = nn.Conv2d(channels, channels * expansion, 1)
        self.down = nn.Conv2d(channels * expansion, channels, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias if self.down.bias is not None else torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, h, w) to the same."""
        y: Tensor = self.down(functional.gelu(self.up(self.norm(self.spatial(x)))))
        return x + y


class Decoder(nn.Module):
    """Latent back to the cut tensor: a linear path plus a residual correction.

    Args:
        c_latent: C.
        c_cut: D.
        width: channels of the correction.
        depth: its residual blocks.
    """

    def __init__(self, c_latent: int, c_cut: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.linear = nn.Conv2d(c_latent, c_cut, 1)
        self.lift = nn.Conv2d(c_latent, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ConvNextBlock(width) for _ in range(depth)))
        self.land = nn.Conv2d(width, c_cut, 1)
        nn.init.zeros_(self.land.weight)
        if self.land.bias is not None:
            nn.init.zeros_(self.land.bias)

    def forward(self, latent: Tensor) -> Tensor:
        """Maps (N, C, h, w) to (N, D, h, w)."""
        y: Tensor = self.linear(latent) + self.land(self.blocks(self.lift(latent)))
        return y
