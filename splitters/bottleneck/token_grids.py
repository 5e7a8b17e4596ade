"""Where the cells of a transformer's tokens lie, read from its graph.

From the number of tokens alone it cannot be told which of them are patches of the picture: 125 may be 10 x 10 patches, a class
token before them and 24 detection tokens behind, or many other things. The graph joins them somewhere, and a convolution made
the patches.
"""

from __future__ import annotations

from torch import fx

from splitters.bottleneck.crossing import TokenGrids
from splitters.cutting.graph.trace import TensorInfo, Trace

_FEWEST_CELLS = 4


def token_grids(trace: Trace) -> TokenGrids:
    """The model's token sequences by their length: those as long as a convolution's map, and those joined from such a one."""
    found: dict[int, tuple[int, tuple[int, int]]] = {}
    for node in trace.order:
        shape = _shape(trace, node)
        if "conv" in node.name and len(shape) == 4 and shape[2] * shape[3] >= _FEWEST_CELLS:
            found[shape[2] * shape[3]] = (0, (shape[2], shape[3]))
    maps = dict(found)
    for node in trace.order:
        if not node.name.startswith(("cat", "concat")) or len(_shape(trace, node)) != 3 or not node.args:
            continue
        parts = node.args[0]
        lengths = [_length(trace, part) for part in parts] if isinstance(parts, list | tuple) else []
        placed = [i for i, length in enumerate(lengths) if length in maps]
        if placed and sum(lengths) == _shape(trace, node)[1]:
            largest = max(placed, key=lambda i: lengths[i])
            found.setdefault(sum(lengths), (sum(lengths[:largest]), maps[lengths[largest]][1]))
    return found


def _shape(trace: Trace, node: fx.Node) -> tuple[int, ...]:
    value = trace.values[node][0] if node in trace.values else None
    return value.shape if isinstance(value, TensorInfo) else ()


def _length(trace: Trace, part: object) -> int:
    shape = _shape(trace, part) if isinstance(part, fx.Node) else ()
    return shape[1] if len(shape) == 3 else 0
