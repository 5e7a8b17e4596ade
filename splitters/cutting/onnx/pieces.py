"""Head, tail and whole as ONNX files of their own, extracted by ONNX IR from the user's graph.

Device and server speak float32: a picture (N, 3, H, W) named ``image``, latents named ``latent_0``… Where the user's graph
takes or carries another type or layout, the first and last nodes of a piece convert; integers and halves survive that exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from splitters.cutting.onnx.cuts import OnnxCut, is_size
from splitters.cutting.onnx.inputs import GREY, IMAGE, PREVIOUS, Feed, Picture
from splitters.cutting.onnx.model import BATCH, OnnxModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """A tensor that crosses the cut.

    Attributes:
        tensor: its name in the user's graph.
        dtype: its type there.
        shape: as it is sent, without the batch axis.
        unbatched: whether the graph has it without a batch axis, so that one is put in front.
    """

    tensor: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    unbatched: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """The model cut in two, and the whole of it with the same input."""

    head: ir.Model
    tail: ir.Model
    whole: ir.Model
    latents: tuple[Latent, ...]


def latent_name(index: int) -> str:
    """Of a tensor that crosses, in both pieces."""
    return f"latent_{index}"


def divide(model: OnnxModel, cut: OnnxCut, shapes: Sequence[tuple[int, ...]]) -> Pieces:
    """Cuts.

    Args:
        model: ready to be cut.
        cut: one of its cuts.
        shapes: of what crosses, as one picture gives it.
    """
    values = ir.convenience.create_value_mapping(model.graph.graph, include_subgraphs=False)
    latents = tuple(
        Latent(
            tensor=name, dtype=values[name].dtype or ir.DataType.FLOAT, unbatched=not shape or shape[0] != model.copies,
            shape=tuple(shape) if not shape or shape[0] != model.copies else tuple(shape[1:]),
        )
        for name, shape in zip(cut.crossing, shapes, strict=True)
    )  # fmt: skip
    return Pieces(head=_head(model, latents), tail=_tail(model, latents, shapes), whole=whole(model), latents=latents)


def whole(model: OnnxModel) -> ir.Model:
    """The whole model, with ``image`` as its input and its own outputs."""
    piece = model.graph.clone()
    edit = _Edit(piece, model)
    edit.inputs()
    edit.outputs(model.outputs)
    return edit.done()


def unbatched_outputs(model: OnnxModel) -> tuple[bool, ...]:
    """Which outputs have no batch axis: a suppression in the graph returns as many rows as it finds."""
    if model.free_batch:
        return tuple(False for _ in model.outputs)
    values = {str(v.name): v for v in model.graph.graph.outputs}
    bare = []
    for name, seen in zip(model.outputs, model.seen, strict=True):
        first = next(iter(values[name].shape or ()), None)
        # Where inference cannot tell, a table of rows for each picture has three axes, what a suppression leaves has two.
        known = isinstance(first, int) or len(seen) < 3
        bare.append(first != model.copies if known else seen[0] != model.batch)
    return tuple(bare)


def whole_outputs(model: OnnxModel, feed: Feed) -> list[np.ndarray[Any, Any]]:
    """The user's own file on one frame, as the pieces give it: batch first."""
    return [a[None] if bare else a for a, bare in zip(model.run_reference(feed), unbatched_outputs(model), strict=True)]


def _extract(model: ir.Model, inputs: Iterable[str], outputs: Iterable[str]) -> ir.Model:
    graph = ir.convenience.extract(model.graph, list(dict.fromkeys(inputs)), list(dict.fromkeys(outputs)))
    return ir.Model(graph, ir_version=max(model.ir_version, 4), producer_name="headtail", functions=list(model.functions.values()))


def _head(model: OnnxModel, latents: Sequence[Latent]) -> ir.Model:
    names = [latent.tensor for latent in latents]
    piece = _extract(model.graph, [str(v.name) for v in model.graph.graph.inputs], names)
    edit = _Edit(piece, model)
    edit.inputs()
    edit.send(latents)
    return edit.done()


def _tail(model: OnnxModel, latents: Sequence[Latent], shapes: Sequence[tuple[int, ...]]) -> ir.Model:
    source = model.graph.clone()
    names = [latent.tensor for latent in latents]
    _open(source.graph, names)
    _tell_sizes(source, names, shapes, model)
    others = [str(v.name) for v in source.graph.inputs if v.name in model.constants]
    piece = _extract(source, [*names, *others], model.outputs)
    edit = _Edit(piece, model)
    edit.receive(latents)
    edit.outputs(model.outputs)
    return edit.done()


def _open(graph: ir.Graph, names: Sequence[str]) -> None:
    """Makes what crosses an input of the graph, under its own name; what made it is nobody's any more."""
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    for name in names:
        old = values[name]
        old.name = f"{name}__made"
        given = ir.val(name, old.dtype, old.shape)
        ir.convenience.replace_all_uses_with(old, given, replace_graph_outputs=True)
        graph.inputs.append(given)


def _tell_sizes(source: ir.Model, names: Sequence[str], shapes: Sequence[tuple[int, ...]], model: OnnxModel) -> None:
    """Shapes of tensors that the head keeps: known but for the batch, which the first tensor that crosses tells.

    Only where the batch is free are there any left; else they were folded.
    """
    graph = source.graph
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    batched = next((values[n] for n, shape in zip(names, shapes, strict=True) if shape and shape[0] == 1), None)
    if batched is None or not model.free_batch:
        return
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Shape" and is_size(node) else None
        if value is None or value.name in names:
            continue
        sides, name = list(value.shape or ()), str(node.outputs[0].name)
        index = np.arange(len(sides))[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(sides))]
        numbers = np.asarray([d if isinstance(d, int) else 1 for d in sides], np.int64)
        if all(isinstance(d, int) for d in sides):
            ir.convenience.replace_all_uses_with(node.outputs[0], _constant(graph, f"{name}_known", numbers[index]))
            continue
        shape = ir.node("Shape", [batched])
        batch = ir.node("Gather", [shape.outputs[0], _constant(graph, f"{name}_first", np.asarray([0], np.int64))])
        joined = ir.node("Concat", [batch.outputs[0], _constant(graph, f"{name}_rest", numbers[1:])], attributes={"axis": 0})
        chosen = ir.node("Gather", [joined.outputs[0], _constant(graph, f"{name}_chosen", index.astype(np.int64))])
        made = [shape, batch, joined, chosen]
        for number, each in enumerate(made):
            each.outputs[0].name = f"{name}_size_{number}"
        graph.insert_before(node, made)
        ir.convenience.replace_all_uses_with(node.outputs[0], chosen.outputs[0])
    graph.sort()


def _constant(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.val(name, const_value=tensor)
    graph.register_initializer(value)
    return value


class _Edit:
    """The first and last nodes of one piece."""

    def __init__(self, piece: ir.Model, model: OnnxModel) -> None:
        self._model, self._source = piece, model
        self._graph = piece.graph
        self._count = 0
        taken = {IMAGE, PREVIOUS, *(latent_name(i) for i in range(64))}
        for value in ir.convenience.create_value_mapping(self._graph, include_subgraphs=True).values():
            if value.name in taken:
                value.name = f"{value.name}__own"
        self._renamed = taken

    def _name(self) -> str:
        self._count += 1
        return f"headtail_{self._count}"

    def _own(self, name: str) -> str:
        return f"{name}__own" if name in self._renamed else name

    def _node(self, kind: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Node:
        node = ir.node(kind, list(inputs), attributes=attributes or None)
        node.name = self._name()
        node.outputs[0].name = self._name()
        return node

    def _number(self, array: np.ndarray[Any, Any]) -> ir.Value:
        return _constant(self._graph, self._name(), array)

    def _input(self, old: ir.Value, new: ir.Value, made: Sequence[ir.Node]) -> None:
        """Puts ``new`` in the place of an input, and the nodes that turn it into ``old`` in front."""
        for node in reversed(made):
            if len(self._graph):
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.append(node)
        last = made[-1].outputs[0] if made else new
        if old in self._graph.outputs:  # an input that is handed on
            node = self._node("Identity", [last])
            self._graph.append(node)
            self._graph.outputs[list(self._graph.outputs).index(old)] = node.outputs[0]
            node.outputs[0].name = old.name
        ir.convenience.replace_all_uses_with(old, last)
        self._graph.inputs[list(self._graph.inputs).index(old)] = new

    def inputs(self) -> None:
        """The head's inputs instead of the user's own; what is given as it is stays."""
        for each in self._source.beside:
            if each.picture is not None:
                self._picture(each.picture, PREVIOUS)
        if self._source.picture.name:
            self._picture(self._source.picture, IMAGE)

    def _picture(self, spec: Picture, name: str) -> None:
        """A picture (N, 3, h, w) or a clip (N, T, 3, h, w) of float32 instead of the user's own input."""
        old = next(v for v in self._graph.inputs if v.name == self._own(spec.name))
        batch: Any = BATCH if self._source.free_batch else 1
        new = ir.val(name, ir.DataType.FLOAT, [batch, *spec.head_shape])
        made: list[ir.Node] = []
        if spec.channels == 1:
            parts = []
            for index, weight in enumerate(GREY):
                made.append(self._node("Gather", [new, self._number(np.asarray([index], np.int64))], axis=1))
                made.append(self._node("Mul", [made[-1].outputs[0], self._number(np.asarray(weight, np.float32))]))
                parts.append(made[-1].outputs[0])
            made.append(self._node("Add", parts[:2]))
            made.append(self._node("Add", [made[-1].outputs[0], parts[2]]))
        last = made[-1].outputs[0] if made else new
        if self._source.copies > 1:
            made.append(self._repeat(last, len(spec.head_shape)))
            last = made[-1].outputs[0]
        if spec.frames:
            made.append(self._node("Transpose", [last], perm=list(spec.axes)))
            last = made[-1].outputs[0]
        elif spec.channels_last:
            made.append(self._node("Transpose", [last], perm=[0, 2, 3, 1]))
            last = made[-1].outputs[0]
        made += self._cast(last, spec.dtype)
        self._input(old, new, made)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> list[ir.Node]:
        """From float32 to the graph's own type, integers to the nearest."""
        made: list[ir.Node] = []
        if dtype == ir.DataType.FLOAT:
            return made
        if dtype.is_integer():
            if self._source.opset >= 11:
                made.append(self._node("Round", [value]))
            else:
                made.append(self._node("Add", [value, self._number(np.asarray(0.5, np.float32))]))
                made.append(self._node("Floor", [made[-1].outputs[0]]))
            value = made[-1].outputs[0]
        made.append(self._node("Cast", [value], to=int(dtype)))
        return made

    def _repeat(self, value: ir.Value, rank: int) -> ir.Node:
        """As many copies as the graph is made for, along the batch; ``rank`` without it."""
        return self._node("Tile", [value, self._number(np.asarray([self._source.copies, *[1] * rank], np.int64))])

    def _first(self, value: ir.Value) -> ir.Node:
        """Of the copies the first."""
        return self._node("Gather", [value, self._number(np.asarray([0], np.int64))], axis=0)

    def _axes(self, kind: str, value: ir.Value) -> ir.Node:
        """Unsqueeze or Squeeze of the first axis; opset 13 moved the axes into an input."""
        if self._source.opset >= 13:
            return self._node(kind, [value, self._number(np.asarray([0], np.int64))])
        return self._node(kind, [value], axes=[0])

    def send(self, latents: Sequence[Latent]) -> None:
        """Outputs ``latent_0``… in float32, batch first."""
        values = {str(v.name): v for v in self._graph.outputs}
        outputs = []
        batch: Any = BATCH if self._source.free_batch else 1
        for index, latent in enumerate(latents):
            value = values[self._own(latent.tensor)]
            kinds: list[ir.Node] = []
            if latent.dtype != ir.DataType.FLOAT:
                kinds.append(self._node("Cast", [value], to=int(ir.DataType.FLOAT)))
            if latent.unbatched:
                kinds.append(self._axes("Unsqueeze", kinds[-1].outputs[0] if kinds else value))
            elif self._source.copies > 1:
                kinds.append(self._first(kinds[-1].outputs[0] if kinds else value))
            if not kinds:
                kinds.append(self._node("Identity", [value]))
            self._graph.extend(kinds)
            out = kinds[-1].outputs[0]
            out.name, out.type, out.shape = latent_name(index), ir.TensorType(ir.DataType.FLOAT), ir.Shape([batch, *latent.shape])
            outputs.append(out)
        self._graph.outputs[:] = outputs

    def receive(self, latents: Sequence[Latent]) -> None:
        """Inputs ``latent_0``… instead of the tensors that cross."""
        values = {str(v.name): v for v in self._graph.inputs}
        batch: Any = BATCH if self._source.free_batch else 1
        for index, latent in enumerate(latents):
            old = values[self._own(latent.tensor)]
            new = ir.val(latent_name(index), ir.DataType.FLOAT, [batch, *latent.shape])
            made: list[ir.Node] = []
            if latent.unbatched:
                made.append(self._axes("Squeeze", new))
            elif self._source.copies > 1:
                made.append(self._repeat(new, len(latent.shape)))
            made += self._cast(made[-1].outputs[0] if made else new, latent.dtype)
            self._input(old, new, made)

    def outputs(self, names: Sequence[str]) -> None:
        """The file's own outputs; what has no batch axis in a model of one picture gets one."""
        values = {str(v.name): v for v in self._graph.outputs}
        ordered = []
        for name, bare in zip(names, unbatched_outputs(self._source), strict=True):
            value = values[self._own(name)]
            if bare or self._source.copies > 1:
                node = self._axes("Unsqueeze", value) if bare else self._first(value)
                self._graph.append(node)
                node.outputs[0].type = value.type
                value.name, node.outputs[0].name = f"{value.name}__bare", value.name
                value = node.outputs[0]
            value.shape = None
            ordered.append(value)
        self._graph.outputs[:] = ordered

    def done(self) -> ir.Model:
        """The piece; what is fed beside the picture is a constant in it."""
        for name, array in self._source.constants.items():
            value = next((v for v in self._graph.inputs if v.name == self._own(name)), None)
            if value is not None:
                constant = _constant(self._graph, self._name(), array)
                ir.convenience.replace_all_uses_with(value, constant)
                self._graph.inputs.remove(value)
        order = {name: place for place, name in enumerate(self._source.inputs)}
        self._graph.inputs[:] = sorted(self._graph.inputs, key=lambda v: order.get(str(v.name), len(order)))
        return self._model
