"""Where an ONNX graph can be cut, what crosses there, and how much work lies before.

A cut is a place in the topological order of the nodes that compute on the picture. What crosses is every tensor made before
it and needed after it. Nodes that compute on sizes alone are no part of that order: the tail computes them again.

Nor are nodes that make floats of bytes (DequantizeLinear): the bytes are sent, which survive the codec exactly and take a
quarter of the room, and the tail makes the floats. A float that is only quantised next is sent as the bytes it becomes: rounded
twice, once by the codec and once behind the cut, it could end a step of the file's own away.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import onnx_ir as ir

from protos.errors import CutError
from splitters.codec.base import MAX_TENSORS
from splitters.cutting.onnx.inputs import IMAGE, Feed
from splitters.cutting.onnx.model import BATCH, OnnxModel, to_bytes
from splitters.cutting.onnx.runtime import Session

MAX_CROSSING = min(16, MAX_TENSORS)
# What a latent's float32 holds exactly; wider integers would be altered on the way.
BYTES = {ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.BOOL}
CARRIED = {ir.DataType.FLOAT, ir.DataType.FLOAT16, *BYTES}
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxCut:
    """A place to cut.

    Attributes:
        name: of the last node before it.
        position: how many nodes lie before it.
        crossing: the tensors' names.
        work: share 0..1 of the model's multiply-accumulates before it.
        macs: the same as a number.
    """

    name: str
    position: int
    crossing: tuple[str, ...]
    work: float
    macs: int


class Cuts:
    """The cuts of one model.

    Args:
        model: ready to be cut.

    Raises:
        CutError: nothing in it computes on the picture.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        graph = model.graph.graph
        taken = {model.picture.name, *(b.name for b in model.beside)}
        self._roots = [v for v in graph.inputs if v.name in taken]
        self.order = _data_nodes(graph, self._roots)
        if len(self.order) < 2:
            raise CutError(f"{model.path}: its outputs do not depend on what it is given, so there is nothing to cut")
        self.names = _names(self.order)
        floats = {n: _sent(n.outputs[0]) for n in graph if _makes_floats(n)}
        # A cut that is named by the floats is the one where their bytes cross.
        self._bytes_of = {name: v.name for n, v in floats.items() if v.producer() for name in (n.name, n.outputs[0].name)}
        self._spans = self._live()
        self.macs = _macs(model, self.order)
        self.total_macs = sum(self.macs)

    def _live(self) -> dict[ir.Value, tuple[int, int]]:
        """Of every tensor of the picture: the positions between which it crosses."""
        used: dict[ir.Value, int] = {}
        for position, node in enumerate(self.order):
            used.update(dict.fromkeys(map(_sent, reads(node)), position))
        used.update(dict.fromkeys(map(_sent, self.model.graph.graph.outputs), len(self.order)))
        made = [*((root, 0) for root in self._roots), *((v, i + 1) for i, n in enumerate(self.order) for v in n.outputs)]
        return {value: (position, used[value]) for value, position in made if value in used}

    def crossing(self, position: int) -> tuple[ir.Value, ...]:
        """The tensors that cross there, in the order they are made."""
        return tuple(v for v, (made, used) in self._spans.items() if made <= position <= used)

    def why_not(self, values: Sequence[ir.Value]) -> str:
        """Why these tensors cannot be sent; empty where they can."""
        if root := next((v for v in values if v in self._roots), None):
            what = "the picture" if root.name == self.model.picture.name else f"the input {root.name!r}"
            return f"{what} itself is still needed after it"
        if len(values) > MAX_CROSSING:
            return f"{len(values)} tensors cross there, more than {MAX_CROSSING}"
        for value in values:
            if value.dtype not in CARRIED:
                return f"{value.name!r} of type {value.dtype} crosses there, and only floats and bytes travel exactly"
        return ""

    def _quantised_next(self, position: int) -> bool:
        """Whether the next node makes bytes of a tensor that nobody else needs."""
        node = self.order[position]
        value = node.inputs[0] if _is(node, "QuantizeLinear") else None
        return value is not None and self._spans.get(value, (0, 0))[1] == position

    def candidates(self) -> tuple[OnnxCut, ...]:
        """The cuts whose tensors can be sent, in order; of neighbours where the same tensors cross, the last."""
        found: dict[tuple[str, ...], OnnxCut] = {}
        done = 0
        for position in range(1, len(self.order)):
            done += self.macs[position - 1]
            values = self.crossing(position)
            if not values or self._quantised_next(position) or self.why_not(values):
                continue
            crossing = tuple(str(v.name) for v in values)
            found[crossing] = OnnxCut(
                name=self.names[position - 1], position=position, crossing=crossing, macs=done, work=done / max(1, self.total_macs)
            )
        return tuple(sorted(found.values(), key=lambda c: c.position))

    def find(self, at: str, candidates: Sequence[OnnxCut] | None = None) -> OnnxCut:
        """The cut after a node, after the node that makes a tensor, or after a module's last node.

        Raises:
            CutError: no such place, or it cannot be cut there; says why and names the nearest that can.
        """
        position = self._position(at)
        offered = self.candidates() if candidates is None else candidates
        if not position:
            close = get_close_matches(at, [c.name for c in offered], n=4, cutoff=0.3) or [c.name for c in offered[:4]]
            raise CutError(f"{self.model.path.name} has no node, tensor or module {at!r}; near are {', '.join(close)}")
        values = self.crossing(position)
        why = self.why_not(values)
        if position >= len(self.order):
            why = "nothing would be left for the server"
        if why:
            near = sorted(offered, key=lambda c: abs(c.position - position))[:3]
            advice = f"; near are {', '.join(c.name for c in near)}" if near else ""
            raise CutError(f"{self.model.path.name} cannot be cut at {at!r}: {why}{advice}")
        done = sum(self.macs[:position])
        return OnnxCut(
            name=self.names[position - 1], position=position, crossing=tuple(str(v.name) for v in values),
            macs=done, work=done / max(1, self.total_macs),
        )  # fmt: skip

    def _position(self, at: str) -> int:
        if at in self.names:
            return self.names.index(at) + 1
        at = self._bytes_of.get(at) or at
        for i, node in enumerate(self.order):
            if any(v.name == at for v in node.outputs):
                return i + 1
        wanted = "/" + at.strip("/").replace(".", "/") + "/"
        last = 0
        for i, node in enumerate(self.order):
            scopes = [str(node.name).replace(".", "/"), *_scopes(node)]
            if any(wanted in f"/{scope.strip('/')}/" for scope in scopes):
                last = i + 1
        return last


def _scopes(node: ir.Node) -> list[str]:
    """Module paths as torch's newer exporter writes them."""
    text = node.metadata_props.get(_SCOPES, "")
    return [part.strip(" '\"").replace(".", "/") for part in text.strip("[]").split(",") if part.strip(" '\"")]


def _names(order: Sequence[ir.Node]) -> list[str]:
    """Of every node a name of its own: the file's where it is one, else its output's."""
    counts: dict[str, int] = {}
    for node in order:
        counts[str(node.name or "")] = counts.get(str(node.name or ""), 0) + 1
    return [
        str(node.name) if node.name and counts[str(node.name)] == 1 else str(next((v.name for v in node.outputs if v.name), i))
        for i, node in enumerate(order)
    ]


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, also inside its sub-graphs."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        graphs = (
            [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []
        )  # fmt: skip
        for graph in graphs:
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                found += [v for v in inner.inputs if v is not None and v.graph is node.graph]
            found += [v for v in graph.outputs if v.graph is node.graph]
    return found


def is_size(node: ir.Node) -> bool:
    """Whether the node tells a shape that is known but for the batch."""
    if node.op_type not in ("Shape", "Size") or node.domain not in ("", "ai.onnx"):
        return False
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if shape is None:
        return False
    sides = list(shape)
    return all(isinstance(d, int) for d in sides[1:]) and all(isinstance(d, int) or str(d) == BATCH for d in sides[:1])


def _is(node: ir.Node, kind: str) -> bool:
    """Whether it is that operator, of those that quantise, with scales that are no result of the graph."""
    constant = all(v is None or v.const_value is not None for v in node.inputs[1:])
    return node.op_type == kind and node.domain in ("", "ai.onnx", "com.microsoft") and constant


def _makes_floats(node: ir.Node) -> bool:
    value = node.inputs[0] if _is(node, "DequantizeLinear") else None
    return value is not None and value.dtype in BYTES


def _sent(value: ir.Value) -> ir.Value:
    """What crosses in a tensor's place: of a float that was made of bytes, these."""
    node = value.producer()
    made_of = node.inputs[0] if node is not None and _makes_floats(node) else None
    return value if made_of is None else made_of


def _data_nodes(graph: ir.Graph, roots: Sequence[ir.Value]) -> list[ir.Node]:
    """Nodes whose result depends on the inputs' values, not on their sizes alone; quantising follows what it quantises at once."""
    data: set[ir.Value] = set(roots)
    found: list[ir.Node] = []
    for node in graph:
        if is_size(node) or not any(v in data for v in reads(node)):
            continue
        data.update(node.outputs)
        if _is(node, "QuantizeLinear") and node.inputs[0] is not None:
            maker = _sent(node.inputs[0]).producer()
            found.insert(found.index(maker) + 1 if maker in found else 0, node)
        elif not _makes_floats(node):
            found.append(node)
    return found


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """A shape for a batch of one; None where it is not known."""
    if value is None:
        return None
    if value.const_value is not None:
        return tuple(d if isinstance(d, int) else 0 for d in value.const_value.shape)
    if value.shape is None:
        return None
    sides = [int(d) if isinstance(d, int) else (1 if i == 0 else 0) for i, d in enumerate(value.shape)]
    return None if 0 in sides else tuple(sides)


_WORKING = {
    "Conv", "FusedConv", "ConvInteger", "QLinearConv", "ConvTranspose", "MatMul", "MatMulInteger", "QLinearMatMul", "Gemm",
    "FusedMatMul", "DeformConv", "NhwcFusedConv",
}  # fmt: skip


def _macs(model: OnnxModel, order: Sequence[ir.Node]) -> list[int]:
    """Multiply-accumulates of every node, for one picture; shapes that inference could not tell come from a run."""
    unknown = [
        str(v.name) for n in order if n.op_type in _WORKING for v in (*n.inputs[:1], *n.outputs[:1])
        if v is not None and v.const_value is None and static_shape(v) is None
    ]  # fmt: skip
    shapes: Mapping[str, tuple[int, ...]] = {}
    if unknown:
        blank = {b.head_name: b.sample for b in model.beside} | {IMAGE: np.zeros((1, *model.picture.head_shape), np.float32)}
        shapes = {name: array.shape for name, array in run_for(model, sorted(set(unknown)), [blank])[0].items()}

    def shape(value: ir.Value | None) -> tuple[int, ...]:
        return shapes.get(str(value.name) if value is not None else "") or static_shape(value) or (1,)

    return [_node_macs(n, shape) if n.op_type in _WORKING else 0 for n in order]


def macs_of(nodes: Sequence[ir.Node]) -> int:
    """Multiply-accumulates of a graph's nodes, whose shapes inference has told."""

    def shape(value: ir.Value | None) -> tuple[int, ...]:
        return (static_shape(value) if value is not None else None) or (1,)

    return sum(_node_macs(n, shape) for n in nodes if n.op_type in _WORKING)


def _node_macs(node: ir.Node, shape: Any) -> int:
    out = int(np.prod(shape(node.outputs[0])))
    kind = node.op_type
    if kind == "ConvTranspose":
        weight = shape(node.inputs[1])
        return int(np.prod(shape(node.inputs[0]))) * int(np.prod(weight[1:]))
    if "Conv" in kind:
        weight = shape(node.inputs[3 if kind == "QLinearConv" else 1])
        return out * int(np.prod(weight[1:]))
    left = shape(node.inputs[0])
    if kind == "Gemm" and int(node.attributes.get_int("transA", 0) or 0):
        return out * int(left[0])
    return out * int(left[-1])


def run_for(model: OnnxModel, names: Sequence[str], feeds: Sequence[Feed]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Runs the graph with further tensors as outputs, unoptimised; their values, a frame each."""
    graph = model.graph.clone()
    values = ir.convenience.create_value_mapping(graph.graph, include_subgraphs=False)
    wanted = [values[name] for name in names]
    own = set(graph.graph.outputs)
    graph.graph.outputs.extend(v for v in wanted if v not in own and not v.is_graph_input())
    session = Session(to_bytes(graph, str(model.path)), optimised=False, what=str(model.path))
    found = []
    for feed in feeds:
        run = session.run(model.given(feed, model.copies))
        found.append({n: a for n, a in zip(session.outputs, run, strict=True) if n in set(names)})
    return found


def device_share(cuts: Sequence[OnnxCut], share: float) -> list[OnnxCut]:
    """The cuts with at most that share of the work on the device; where there is none, the one with the least."""
    within = [c for c in cuts if c.work <= share]
    if within:
        return within
    least = sorted(cuts, key=lambda c: c.work)
    return least[: bisect.bisect_right([c.work for c in least], least[0].work)] if least else []
