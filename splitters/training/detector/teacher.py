"""YOLOX-nano as a dense teacher: what it says at every position of the very picture that the student trains on.

Both networks have strides 8, 16 and 32 and the same grids, so teacher and student correspond position by position, and nothing
is lost to suppression (dense distillation, cf. Zheng et al. 2022, arXiv 2102.12252).

Shape legend: N batch, S canvas side in px (a multiple of 32), P the positions of all levels, fine to coarse, row-major.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from splitters.runtime.sessions import open_session
from splitters.tasks.decoding.boxes import Pixels
from splitters.zoo.onnx_detectors import IMAGENET_MEAN, IMAGENET_STD

STRIDES = (8, 16, 32)


class Dense(NamedTuple):
    """What a network says at every position: class scores (N, P, 80) in 0..1 and corner boxes (N, P, 4) in px."""

    scores: Tensor
    boxes: Tensor


def any_size(model: onnx.ModelProto) -> onnx.ModelProto:
    """The published graph, which is fixed to one picture of 416 px, for any batch and any multiple of 32 px.

    Its three maps become the outputs (what flattens them carries fixed sizes); its enlargements double instead of naming a size.
    """
    graph = model.graph
    maps = [node.input[0] for node in graph.node if node.op_type == "Reshape"]
    twice = numpy_helper.from_array(np.asarray([1, 1, 2, 2], np.float32), "twice")
    graph.initializer.append(twice)
    for node in graph.node:
        if node.op_type == "Resize":
            node.input[:] = [node.input[0], "", twice.name]
    kept = [n for n in graph.node if n.op_type not in {"Reshape", "Transpose"} and n.output[0] not in _after(graph, maps)]
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 85, None, None]) for name in maps)
    for axis, name in ((0, "n"), (2, "h"), (3, "w")):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    return model


def _after(graph: onnx.GraphProto, tensors: list[str]) -> set[str]:
    reached = set(tensors)
    for node in graph.node:
        if reached & set(node.input):
            reached |= set(node.output)
    return reached - set(tensors)


class DenseTeacher:
    """YOLOX-nano at every position of (N, S, S, 3) pictures.

    Args:
        path: the published ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self._session = open_session(any_size(onnx.load(path)).SerializeToString())

    def __call__(self, images: Pixels) -> Dense:
        """Scores and boxes of uint8 RGB pictures."""
        x = np.ascontiguousarray(((images.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2))
        scores, boxes = [], []
        for stride, raw in zip(STRIDES, self._session.run(None, {self._session.get_inputs()[0].name: x}), strict=True):
            level = torch.from_numpy(np.asarray(raw, np.float32))
            height, width = level.shape[-2:]
            flat = level.flatten(2).transpose(1, 2)  # (N, positions, 85)
            row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            centre = (flat[..., :2] + torch.stack([column, row], dim=-1).reshape(-1, 2)) * stride
            half = flat[..., 2:4].exp() * (stride / 2)
            boxes.append(torch.cat([centre - half, centre + half], dim=-1))
            scores.append(flat[..., 4:5] * flat[..., 5:])
        return Dense(torch.cat(scores, dim=1), torch.cat(boxes, dim=1))
