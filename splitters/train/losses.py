"""Losses of a learned bottleneck: generalised head network distillation plus bits.

After Matsubara & Levorato 2020 (arXiv 2007.15818, GHND): the student is matched to its own frozen teacher at several
layers, no labels needed. Shape legend: N batch; every feature is (N, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from splitters.models.bottleneck import GainQuantiser
from splitters.train.config import LossWeights


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of each sample in units of the teacher's variance over the batch, (N,)."""
    spread = teacher.var(0, unbiased=False).mean().clamp_min(1e-6)
    return (student - teacher).pow(2).flatten(1).mean(1) / spread


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's class probabilities from the teacher's, (N,), nats."""
    return functional.kl_div(
        functional.log_softmax(student, 1), functional.log_softmax(teacher, 1), log_target=True, reduction="none"
    ).sum(1)


def distortion(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: LossWeights, *, logits: bool) -> Tensor:
    """Weighted mismatch of each sample, (N,).

    Args:
        student: cut tensor, then stage outputs.
        teacher: the same of the uncut model.
        weights: of the terms; stages beyond those given weigh as the last given.
        logits: the last tensor holds class scores.
    """
    total = weights.cut * relative_error(student[0], teacher[0])
    last = len(student) - 1
    for i, (mine, theirs) in enumerate(zip(student[1:], teacher[1:], strict=True), start=1):
        if i == last:
            total = total + weights.logits * (divergence(mine, theirs) if logits else relative_error(mine, theirs))
        else:
            total = total + weights.stages[min(i - 1, len(weights.stages) - 1)] * relative_error(mine, theirs)
    return total


class BitrateSteering:
    """Trade-off lambda of each gain tier (per bit), steered so that the tier's estimated size meets its target.

    The gains are moved along with it, in small steps: waiting for the gradient alone would drive the coarse tiers'
    lambda so high that their bits drown every other tier's loss.

    Args:
        target_bits: wanted bits of a sample, per tier.
        start: first lambda of every tier, loss per kilobit.
        pace: how fast log lambda follows the log error.
        gain_pace: how fast log gains do.
    """

    def __init__(self, target_bits: Sequence[float], start: Sequence[float], pace: float = 0.01, gain_pace: float = 0.03) -> None:
        self.target = torch.tensor(list(target_bits))
        self.log_lambda = torch.log(torch.tensor(list(start)))
        self.pace = pace
        self.gain_pace = gain_pace

    def weight(self, tier: Tensor) -> Tensor:
        """Loss per bit of each sample, (N,)."""
        return self.log_lambda.exp()[tier] / 1000.0

    def observe(self, tier: Tensor, bits: Tensor, quantiser: GainQuantiser) -> None:
        """Moves lambda up and gains down where ``tier`` (N,) spent more ``bits`` (N,) than its target, else the reverse."""
        for t in set(tier.tolist()):
            error = torch.log(bits[tier == t].mean().clamp_min(1.0) / self.target[t])
            error = error.clamp(-1, 1)
            self.log_lambda[t] = (self.log_lambda[t] + self.pace * error).clamp(-7.0, -1.2)
            quantiser.shift(t, -self.gain_pace * float(error))
