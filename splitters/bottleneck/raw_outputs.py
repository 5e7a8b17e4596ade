"""What a detector's graph computes last before it is only squashed, reshaped and joined: logits, one tensor a branch.

A detector's output is often one long table with the sigmoids applied. Distilling there compares probabilities of thousands of
empty cells; one step earlier lie logits on their grids, where a cell's confidence tells how much it matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from splitters.cutting.graph.trace import TensorInfo

Scores = Literal["given", "sigmoid", "softmax"]
"""What a decoding makes of the scores: nothing, or an activation; of a softmax the last class is nothing."""

_BOX = 4
_JOINS = ("cat", "concat", "stack")
_VIEWS = (
    "reshape", "view", "permute", "transpose", "flatten", "contiguous", "clone", "unsqueeze", "squeeze", "alias", "to", "_to_copy",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class RawOutput:
    """One branch's output.

    Attributes:
        node: its name in the graph.
        probability: a sigmoid follows; else it is used as it is.
        channel_axis: of its shape with the batch axis.
        cells: the rest of its shape; branches of equal cells speak of the same places.
        softmax: logits of classes of which the last is nothing.
    """

    node: str
    probability: bool
    channel_axis: int
    cells: tuple[int, ...]
    softmax: bool = False


def _name(node: fx.Node) -> str:
    """``cat`` for ``aten.cat.default``; a called module or method by its own name."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return str(name).split(".")[0].lower()


def _main(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def raw_outputs(outputs: Sequence[fx.Node], shape: Mapping[str, TensorInfo]) -> tuple[RawOutput, ...]:
    """The branches that ``outputs`` are put together from, in order.

    Args:
        outputs: nodes of the graph's floating-point outputs.
        shape: by node name, with the batch axis.
    """
    found: dict[str, RawOutput] = {}

    def walk(node: fx.Node, *, squashed: bool) -> None:
        name, first = _name(node), _main(node)
        if name in _JOINS:
            for part in node.all_input_nodes:
                walk(part, squashed=squashed)
        elif name in _VIEWS and first is not None:
            walk(first, squashed=squashed)
        elif name == "sigmoid" and first is not None and not squashed:
            walk(first, squashed=True)
        else:
            sides = shape[node.name].shape
            axis = 1 if len(sides) == 4 else len(sides) - 1
            cells = tuple(s for i, s in enumerate(sides) if i not in {0, axis})
            found.setdefault(node.name, RawOutput(node=node.name, probability=squashed, channel_axis=axis, cells=cells))

    for node in outputs:
        walk(node, squashed=False)
    return tuple(found.values())


def as_queries(found: Sequence[RawOutput], shape: Mapping[str, TensorInfo], scores: Scores) -> tuple[RawOutput, ...]:
    """The branches of a transformer detector, told apart: its boxes are squashed in the graph, its class logits outside.

    Others are as they were.

    Args:
        found: of `raw_outputs`.
        shape: by node name, with the batch axis.
        scores: what becomes of its logits.
    """
    boxes = {r.cells for r in found if r.probability and shape[r.node].shape[r.channel_axis] == _BOX}
    logits = {r.cells for r in found if not r.probability}
    if scores == "given" or not boxes & logits:
        return tuple(found)

    def told(one: RawOutput) -> RawOutput:
        if one.cells not in boxes & logits:
            return one
        if one.probability:
            return replace(one, probability=False)
        return replace(one, probability=scores == "sigmoid", softmax=scores == "softmax")

    return tuple(told(one) for one in found)
