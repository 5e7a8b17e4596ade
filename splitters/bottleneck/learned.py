"""A base model with a learned bottleneck at its cut: stem, encoders, quantiser, decoder, tail in stages.

Shape legend: N batch, images (N, 3, H, W), stem map (N, S, H0, W0), latent (N, C, h, w), cut tensor (N, D, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitters.bottleneck.bottleneck import Decoder, GainQuantiser
from splitters.bottleneck.ensemble import EncoderEnsemble
from splitters.bottleneck.raw_outputs import RawOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedModel:
    """A model in pieces, the cut between ``body`` and the first of ``stages``.

    Attributes:
        stem: image to the map that all encoders start from.
        body: stem map to cut tensor.
        stages: the tail; the output of each is a place where student and teacher can be matched.
        task: ``classification`` adds distillation of the logits, the last stage's output; anything else matches
            the last stage's tensors as they are.
        cuts: how many tensors cross the cut.
        taps: how many of the stages' outputs lie before the model's own (0: all but the last).
        raw: the branches of a detector's output, which follow the taps; empty: matched as it is.
        same_front: the student's largest encoder begins with this very stem and body, so that while they are frozen one run
            of them serves both.
    """

    stem: nn.Module
    body: nn.Module
    stages: tuple[nn.Module, ...]
    task: str = "classification"
    cuts: int = 1
    taps: int = 0
    raw: tuple[RawOutput, ...] = ()
    same_front: bool = False

    def modules(self) -> nn.ModuleList:
        """All pieces, for moving, freezing and counting."""
        return nn.ModuleList([self.stem, self.body, *self.stages])


def run_stages(stages: Sequence[nn.Module], cut: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs of every stage, in order; a stage that returns several tensors adds each of them."""
    outputs: list[Tensor] = []
    x: object = cut
    for stage in stages:
        x = stage(*x) if isinstance(x, tuple | list) else stage(x)
        outputs += _tensors(x)
    return outputs


def _tensors(x: object) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for value in x.values() for t in _tensors(value)]
    if isinstance(x, tuple | list):
        return [t for value in x for t in _tensors(value)]
    return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The operating point of each sample in a batch.

    Attributes:
        gain: (N,) int64 gain tier.
        kept: (N, C) 1.0 where the channel is sent.
    """

    gain: Tensor
    kept: Tensor


class LearnedSplit(nn.Module):
    """Student: the whole split model with its bottleneck.

    Args:
        stem: frozen, shared with the base.
        ensemble: encoders and tiers.
        quantiser: gains, rounding, bit estimate.
        decoder: latent to cut tensor.
        stages: the student's tail.
    """

    def __init__(
        self, stem: nn.Module, ensemble: EncoderEnsemble, quantiser: GainQuantiser, decoder: Decoder, stages: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.stem = stem
        self.ensemble = ensemble
        self.quantiser = quantiser
        self.decoder = decoder
        self.stages = nn.ModuleList(stages)

    def train(self, mode: bool = True) -> LearnedSplit:
        """As ``nn.Module.train``, but stem and tail keep their norm statistics."""
        super().train(mode)
        self.stem.eval()
        self.stages.eval()
        return self

    def latent(self, images: Tensor, tier: int) -> Tensor:
        """The latent of ``images`` in one encoder tier."""
        with torch.no_grad():
            stem_map = self.stem(images)
        latent: Tensor = self.ensemble(stem_map, tier)
        return latent

    def answer(self, latent: Tensor) -> list[Tensor]:
        """Cut tensors and stage outputs from a restored latent."""
        cut = self.decoder(latent)
        return [*_tensors(cut), *run_stages(list(self.stages), cut)]

    @torch.no_grad()
    def symbols(self, images: Tensor, tier: int, gain: int) -> Tensor:
        """Integer symbols (N, C, h, w), int32, as the device computes them."""
        latent = self.latent(images, tier)
        index = torch.full((len(images),), gain, dtype=torch.int64, device=images.device)
        return self.quantiser.symbols(latent, index).round().to(torch.int32)
