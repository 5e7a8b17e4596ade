"""PicoDet as a dense teacher: what it says at every position of the very picture that the student trains on.

Its levels have strides 8, 16, 32 and 64, the student's three; what the coarsest says of a position goes to the four positions of
stride 32 within it where it is surer. Scores are given, distances from a position's centre are distributions over 8 bins
(Li et al. 2020, arXiv 2006.04388; Yu et al. 2021, arXiv 2111.00902).

Shape legend: N batch, S canvas side in px (a multiple of 64), P the positions of strides 8, 16, 32, fine to coarse, row-major.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from splitters.runtime.sessions import open_session
from splitters.tasks.decoding.boxes import Pixels
from splitters.training.detector.teacher import Dense
from splitters.zoo.onnx_detectors import IMAGENET_MEAN, IMAGENET_STD

STRIDES = (8, 16, 32, 64)
_BINS = 8
_OWN_PX = 416


def of_size(model: onnx.ModelProto, size_px: int) -> onnx.ModelProto:
    """The published graph, which is fixed to one picture of 416 px, for any batch of ``size_px``; its maps become the outputs.

    Its channel shuffles name their maps' sizes, so a graph is of one size. Initializers leave the inputs, which lets ONNX Runtime
    fold them.
    """
    graph = model.graph
    weights = {i.name for i in graph.initializer}
    images = [i for i in graph.input if i.name not in weights]
    shapes = {name for node in graph.node if node.op_type == "Reshape" for name in node.input[1:]}
    for tensor in graph.initializer:
        sizes = numpy_helper.to_array(tensor)
        if tensor.name in shapes and sizes.size >= 4:
            scaled = [-1, *sizes[1:-2].tolist(), *(int(n) * size_px // _OWN_PX for n in sizes[-2:])]
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(scaled, np.int64), tensor.name))
    flattening = {o.name: _maker(graph, o.name) for o in graph.output}
    maps = [_maker(graph, node.input[0]).input[0] for node in flattening.values()]
    gone = {name for node in flattening.values() for name in (*node.output, node.input[0])}
    kept = [n for n in graph.node if not gone & set(n.output)]
    channels = [o.type.tensor_type.shape.dim[2].dim_value for o in graph.output]
    del graph.node[:], graph.output[:], graph.input[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.input.extend(helper.make_tensor_value_info(i.name, onnx.TensorProto.FLOAT, ["n", 3, size_px, size_px]) for i in images)
    graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", c, None, None])
        for name, c in zip(maps, channels, strict=True)
    )
    return model


def _maker(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)


class PicoDetTeacher:
    """PicoDet at every position of (N, S, S, 3) pictures.

    Args:
        path: the published ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sessions: dict[int, ort.InferenceSession] = {}

    def _session(self, size_px: int) -> ort.InferenceSession:
        if size_px not in self._sessions:
            self._sessions[size_px] = open_session(of_size(onnx.load(self._path), size_px).SerializeToString())
        return self._sessions[size_px]

    def __call__(self, images: Pixels) -> Dense:
        """Scores and boxes of uint8 RGB pictures.

        Raises:
            ValueError: S is no multiple of 64.
        """
        if images.shape[1] % STRIDES[-1]:
            raise ValueError(f"PicoDet's levels need sides that are multiples of {STRIDES[-1]} px, not {images.shape[1]}")
        session = self._session(images.shape[1])
        x = np.ascontiguousarray(((images.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2))
        maps = [torch.from_numpy(np.asarray(m, np.float32)) for m in session.run(None, {session.get_inputs()[0].name: x})]
        half = len(maps) // 2
        levels = [_level(*pair) for pair in zip(maps[:half], maps[half:], STRIDES, strict=True)]
        scores, boxes = merged(levels[-2], levels[-1])
        fine = [(s.flatten(1, 2), b.flatten(1, 2)) for s, b in levels[:-2]]
        return Dense(torch.cat([*(s for s, _ in fine), scores], dim=1), torch.cat([*(b for _, b in fine), boxes], dim=1))


def _level(scores: Tensor, distances: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Scores (N, H, W, 80) and corner boxes (N, H, W, 4) in px of one level's maps."""
    n, _, height, width = scores.shape
    bins = distances.permute(0, 2, 3, 1).reshape(n, height, width, 4, _BINS).softmax(-1)
    reach = (bins * torch.arange(_BINS)).sum(-1) * stride
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = (torch.stack([column, row], dim=-1) + 0.5) * stride
    return scores.permute(0, 2, 3, 1), torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], dim=-1)


def merged(fine: tuple[Tensor, Tensor], coarse: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two levels, one twice as coarse, as the finer one, flat: at each position the surer one's scores and box."""
    scores, boxes = (t.repeat_interleave(2, 1).repeat_interleave(2, 2) for t in coarse)
    surer = (scores.amax(-1) > fine[0].amax(-1))[..., None]
    return torch.where(surer, scores, fine[0]).flatten(1, 2), torch.where(surer, boxes, fine[1]).flatten(1, 2)


def mean_of(teachers: Sequence[Dense]) -> Dense:
    """What several teachers say together: the mean of their scores, the surest one's box at each position."""
    scores = torch.stack([t.scores for t in teachers])
    surest = scores.amax(-1).argmax(0)  # (N, P)
    boxes = torch.stack([t.boxes for t in teachers])
    return Dense(scores.mean(0), boxes.gather(0, surest[None, ..., None].expand(1, -1, -1, 4))[0])
