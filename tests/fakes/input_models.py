"""Tiny models that take other things than one picture, as ONNX files and as factories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto as T
from torch import Tensor, nn

from tests.fakes.onnx_models import Graph, save

SIDE, FRAMES, LENGTH, WORDS = 32, 4, 12, 50


def flow(path: Path) -> Path:
    """Two pictures (1, 3, s, s), the earlier first, to what moved between them (1, 2, s/4, s/4)."""
    g = Graph()
    weights = [g.weight((g.rng.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32)), g.weight(np.zeros(8, np.float32))]
    seen = [
        g.add("Relu", [g.add("Conv", [x, *weights], f"/{x}/Conv", strides=[4, 4], kernel_shape=[3, 3], pads=[1] * 4)], f"/{x}/Relu")
        for x in ("before", "now")
    ]
    moved = g.add("Sub", seen, "/Sub")
    out = g.conv(moved, 8, 2, 3, 1, "/flow/Conv", gain=2)
    shape = [1, 3, SIDE, SIDE]
    return save(path, g, [("before", T.FLOAT, shape), ("now", T.FLOAT, shape)], [(out, T.FLOAT)], {})


def video(path: Path) -> Path:
    """A clip (1, 3, T, s, s) to five class scores; the order of the frames counts."""
    g = Graph()
    w = g.weight((g.rng.standard_normal((8, 3, 3, 3, 3)) / 6).astype(np.float32))
    x = g.add("Conv", ["clip", w], "/stem/Conv", strides=[1, 4, 4], kernel_shape=[3] * 3, pads=[1] * 6)
    x = g.add("Relu", [x], "/stem/Relu")
    x = g.add("ReduceMean", [x], "/space", axes=[3, 4], keepdims=0)
    x = g.add("Reshape", [x, g.ints(1, 8 * FRAMES)])
    x = g.add("MatMul", [x, g.weight(g.rng.standard_normal((8 * FRAMES, 5)).astype(np.float32))], "/fc/MatMul")
    return save(path, g, [("clip", T.FLOAT, [1, 3, FRAMES, SIDE, SIDE])], [(x, T.FLOAT)], {})


def volume(path: Path) -> Path:
    """A small 3-D U-Net: (1, 1, 8, 16, 16) to two classes for every voxel."""
    g = Graph()

    def conv(x: str, cin: int, cout: int, name: str, stride: int = 1) -> str:
        w = g.weight((g.rng.standard_normal((cout, cin, 3, 3, 3)) / np.sqrt(27 * cin)).astype(np.float32))
        return g.add("Conv", [x, w], name, strides=[stride] * 3, kernel_shape=[3] * 3, pads=[1] * 6)

    fine = g.add("Relu", [conv("scan", 1, 4, "/down0/Conv")], "/down0/Relu")
    coarse = g.add("Relu", [conv(fine, 4, 8, "/down1/Conv", 2)], "/down1/Relu")
    deep = g.add("Relu", [conv(coarse, 8, 8, "/middle/Conv")], "/middle/Relu")
    up = g.add("ConvTranspose", [deep, g.weight((g.rng.standard_normal((8, 4, 2, 2, 2)) / 3).astype(np.float32))], "/up/Up",
               strides=[2] * 3, kernel_shape=[2] * 3)  # fmt: skip
    out = conv(g.add("Concat", [up, fine], "/join", axis=1), 8, 2, "/out/Conv")
    return save(path, g, [("scan", T.FLOAT, [1, 1, 8, 16, 16])], [(out, T.FLOAT)], {})


class Words(nn.Module):
    """Token numbers and which of them count, to a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(1, L) int64 and (1, L) float32 to (1, 6)."""
        seen = torch.tanh(self.mix(self.table(tokens) * mask[..., None]))
        mixed = seen + torch.softmax(seen @ seen.transpose(1, 2), -1) @ seen
        out: Tensor = self.out(torch.tanh(mixed).mean(1))
        return out


def words() -> tuple[nn.Module, dict[str, Tensor]]:
    """A factory whose example is a dict."""
    torch.manual_seed(0)
    return Words(), {"tokens": torch.arange(LENGTH)[None], "mask": torch.ones(1, LENGTH)}


class Bytes(nn.Module):
    """A camera's own bytes (1, s, s, 3) to four scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.out = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, picture: Tensor) -> Tensor:
        """Integers in, floats inside."""
        x = (picture.float() / 255).permute(0, 3, 1, 2)
        out: Tensor = self.out(self.body(self.stem(x).relu()).relu().mean((2, 3)))
        return out


def camera_bytes() -> tuple[nn.Module, Tensor]:
    """A factory whose example is uint8, channels last."""
    torch.manual_seed(0)
    return Bytes(), torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)


def run(path: Path, **given: Any) -> list[np.ndarray[Any, Any]]:
    """The file itself, in ONNX Runtime."""
    import onnxruntime as ort

    found: list[np.ndarray[Any, Any]] = ort.InferenceSession(str(path)).run(None, given)
    return found
