"""A graph divided in two at a position of its order.

Only tensors that depend on the image cross. What does not (weights, position tables, attention masks) is computed on
both sides, and sizes are read off the tensors that cross, so neither travels.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from protos.errors import CutError
from splitters.cutting.graph.trace import TensorInfo, Trace, data_nodes, holds_tensors

_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One place where a traced model can be divided.

    Attributes:
        name: the submodule after which it lies (the outermost of those that end there), or a node's name.
        aliases: other submodules that end at the same place.
        position: how many of the trace's nodes the head computes.
        crossing: nodes whose tensors travel, in order.
    """

    name: str
    aliases: tuple[str, ...]
    position: int
    crossing: tuple[fx.Node, ...]


class Partitioner:
    """Finds and makes the cuts of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._data = data_nodes(trace.module.graph, lambda n: trace.values[n][0])
        self._output = next(n for n in trace.module.graph.nodes if n.op == "output")
        place = {node: i for i, node in enumerate(trace.order)}
        self._last_use = {
            node: max((len(place) if user is self._output else place[user] for user in self._readers(node)), default=-1)
            for node in trace.module.graph.nodes
        }

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Who needs the node's data: not those who only ask for its size."""
        return [user for user in node.users if user is self._output or user in self._data]

    def crossing(self, position: int) -> tuple[fx.Node, ...]:
        """The live tensors after ``position`` nodes: computed before, needed after."""
        inputs = [n for n in self.trace.module.graph.nodes if n.op == "placeholder"]
        before = (*inputs, *self.trace.order[:position])
        return tuple(n for n in before if n in self._data and self._last_use[n] >= position)

    def is_batch_first(self, node: fx.Node) -> bool:
        """Whether the node is one tensor whose first axis is the batch and whose other axes are fixed."""
        shapes = [v.shape if isinstance(v, TensorInfo) else () for v in self.trace.values[node]]
        batched = all(s[:1] == (b,) for s, b in zip(shapes, self.trace.batches, strict=True))
        return batched and len({s[1:] for s in shapes}) == 1

    def _is_cut(self, position: int) -> bool:
        inside = 0 < position < len(self.trace.order)
        nodes = self.crossing(position) if inside else ()
        return bool(nodes) and all(map(self.is_batch_first, nodes)) and any(n.op != "placeholder" for n in nodes)

    def candidates(self) -> tuple[Cut, ...]:
        """Every place at the end of a submodule where only whole, batch-first tensors cross, in order."""
        at: dict[int, list[str]] = {}
        for name, position in self.trace.ends.items():
            at.setdefault(position, []).append(name)
        cuts = []
        for position in sorted(at):
            if self._is_cut(position) and any(n in self._data for n in self.trace.order[position:]):
                first, *others = sorted(at[position], key=lambda n: (n.count("."), n))
                cuts.append(Cut(name=first, aliases=tuple(others), position=position, crossing=self.crossing(position)))
        return tuple(cuts)

    def find(self, at: str) -> Cut:
        """The cut after the submodule, or else the graph node, called ``at``.

        Raises:
            CutError: no such name, or a place where the graph cannot be divided; says which names can.
        """
        nodes = {n.name: i for i, n in enumerate(self.trace.order, start=1)}
        position = self.trace.ends.get(at, nodes.get(at))
        if position is None:
            names = [c.name for c in self.candidates()]
            close = difflib.get_close_matches(at, names, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else "it has " + _some(names)
            raise CutError(f"{at!r} is no cut of this model; {hint} (splitters profile lists all)")
        if self._is_cut(position):
            return Cut(name=at, aliases=(), position=position, crossing=self.crossing(position))
        raise CutError(f"the model cannot be cut after {at!r}: {self._reason(position)}; {self._neighbours(position)}")

    def _reason(self, position: int) -> str:
        if position >= len(self.trace.order):
            return "it is the end of the model, nothing would be left for the server"
        nodes = self.crossing(position)
        bad = [n for n in nodes if not self.is_batch_first(n)]
        if bad:
            return f"{bad[0].name} crosses there as {_describe(self.trace.values[bad[0]][0])}, whose first axis is not the batch"
        if not nodes:
            return "nothing that depends on the image crosses there"
        return "only the input itself crosses there, so the device would compute nothing"

    def not_float32(self, cut: Cut) -> tuple[fx.Node, ...]:
        """The crossing tensors that a payload cannot carry: whole numbers, booleans, floats of another precision."""
        infos = {n: self.trace.values[n][0] for n in cut.crossing}
        return tuple(n for n, info in infos.items() if not (isinstance(info, TensorInfo) and info.dtype == torch.float32))

    def check_payload(self, at: str) -> None:
        """Refuses a cut that a latent codec could not carry exactly.

        Raises:
            CutError: a tensor that is no float32 crosses; names it, and the nearest cuts where none does.
        """
        cut = self.find(at)
        for node in self.not_float32(cut):
            kind = str(self.trace.values[node][0].dtype).removeprefix("torch.")
            near = self._neighbours(cut.position, [c for c in self.candidates() if not self.not_float32(c)])
            raise CutError(
                f"{node.name!r} crosses the cut at {at!r} as {kind}, and payloads carry float32 tensors only: rounded, "
                f"whole numbers and masks would come out as others; {near}"
            )

    def _neighbours(self, position: int, among: Sequence[Cut] | None = None) -> str:
        cuts = self.candidates() if among is None else among
        before = [c.name for c in cuts if c.position < position][-1:]
        after = [c.name for c in cuts if c.position > position][:1]
        return "the nearest cuts are " + " and ".join(before + after) if before or after else "it has no cut at all"

    def divide(self, cut: Cut) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The head (inputs → latents) and the tail (latents → the model's own output)."""
        return self._head(cut), self._tail(cut)

    def _head(self, cut: Cut) -> fx.GraphModule:
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        copied = set(self.trace.order[: cut.position])
        for node in self.trace.module.graph.nodes:
            if node.op in {"placeholder", "get_attr"} or node in copied:
                env[node] = graph.node_copy(node, env.__getitem__)
                if node.op == "placeholder":
                    env[node].args = ()
        graph.output(tuple(env[n] for n in cut.crossing))
        return _module(self.trace.module, graph, "Head")

    def _tail(self, cut: Cut) -> fx.GraphModule:
        graph = fx.Graph()
        env: dict[fx.Node, Any] = {n: graph.placeholder(f"latent_{i}") for i, n in enumerate(cut.crossing)}
        size = self._batch_reader(graph, cut, env)

        def value(node: fx.Node) -> Any:
            """The node in the tail's graph: a latent, a size, or computed again here since it needs no image."""
            if node not in env:
                if not holds_tensors(self.trace.values[node][0]):
                    env[node] = size(node)
                else:
                    for needed in node.all_input_nodes:
                        value(needed)
                    env[node] = graph.node_copy(node, value)
            return env[node]

        for node in self.trace.order[cut.position :]:
            if node in self._data:
                value(node)
        leaves = [value(n) if isinstance(n, fx.Node) else n for n in pytree.tree_leaves(self._output.args[0])]
        graph.output(pytree.tree_unflatten(leaves, self.trace.out_spec))
        return _module(self.trace.module, graph, "Tail")

    def _batch_reader(self, graph: fx.Graph, cut: Cut, env: Mapping[fx.Node, Any]) -> Callable[[fx.Node], Any]:
        """Gives a size in the tail: a number, or a multiple of the batch read off the first latent."""
        read: list[fx.Node] = []

        def batch() -> fx.Node:
            if not read:
                read.append(graph.call_function(torch.ops.aten.sym_size.int, (env[cut.crossing[0]], 0)))
            return read[0]

        def one(first: Any, *others: Any) -> Any:
            if all(other == first for other in others):
                return first
            factor, rest = divmod(first, self.trace.batches[0]) if isinstance(first, int) else (0, 1)
            if not rest and all(other == factor * b for other, b in zip(others, self.trace.batches[1:], strict=True)):
                return batch() if factor == 1 else graph.call_function(operator.mul, (batch(), factor))
            raise CutError(f"a size inside the tail depends on the batch in a way that cannot be followed ({first}, {others})")

        def size(node: fx.Node) -> Any:
            values = self.trace.values[node]
            if isinstance(values[0], (tuple, list)):
                return tuple(one(*parts) for parts in zip(*values, strict=True))
            return one(*values)

        return size


def _some(names: list[str]) -> str:
    step = max(1, len(names) // _SHOWN)
    return ", ".join(names[::step][:_SHOWN]) or "no cut at all"


def _describe(value: Any) -> str:
    return f"a tensor of shape {value.shape}" if isinstance(value, TensorInfo) else f"a {type(value).__name__}"


def _module(root: fx.GraphModule, graph: fx.Graph, name: str) -> fx.GraphModule:
    """The graph as a module that holds only what it uses; dead nodes are found with the modules at hand."""
    whole = fx.GraphModule(root, graph)
    whole.graph.eliminate_dead_code()
    for node in reversed(list(whole.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            whole.graph.erase_node(node)
    whole.graph.lint()
    module = fx.GraphModule(whole, whole.graph, class_name=name)
    module.eval()
    return module
