"""Small real architectures with fixed random weights, for bottlenecks at awkward cuts (``py:tests.fakes.any_models:NAME``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from splitters.cutting import torchvision_compat

torchvision_compat.activate()  # timm imports torchvision

SIZE_PX = 64


def _seeded(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():  # norms as a trained network has them: neither unit scale nor zero
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.6, 1.2)
                module.bias.normal_(0, 0.2)
    return model, torch.zeros(1, 3, SIZE_PX, SIZE_PX)


def resnet() -> tuple[nn.Module, Tensor]:
    """A basic-block ResNet: inside a block, the branch and its shortcut cross."""
    from timm.models.resnet import BasicBlock, ResNet

    keywords: dict[str, Any] = {"layers": [1, 1, 1, 1], "num_classes": 10, "channels": (16, 24, 32, 48)}
    return _seeded(lambda: ResNet(BasicBlock, **keywords))


def densenet() -> tuple[nn.Module, Tensor]:
    """A DenseNet: inside a dense block, every layer's output crosses."""
    from timm.models.densenet import DenseNet

    return _seeded(lambda: DenseNet(growth_rate=8, block_config=(1, 3), num_classes=10))


def vit() -> tuple[nn.Module, Tensor]:
    """A vision transformer: tokens with a class token cross."""
    from timm.models.vision_transformer import VisionTransformer

    return _seeded(lambda: VisionTransformer(img_size=SIZE_PX, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=10))


class _Detector(nn.Module):
    """A backbone of three scales, a top-down neck, and YOLOX's output: (N, P, 5 + 3), sigmoids applied."""

    def __init__(self) -> None:
        super().__init__()

        def conv(c_in: int, c_out: int, stride: int = 2) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.SiLU())

        self.stem, self.c2 = conv(3, 8), conv(8, 12)
        self.c3, self.c4, self.c5 = conv(12, 16), conv(16, 24), conv(24, 32)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (16, 24, 32))
        self.smooth = nn.ModuleList(conv(16, 16, 1) for _ in range(3))
        self.boxes, self.present, self.classes = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 1, 1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to the table of all cells."""
        c3 = self.c3(self.c2(self.stem(x)))
        c4 = self.c4(c3)
        p5 = self.lateral[2](self.c5(c4))
        p4 = self.lateral[1](c4) + nn.functional.interpolate(p5, scale_factor=2.0)
        p3 = self.lateral[0](c3) + nn.functional.interpolate(p4, scale_factor=2.0)
        tables = []
        for smooth, level in zip(self.smooth, (p3, p4, p5), strict=True):
            y = smooth(level)
            told = [self.boxes(y), self.present(y).sigmoid(), self.classes(y).sigmoid()]
            tables.append(torch.cat(told, 1).flatten(2))
        return torch.cat(tables, 2).permute(0, 2, 1)


def detector() -> tuple[nn.Module, Tensor]:
    """A little single-shot detector with a pyramid."""
    return _seeded(_Detector)


class _Tokens(nn.Module):
    """A detector of the kind of YOLOS: a class token, patches, 24 detection tokens; logits with a class of nothing, and boxes."""

    def __init__(self) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        width = 24
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.class_token, self.queries = (nn.Parameter(torch.randn(1, n, width)) for n in (1, 24))
        self.position = nn.Parameter(0.1 * torch.randn(1, 1 + (SIZE_PX // 8) ** 2 + 24, width))
        self.blocks = nn.ModuleList(Block(width, 3) for _ in range(2))
        self.classes, self.boxes = nn.Linear(width, 4), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images to logits (N, 24, 4) and boxes (N, 24, 4), cxcywh of the picture."""
        patches, n = self.patches(x).flatten(2).transpose(1, 2), x.shape[0]
        tokens = torch.cat((self.class_token.expand(n, -1, -1), patches, self.queries.expand(n, -1, -1)), 1) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        found = tokens[:, -24:]
        return self.classes(found), self.boxes(found).sigmoid()


class _Queries(nn.Module):
    """A detector of the kind of DETR: a convolutional map, and 20 queries that look at it; logits for a sigmoid, and boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 24, 2, 2))
        self.queries = nn.Parameter(torch.randn(1, 20, 24))
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(24, 3, 48, batch_first=True) for _ in range(2))
        self.classes, self.boxes = nn.Linear(24, 3), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images to logits (N, 20, 3) and boxes (N, 20, 4), cxcywh of the picture."""
        memory = self.stem(x).flatten(2).transpose(1, 2)
        found = self.queries.expand(x.shape[0], -1, -1)
        for layer in self.layers:
            found = layer(found, memory)
        return self.classes(found), self.boxes(found).sigmoid()


def tokens() -> tuple[nn.Module, Tensor]:
    """A transformer detector whose detection tokens lie behind the patches."""
    return _seeded(_Tokens)


def queries() -> tuple[nn.Module, Tensor]:
    """A transformer detector whose queries cross beside the map."""
    return _seeded(_Queries)
