"""Slimmable layers: one set of weights, run at several widths (Yu & Huang 2019, arXiv 1903.05134, "US-Net").

Shape legend: N batch, C channels, H and W feature-map height and width. A width w in (0, 1] uses the leading
``ceil(w * C)`` channels of a layer; every width has its own normalisation statistics and affine parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from protos.errors import ConfigError
from splitters.bottleneck.narrow import narrow


def slim_channels(channels: int, width: float) -> int:
    """How many leading channels a layer of ``channels`` uses at ``width``."""
    return max(1, math.ceil(channels * width - 1e-9))


class SlimmableConv2d(nn.Conv2d):
    """A convolution whose inner sides use leading channels only.

    Args:
        slim_in: the input is sliced with the width; otherwise it always comes in full.
        slim_out: the output is sliced with the width; a depthwise layer has both or neither.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        *,
        depthwise: bool = False,
        bias: bool = False,
        slim_in: bool = True,
        slim_out: bool = True,
    ) -> None:
        if depthwise and (c_in != c_out or slim_in != slim_out):
            raise ConfigError("a depthwise convolution keeps its channels: give equal c_in and c_out, and slim both or neither")
        super().__init__(c_in, c_out, kernel, stride, padding=kernel // 2, groups=c_in if depthwise else 1, bias=bias)
        self.depthwise, self.slim_in, self.slim_out, self.width = depthwise, slim_in, slim_out, 1.0

    def sliced(self) -> tuple[Tensor, Tensor | None, int]:
        """Weight, bias and groups in use at the present width."""
        c_out = slim_channels(self.out_channels, self.width) if self.slim_out else self.out_channels
        c_in = slim_channels(self.in_channels, self.width) if self.slim_in else self.in_channels
        weight = self.weight[:c_out] if self.depthwise else self.weight[:c_out, :c_in]
        return weight, None if self.bias is None else self.bias[:c_out], c_out if self.depthwise else 1

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C_in', H, W) to (N, C_out', H / stride, W / stride), primes being the channels in use."""
        weight, bias, groups = self.sliced()
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class SlimmableBatchNorm2d(nn.Module):
    """Batch norm with separate statistics and affine parameters for every width.

    Args:
        channels: channels at width 1.
        widths: the widths it knows.
    """

    def __init__(self, channels: int, widths: Iterable[float]) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(slim_channels(channels, w), momentum=0.02) for w in self.widths)
        self.width = 1.0

    def at_width(self) -> nn.BatchNorm2d:
        """The plain batch norm of the present width."""
        norm = self.norms[self.widths.index(self.width)]
        return narrow(norm, nn.BatchNorm2d)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (N, C', H, W)."""
        y: Tensor = self.at_width()(x)
        return y


def set_width(module: nn.Module, width: float) -> None:
    """Sets the width of every slimmable layer below ``module``.

    Raises:
        ConfigError: a norm below was not built for this width.
    """
    for layer in module.modules():
        if isinstance(layer, SlimmableBatchNorm2d) and width not in layer.widths:
            raise ConfigError(f"width {width} is none of this encoder's widths {layer.widths}")
        if isinstance(layer, SlimmableConv2d | SlimmableBatchNorm2d):
            layer.width = width


@contextmanager
def at_width(module: nn.Module, width: float) -> Iterator[nn.Module]:
    """``module`` at ``width`` for the length of a ``with`` block, at width 1 afterwards."""
    set_width(module, width)
    try:
        yield module
    finally:
        for layer in module.modules():
            if isinstance(layer, SlimmableConv2d | SlimmableBatchNorm2d):
                layer.width = 1.0


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor], widths: Iterable[float]) -> None:
    """Re-estimates the norm statistics of every width as the plain average over ``batches``.

    Args:
        module: what maps a batch to anything, with slimmable norms inside.
        batches: inputs of ``module``; run once per width, so pass a list.
        widths: the widths to re-calibrate.
    """
    was_training = module.training
    kept = list(batches)
    for width in widths:
        with at_width(module, width):
            norms = [layer.at_width() for layer in module.modules() if isinstance(layer, SlimmableBatchNorm2d)]
            momenta = [norm.momentum for norm in norms]
            module.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for batch in kept:
                module(batch)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    module.train(was_training)


def frozen_copy(module: nn.Module) -> nn.Module:
    """``module`` at its present width as plain layers (slices materialised), for export; parameters are copied.

    Raises:
        ConfigError: a norm has no preceding layer of its own width (cannot happen for modules built here).
    """
    if isinstance(module, SlimmableConv2d):
        weight, bias, groups = module.sliced()
        conv = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            module.kernel_size[0],
            module.stride[0],
            padding=module.padding[0],
            groups=groups,
            bias=bias is not None,
        )
        conv.weight.data = weight.detach().clone()
        if bias is not None and conv.bias is not None:
            conv.bias.data = bias.detach().clone()
        return conv
    if isinstance(module, SlimmableBatchNorm2d):
        source = module.at_width()
        norm = nn.BatchNorm2d(source.num_features, eps=source.eps)
        norm.load_state_dict(source.state_dict())
        return norm
    return _copy_children(module)


def _copy_children(module: nn.Module) -> nn.Module:
    import copy

    if not any(isinstance(layer, SlimmableConv2d | SlimmableBatchNorm2d) for layer in module.modules()):
        return copy.deepcopy(module)
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {name: frozen_copy(child) for name, child in module.named_children()}
    return twin
