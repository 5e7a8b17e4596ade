"""What crossing each cut costs: bytes of the tensors of real pictures, at 8 bits, compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import zstandard

from protos.errors import CutError
from splitters.cutting.onnx.cuts import BYTES, Cuts, OnnxCut, device_share, run_for, static_shape
from splitters.cutting.onnx.inputs import Feed

DEVICE_SHARE = 0.35  # of the work, at most, where nobody says where to cut
_LEVEL = 3
_MIN_VALUES = 16
_RUN_BYTES = 256 << 20
_MEASURED = 32

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossingCost:
    """One cut's tensors on one picture.

    Attributes:
        shapes: of what crosses, as one picture gives it.
        float_bytes: as they are.
        int8_bytes: a byte a value.
        zstd_bytes: a byte a value and a scale a channel, compressed.
    """

    shapes: tuple[tuple[int, ...], ...]
    float_bytes: int
    int8_bytes: int
    zstd_bytes: int


def compressed_bytes(array: Array) -> int:
    """Bytes of one picture's tensor at 8 bits, a scale a channel, zstandard."""
    values = array.astype(np.float32)
    if values.ndim and values.shape[0] == 1:
        values = values[0]
    # Of more than three axes the leading ones together: a channel shuffle's (groups, C, H, W) has the channels of its (C, H, W).
    leading = int(np.prod(values.shape[:-2])) if values.ndim > 2 else 1
    flat = values.T if values.ndim == 2 else values.reshape(leading, -1)
    if flat.shape[1] < _MIN_VALUES:
        flat = flat.reshape(1, -1)
    low = flat.min(axis=1, keepdims=True)
    span = np.maximum(flat.max(axis=1, keepdims=True) - low, np.float32(1e-12))
    symbols = np.rint((flat - low) / span * 255).astype(np.uint8)
    return len(zstandard.ZstdCompressor(level=_LEVEL).compress(np.ascontiguousarray(symbols).tobytes()))


def crossing_costs(cuts: Cuts, chosen: Sequence[OnnxCut], feed: Feed) -> dict[int, CrossingCost]:
    """Costs by position, on one frame; tensors are looked at a few at a time, since all of them may not fit in memory."""
    values = ir.convenience.create_value_mapping(cuts.model.graph.graph, include_subgraphs=False)
    names = list(dict.fromkeys(n for c in chosen for n in c.crossing))
    seen: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
    group: list[str] = []
    held = 0
    for name in [*names, None]:
        if name is not None:
            shape = static_shape(values[name])
            held += 4 * int(np.prod(shape)) if shape else _RUN_BYTES // 8
            group.append(name)
        if group and (name is None or held >= _RUN_BYTES):
            for each, array in run_for(cuts.model, group, [feed])[0].items():
                seen[each] = (tuple(array.shape), array.nbytes, array.size, compressed_bytes(array))
            group, held = [], 0
    return {
        c.position: CrossingCost(
            shapes=tuple(seen[n][0] for n in c.crossing), float_bytes=sum(seen[n][1] for n in c.crossing),
            int8_bytes=sum(seen[n][2] for n in c.crossing), zstd_bytes=sum(seen[n][3] for n in c.crossing),
        )
        for c in chosen
    }  # fmt: skip


def best_cut(cuts: Cuts, feed: Feed, share: float = DEVICE_SHARE) -> tuple[OnnxCut, CrossingCost]:
    """The cut that sends the fewest compressed bytes among those with at most ``share`` of the work on the device.

    Floats count twice: they need two bytes each to keep the answer, where a quantised file's own bytes travel exactly.

    Raises:
        CutError: the model can be cut nowhere.
    """
    offered = device_share(cuts.candidates(), share)
    if not offered:
        raise CutError(f"{cuts.model.path.name} can be cut nowhere: at every place something crosses that cannot be sent exactly")
    values = ir.convenience.create_value_mapping(cuts.model.graph.graph, include_subgraphs=False)

    def elements(cut: OnnxCut) -> int:
        return sum(int(np.prod(static_shape(values[n]) or (1 << 24,))) for n in cut.crossing)

    least = sorted(offered, key=elements)[:_MEASURED]  # compression does not turn the order of the rest round
    costs = crossing_costs(cuts, least, feed)

    def sent(cut: OnnxCut) -> int:
        return costs[cut.position].zstd_bytes * (1 if all(values[n].dtype in BYTES for n in cut.crossing) else 2)

    best = min(least, key=lambda c: (sent(c), c.position))
    return best, costs[best.position]
