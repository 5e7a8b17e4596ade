"""How much the model's answer feels each direction of what crosses a cut: the basis a latent should start from.

Principal components keep what varies most, which need not be what matters. Here the crossing channels are first measured in
the metric of the outputs: the Gauss-Newton matrix G of the loss at the teacher itself, of which random projections of the
outputs give samples (their gradients' second moment). The components of G^1/2 x are then ordered by how much they matter to
the answer, and one quantiser step for all of them is optimal (reverse water-filling).

Shape legend: N batch, F fused channels, fused maps (N, F, h, w).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from protos.messages import Classification
from splitters.bottleneck.crossing import Gather, Scatter
from splitters.bottleneck.learned import StagedModel, run_stages
from splitters.bottleneck.narrow import narrow
from splitters.tasks.base import form_of

_ROUNDS = 4
_FLOOR = 0.03  # share of the metric that is plain variance: what these photos do not show may matter on others


def output_metric(base: StagedModel, cut: Sequence[Tensor], gather: Gather, *, seed: int = 0) -> Tensor:
    """G, (F, F) float64, averaged over cells, scaled to mean diagonal 1.

    Args:
        base: its stages and what their outputs are.
        cut: crossing tensors of sample photos.
        gather: to the fused map.
        seed: of the projections.
    """
    scatter, generator = Scatter(gather), torch.Generator().manual_seed(seed)
    total = torch.zeros(gather.channels, gather.channels, dtype=torch.float64)
    with torch.enable_grad():
        for n in range(0, len(cut[0]), 8):
            fused = gather(*(t[n : n + 8] for t in cut)).detach().requires_grad_()
            outputs = [t.float() for t in run_stages(base.stages, scatter(fused))][base.taps :]
            weighted = _weighted(outputs, base)
            for _ in range(_ROUNDS):
                signs = [torch.randint(0, 2, t.shape, generator=generator) * 2.0 - 1 for t in weighted]
                felt = torch.stack([(t * s).sum() for t, s in zip(weighted, signs, strict=True)]).sum()
                (gradient,) = torch.autograd.grad(felt, fused, retain_graph=True)
                rows = gradient.permute(0, 2, 3, 1).reshape(-1, gather.channels).double()
                total += rows.T @ rows
    return total / total.diagonal().mean().clamp_min(1e-30)


def _weighted(outputs: Sequence[Tensor], base: StagedModel) -> list[Tensor]:
    """Outputs scaled so that a unit of each costs the same loss."""
    if base.raw:
        found = []
        for t, raw in zip(outputs, base.raw, strict=False):
            same = [
                o.detach().movedim(r.channel_axis, 1)
                for o, r in zip(outputs, base.raw, strict=False)
                if r.cells == raw.cells and r.probability
            ]
            sure = [p.sigmoid().amax(1, keepdim=True).movedim(1, raw.channel_axis) for p in same]
            confidence = torch.stack(sure).prod(0) if sure else torch.ones(())
            if raw.probability:
                p = t.detach().sigmoid()
                weight = p * (1 - p) * (confidence if t.shape[raw.channel_axis] > 1 else 1.0)
            else:
                weight = confidence / t.detach().var().clamp_min(1e-3)
            found.append(t * weight.sqrt())
        return found
    if form_of(base.task) is Classification and outputs[-1].ndim == 2:
        p = outputs[-1].detach().softmax(1)
        centred = outputs[-1] - (outputs[-1] * p).sum(1, keepdim=True)
        return [centred * p.sqrt()]
    return [t / t.detach().std().clamp_min(1e-6) for t in outputs]


@torch.no_grad()
def sensitive_start(project: nn.Conv2d, linear: nn.Conv2d, fused: Tensor, metric: Tensor) -> Tensor:
    """Sets an encoder's last and a decoder's linear 1x1 convolution to the components that the outputs feel most.

    Args:
        project: F to C.
        linear: C to F.
        fused: sample maps (N, F, h, w).
        metric: from ``output_metric``.

    Returns:
        Standard deviation of each latent channel, (C,), falling; 0 of those for which no component is left, where C is above F.
    """
    rows = fused.permute(0, 2, 3, 1).reshape(-1, fused.shape[1]).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((1 - _FLOOR) * metric + _FLOOR * torch.eye(len(metric), dtype=torch.float64))
    root = values.clamp_min(1e-9).sqrt()
    into, back = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    spread, basis = torch.linalg.eigh(into @ torch.cov((rows - mean).T) @ into)
    c = min(project.out_channels, len(mean))
    basis = basis.flip(1)[:, :c]
    encode, decode = (basis.T @ into).float(), (back @ basis).float()
    project.weight.zero_()
    project.weight[:c, :, 0, 0] = encode
    narrow(project.bias, nn.Parameter).zero_()
    narrow(project.bias, nn.Parameter)[:c] = -(encode @ mean.float())
    linear.weight.zero_()
    linear.weight[:, :c, 0, 0] = decode
    narrow(linear.bias, nn.Parameter).copy_(mean.float())
    deviation = torch.zeros(project.out_channels)
    deviation[:c] = spread.flip(0)[:c].clamp_min(0).sqrt().float()
    return deviation
