"""Losses of a learned bottleneck: generalised head network distillation plus bits.

After Matsubara & Levorato 2020 (arXiv 2007.15818, GHND): the student is matched to its own frozen teacher at several
layers, no labels needed. Shape legend: N batch; every feature is (N, ...).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from protos.messages import Classification
from splitters.bottleneck.bottleneck import GainQuantiser
from splitters.bottleneck.learned import StagedModel
from splitters.bottleneck.raw_outputs import RawOutput
from splitters.codec.slices import quarters
from splitters.tasks.base import form_of
from splitters.training.config import LossWeights

_FAINT = 2e-3  # cells less believed in by the teacher have no say on classes and boxes: nearly all of them
_CERTAIN = 30.0  # logits beyond are as good as 0 and 1, and keep float32 finite


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of each sample in units of the teacher's variance over the batch, (N,)."""
    # Not teacher.var(0): over the batch axis of a large map that takes torch twenty times as long.
    spread = (teacher - teacher.mean(0)).square().mean().clamp_min(1e-6)
    return (student - teacher).square().mean(tuple(range(1, student.ndim))) / spread


def arrived(restored: Tensor, lost: float, rng: np.random.Generator) -> Tensor:
    """Which cells of each sample arrive when its slices are lost one by one, 1 or 0, (N, 1, h, w).

    Args:
        restored: (N, C, h, w); where the plane is too small for slices everything arrives.
        lost: probability of each slice; one of the four, drawn at random, arrives in any case.
        rng: of the losses.
    """
    n, _, height, width = restored.shape
    mask = np.ones((n, 1, height, width), np.float32)
    places = quarters(height, width)
    for sample in mask if places else ():
        spared = rng.integers(len(places))
        for index, (rows, columns) in enumerate(places):
            if rng.random() < lost and index != spared:
                sample[:, rows, columns] = 0
    return torch.from_numpy(mask).to(restored.device)


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


def detection_mismatch(student: Sequence[Tensor], teacher: Sequence[Tensor], raw: Sequence[RawOutput]) -> Tensor:
    """How far a detector's raw outputs lie from the teacher's where the teacher sees something, (N,).

    A branch of probabilities costs its Bernoulli divergence from the teacher's, summed over cells and classes; class
    probabilities count as much as the teacher believes an object to be there at all. Other branches (boxes) cost squared
    error in units of their variance over the teacher's objects, weighted by its confidence. Logits of classes of which one is
    nothing cost their divergence, summed over the queries. The sum is divided by the
    number of objects the teacher sees in a picture of the batch, so that empty cells, thousands to one, weigh what they should.

    Args:
        student: the branches' values before the sigmoid, (N, C, h, w) or (N, P, C).
        teacher: the same.
        raw: what they are.
    """
    cells: dict[tuple[int, ...], list[int]] = {}
    for i, r in enumerate(raw):
        cells.setdefault(r.cells, []).append(i)
    n = len(teacher[0])
    terms, objects = [], teacher[0].new_zeros(())
    for members in cells.values():
        # (N, cells, C): what a cell is given lies together
        mine, theirs = (
            {i: side[i].movedim(raw[i].channel_axis, -1).flatten(1, -2) for i in members} for side in (student, teacher)
        )
        sure = {i: theirs[i].amax(2).sigmoid() for i in members if raw[i].probability}
        sure |= {i: 1 - theirs[i].softmax(2)[..., -1] for i in members if raw[i].softmax}
        if not sure:
            terms += [relative_error(mine[i], theirs[i]) for i in members]
            continue
        present = [sure[i] for i in sure if theirs[i].shape[2] == 1]
        confidence = torch.stack(list(sure.values())).prod(0)
        objects = objects + confidence.sum() / n
        for i in members:
            if raw[i].softmax:
                terms.append(divergence(mine[i].movedim(2, 1), theirs[i].movedim(2, 1)).sum(1))
                continue
            if i in sure and (theirs[i].shape[2] == 1 or not present):
                terms.append(_bernoulli(mine[i], theirs[i]).sum((1, 2)))
                continue
            weight = present[0] if i in sure else confidence
            image, cell = torch.nonzero(weight > _FAINT, as_tuple=True)
            a, b, w = mine[i][image, cell], theirs[i][image, cell], weight[image, cell]
            if i in sure:
                wrong = _bernoulli(a, b).sum(1)
            else:
                mean = (b * w[:, None]).sum(0) / w.sum().clamp_min(1e-6)
                spread = ((b - mean).square() * w[:, None]).sum(0) / w.sum().clamp_min(1e-6)
                wrong = ((a - b).square() / spread.clamp_min(1e-3)).mean(1)
            terms.append(wrong.new_zeros(n).index_add(0, image, wrong * w))
    return torch.stack(terms).sum(0) / objects.clamp_min(1.0)


def _bernoulli(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the student's probability from the teacher's, of logits, elementwise, nats."""
    teacher, student = teacher.clamp(-_CERTAIN, _CERTAIN), student.clamp(-_CERTAIN, _CERTAIN)
    p = teacher.sigmoid()
    return p * (teacher - student) + functional.softplus(student) - functional.softplus(teacher)


def staged_distortion(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: LossWeights, base: StagedModel) -> Tensor:
    """Weighted mismatch of each sample over crossing tensors, taps and the model's own outputs, (N,).

    Args:
        student: crossing tensors, then stage outputs.
        teacher: the same of the uncut model.
        weights: of the terms; the taps' are averaged over the tensors.
        base: says which is which.
    """
    classifies = form_of(base.task) is Classification
    if base.taps == 0 and base.cuts == 1 and not base.raw:
        return distortion(student, teacher, weights, logits=classifies)
    pairs = list(zip(student, teacher, strict=True))
    at, end = base.cuts, base.cuts + base.taps
    total = weights.cut * torch.stack([relative_error(a, b) for a, b in pairs[:at]]).mean(0)
    if end > at:
        total = total + sum(weights.stages) * torch.stack([relative_error(a, b) for a, b in pairs[at:end]]).mean(0)
    if base.raw:
        branches = pairs[end : end + len(base.raw)]
        return total + weights.logits * detection_mismatch([a for a, _ in branches], [b for _, b in branches], base.raw)
    outputs = [divergence(a, b) if classifies and a.ndim == 2 else relative_error(a, b) for a, b in pairs[end:]]
    return total + weights.logits * torch.stack(outputs).mean(0)


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
