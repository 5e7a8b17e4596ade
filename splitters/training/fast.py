"""Convolutions whose gradients are fast on a processor: the same mathematics, other kernels.

PyTorch 2.13 on one core spends two thirds of a training step of this detector in the gradients of depthwise convolutions and in
1x1 convolutions that fall back on im2col. Here a depthwise kernel's gradient is a sum of shifted products and its input's gradient
a forward convolution with the turned kernel; a 1x1 convolution is a matrix product of the channels-last tensor, which may run in
bfloat16. Modules keep their parameters and names.

Shape legend: N batch, C channels, H and W a map's height and width, k the kernel's side.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of (N, C, H, W) with (C, 1, k, k), zero padding."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        """Convolves; keeps the input and the kernel."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding  # type: ignore[attr-defined]
        return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of input and kernel."""
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        stride, padding = ctx.stride, ctx.padding  # type: ignore[attr-defined]
        side, channels = weight.shape[-1], x.shape[1]
        from_above = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            spaced = grad
            if stride > 1:  # the gradient on the input's grid, zeros between
                low, high = side - 1 - padding, [side - 1 - padding + (n + 2 * padding - side) % stride for n in x.shape[2:]]
                size = [(n - 1) * stride + 1 + low + h for n, h in zip(grad.shape[2:], high, strict=True)]
                spaced = grad.new_zeros((len(grad), *size, channels)).permute(0, 3, 1, 2)
                spaced[:, :, low : size[0] - high[0] : stride, low : size[1] - high[1] : stride] = grad
            from_above = F.conv2d(spaced, weight.flip(2, 3), None, 1, side - 1 - padding if stride == 1 else 0, groups=channels)
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            return from_above, None, None, None
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *(padding,) * 4)).float().contiguous()
        spread = grad.permute(0, 2, 3, 1).float().contiguous()
        height, width = spread.shape[1:3]
        buffer, sums = torch.empty_like(spread), []
        for i in range(side):
            for j in range(side):
                window = padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
                sums.append(torch.mul(window, spread, out=buffer).sum((0, 1, 2)))
        return from_above, torch.stack(sums, dim=1).reshape(weight.shape).to(weight.dtype), None, None


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
    y: Tensor = _Depthwise.apply(x, weight.to(x.dtype), stride, padding)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def speed_up(module: nn.Module) -> None:
    """Gives every square depthwise and every 1x1 convolution in ``module`` the fast gradient, in place."""
    for conv in module.modules():
        if not isinstance(conv, nn.Conv2d) or isinstance(conv.padding, str):
            continue
        square = all(len(set(sizes)) == 1 for sizes in (conv.kernel_size, conv.stride, conv.padding)) and conv.dilation == (1, 1)
        if square and conv.groups == conv.in_channels == conv.out_channels:
            # What ``nn.Conv2d.forward`` calls last: subclasses that pad first keep doing so.
            forward = partial(_depthwise, stride=conv.stride[0], padding=conv.padding[0])
        elif conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1:
            forward = partial(_pointwise)
        else:
            continue
        conv._conv_forward = forward  # type: ignore[method-assign]  # noqa: SLF001
