"""Layers that several of our networks are built of."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from protos.errors import ModelError


def conv_unit(c_in: int, c_out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out, momentum=0.03, eps=1e-3), nn.ReLU6())


def separable_unit(c_in: int, c_out: int, kernel: int = 5, *, stride: int = 1) -> nn.Sequential:
    """Depthwise ``kernel`` x ``kernel`` then 1x1 convolution, each with batch norm and ReLU6."""
    return nn.Sequential(conv_unit(c_in, c_in, kernel, stride=stride, groups=c_in), conv_unit(c_in, c_out))


def fold_batch_norm(module: nn.Module) -> None:
    """Folds every batch norm that follows a convolution in a ``Sequential`` into it, in place; for frozen statistics only."""
    for child in module.children():
        if isinstance(child, nn.Sequential) and len(child) > 1 and isinstance(child[1], nn.BatchNorm2d):
            conv, norm = child[0], child[1]
            if not isinstance(conv, nn.Conv2d):
                raise ModelError(f"a batch norm follows a {type(conv).__name__}, and only convolutions can absorb one")
            child[0], child[1] = fuse_conv_bn_eval(conv.eval(), norm.eval()), nn.Identity()
        fold_batch_norm(child)
