"""Stand-ins for published files that are too large to lie here: tiny networks with the same inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto as T

from tests.fakes.onnx_models import STRIDES, Graph, save


def yolox(path: Path, size: int = 64) -> Path:
    """As YOLOX-S: ``images`` (1, 3, s, s) RGB 0..255; (1, positions, 85) with sigmoids applied and grids not."""
    g = Graph()
    x = g.add("Mul", ["images", g.weight(np.asarray(1 / 64, np.float32))])
    x = g.add("Relu", [g.conv(x, 3, 8, 3, 4, "/stem/Conv", gain=2)], "/stem/Relu")
    levels, channels = [], 8
    for index, stride in enumerate(STRIDES):
        x = g.add("Relu", [g.conv(x, channels, 16, 3, 2, f"/stage{index}/Conv", gain=3)], f"/stage{index}/Relu")
        channels = 16
        box = g.conv(x, 16, 4, 1, 1, f"/box{index}/Conv", gain=0.3)
        kind = g.add("Sigmoid", [g.conv(x, 16, 81, 1, 1, f"/kind{index}/Conv", gain=4)])
        y = g.add("Concat", [box, kind], axis=1)
        levels.append(g.add("Reshape", [y, g.ints(1, 85, (size // stride) ** 2)]))
    out = g.add("Transpose", [g.add("Concat", levels, axis=2)], "/out/Transpose", perm=[0, 2, 1])
    return save(path, g, [("images", T.FLOAT, [1, 3, size, size])], [(out, T.FLOAT)], {})


def classifier(path: Path, *, softmax: bool, size: int = 64) -> Path:
    """As PP-ResNet50: (1, 3, s, s) to a thousand class scores; whether the softmax is in the graph, the file decides."""
    g = Graph()
    x = g.add("Relu", [g.conv("image", 3, 8, 3, 2, "/stem/Conv", gain=3)], "/stem/Relu")
    x = g.add("Relu", [g.conv(x, 8, 16, 3, 2, "/body/Conv", gain=3)], "/body/Relu")
    x = g.add("Flatten", [g.add("GlobalAveragePool", [x])])
    x = g.add("MatMul", [x, g.weight((g.rng.standard_normal((16, 1000)) * 4).astype(np.float32))], "/fc/MatMul")
    x = g.add("Softmax", [x], axis=1) if softmax else x
    return save(path, g, [("image", T.FLOAT, [1, 3, size, size])], [(x, T.FLOAT)], {})


def person(path: Path) -> Path:
    """As YoutuReID: a picture twice as high as wide to a vector (1, 768, 1, 1)."""
    g = Graph()
    x = g.add("Relu", [g.conv("input", 3, 8, 3, 2, "/stem/Conv", gain=3)], "/stem/Relu")
    x = g.add("Relu", [g.conv(x, 8, 768, 3, 2, "/body/Conv", gain=2)], "/body/Relu")
    x = g.add("GlobalAveragePool", [x], "/pool")
    return save(path, g, [("input", T.FLOAT, [1, 3, 64, 32])], [(x, T.FLOAT)], {})
