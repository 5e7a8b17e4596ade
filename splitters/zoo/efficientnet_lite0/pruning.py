"""Structured pruning of inverted residual blocks by least squares, to make a model's own blocks a lighter encoder.

Channels of a block's expansion are removed one by one, always the one whose loss the rest can best make up for
(backward elimination, as in Optimal Brain Surgeon, Hassibi & Stork 1993), and the projection is solved again so that
the pruned block, fed with the *pruned* model's activations, gives the full model's output.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from protos.errors import ConfigError
from splitters.bottleneck.narrow import narrow
from splitters.zoo.efficientnet_lite0.network import MBConv

_SAMPLES = 40_000


class Pick(nn.Module):
    """Some channels of a map: what a pruned block without an expansion begins with.

    Args:
        kept: indices of the channels, int64.
    """

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept: Tensor
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, len(kept), H, W)."""
        return x.index_select(1, self.kept)


def _keep(layer: nn.Sequential, kept: Tensor, *, depthwise: bool) -> None:
    conv, norm = narrow(layer[0], nn.Conv2d), layer[1]
    conv.weight.data = conv.weight.data[kept].clone()
    conv.out_channels = len(kept)
    if depthwise:
        conv.in_channels = conv.groups = len(kept)
    if not isinstance(norm, nn.BatchNorm2d):
        bias = narrow(conv.bias, nn.Parameter)
        bias.data = bias.data[kept].clone()
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).data = getattr(norm, name).data[kept].clone()
    norm.num_features = len(kept)


def eliminate(hidden: Tensor, target: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which rows of ``hidden`` to keep, and the least-squares map from them to ``target``.

    Args:
        hidden: (M, samples), centred, float64.
        target: (D, samples), centred, float64.
        keep: how many of the M rows stay.

    Returns:
        Kept indices (keep,) and weights (D, keep).
    """
    gram = hidden @ hidden.T
    size = len(gram)
    inverse = torch.linalg.inv(gram + 1e-4 * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype))
    weights = (target @ hidden.T) @ inverse
    alive = torch.ones(size, dtype=torch.bool)
    for _ in range(size - keep):
        cost = (weights**2).sum(0) / inverse.diagonal()
        cost[~alive] = torch.inf
        gone = int(cost.argmin())
        weights = weights - torch.outer(weights[:, gone], inverse[gone] / inverse[gone, gone])
        inverse = inverse - torch.outer(inverse[:, gone], inverse[gone]) / inverse[gone, gone]
        alive[gone] = False
        weights[:, gone] = 0
        inverse[gone, :] = 0
        inverse[:, gone] = 0
        inverse[gone, gone] = 1
    kept = alive.nonzero().flatten()
    return kept, weights[:, kept]


@torch.no_grad()
def prune_block(block: MBConv, keep: int, x: Tensor, target: Tensor) -> MBConv:
    """``block`` with ``keep`` expansion channels whose output on ``x`` comes closest to ``target``.

    Args:
        block: an inverted residual block, its norms apart or already part of its convolutions.
        keep: expansion channels that stay; of a block without an expansion, channels of its input.
        x: (N, C_in, H, W), what the pruned block will be fed with.
        target: (N, C_out, h, w), what it shall give, before its residual sum.

    Raises:
        ConfigError: ``keep`` is more than the block has.
    """
    hidden = block.depthwise(block.expand(x)).transpose(0, 1).flatten(1)
    if not 0 < keep <= len(hidden):
        raise ConfigError(f"this block has {len(hidden)} expansion channels, so {keep} cannot be kept")
    chosen = torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(0))[:_SAMPLES]
    rows, wanted = hidden[:, chosen].double(), target.transpose(0, 1).flatten(1)[:, chosen].double()
    mean, wanted_mean = rows.mean(1, keepdim=True), wanted.mean(1, keepdim=True)
    kept, weights = eliminate(rows - mean, wanted - wanted_mean, keep)
    pruned = copy.deepcopy(block)
    if isinstance(block.expand, nn.Identity):
        pruned.expand = Pick(kept)
    else:
        _keep(narrow(pruned.expand, nn.Sequential), kept, depthwise=False)
    _keep(pruned.depthwise, kept, depthwise=True)
    conv, norm = narrow(pruned.project[0], nn.Conv2d), pruned.project[1]
    conv.in_channels = keep
    conv.weight.data = weights.float()[:, :, None, None].contiguous()
    offset = (wanted_mean - weights @ mean[kept]).flatten().float()
    if not isinstance(norm, nn.BatchNorm2d):
        narrow(conv.bias, nn.Parameter).data = offset
        return pruned
    norm.running_mean = torch.zeros(norm.num_features)
    norm.running_var = torch.full((norm.num_features,), 1.0 - norm.eps)
    norm.weight.data.fill_(1.0)
    norm.bias.data = offset
    return pruned


@torch.no_grad()
def prune_blocks(blocks: nn.Sequential, keep: Mapping[int, int], x: Tensor) -> nn.Sequential:
    """``blocks`` with some of them pruned in order, each making up for what the earlier ones lost.

    Args:
        blocks: a chain of MBConv; the original is left as it was.
        keep: block index to expansion channels kept.
        x: sample input of the chain, (N, C, H, W).
    """
    pruned = copy.deepcopy(blocks).eval()
    full, slim = x, x
    for i, layer in enumerate(blocks):
        block = narrow(layer, MBConv)
        full_out = block(full)
        if i in keep:
            target = full_out - slim if block.residual else full_out
            pruned[i] = prune_block(block, keep[i], slim, target)
        full, slim = full_out, pruned[i](slim)
    return pruned
