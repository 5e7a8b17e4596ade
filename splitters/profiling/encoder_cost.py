"""What a head weighs: bytes, parameters and multiply-accumulates of the graphs that a device runs for an operating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from splitters.bundle import Bundle
from splitters.cutting.onnx.cuts import macs_of


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderCost:
    """Of the stem and one set of encoder graphs.

    Attributes:
        graphs: names of the encoders; empty: the stem alone.
        file_bytes: of the ONNX files.
        parameters: numbers in them that are learned, biases included.
        macs: multiply-accumulates for one picture.
        macs_per_px: of the model's own input.
    """

    graphs: tuple[str, ...]
    file_bytes: int
    parameters: int
    macs: int
    macs_per_px: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**asdict(self), "graphs": list(self.graphs)}


def encoder_costs(bundle: Bundle) -> list[EncoderCost]:
    """Of every set of graphs that the bundle's operating points name, in their order."""
    height, width = bundle.manifest.preprocess.size_px
    head = bundle.manifest.head
    costs = []
    for graphs in dict.fromkeys(p.graphs for p in bundle.points):
        weighed = [_weigh(bundle, part) for part in (head.stem, *(head.graphs[name] for name in graphs))]
        size, parameters, macs = (int(total) for total in np.sum(weighed, axis=0))
        costs.append(
            EncoderCost(graphs=graphs, file_bytes=size, parameters=parameters, macs=macs, macs_per_px=macs / (height * width))
        )
    return costs


def _weigh(bundle: Bundle, part: str) -> Sequence[int]:
    """File bytes, parameters and multiply-accumulates of one graph."""
    data = bundle.read_part(part)
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    parameters = sum(int(np.prod(t.dims)) for t in proto.graph.initializer if t.data_type != onnx.TensorProto.INT64)
    return len(data), parameters, macs_of(list(ir.from_proto(proto).graph))
