"""Tiny ONNX files of the forms that exporters write: a detector on three strides, a classifier, and odd ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

STRIDES = (8, 16, 32)
NAMES = {0: "cat", 1: "dog", 2: "cup"}


@dataclass
class Graph:
    """Nodes and weights in the making.

    Attributes:
        kind: element type of weights and activations.
        opset: of the standard operators.
        constants: whether weights are Constant nodes rather than initialisers.
    """

    kind: Any = np.float32
    opset: int = 17
    constants: bool = False
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def weight(self, array: np.ndarray[Any, Any], name: str = "") -> str:
        name = name or f"w{len(self.weights) + len(self.nodes)}"
        tensor = numpy_helper.from_array(array, name)
        if self.constants:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            self.weights.append(tensor)
        return name

    def add(self, op: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        out = f"{name or op.lower()}_{len(self.nodes)}_out"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=name or f"{op}_{len(self.nodes)}", **attributes))
        return out

    def ints(self, *values: int) -> str:
        return self.weight(np.asarray(values, np.int64))

    def conv(
        self, x: str, cin: int, cout: int, kernel: int, stride: int, name: str, *, gain: float = 1.0, bias: float = 0.0
    ) -> str:
        scale = gain / np.sqrt(cin * kernel * kernel)
        w = self.weight((self.rng.standard_normal((cout, cin, kernel, kernel)) * scale).astype(self.kind))
        b = self.weight(np.full(cout, bias, self.kind))
        return self.add("Conv", [x, w, b], name, strides=[stride, stride], kernel_shape=[kernel, kernel], pads=[kernel // 2] * 4)

    def quantised(self, x: str, scale: float, zero: int) -> str:
        """x through QuantizeLinear and DequantizeLinear, uint8."""
        s, z = self.weight(np.asarray(scale, np.float32)), self.weight(np.asarray(zero, np.uint8))
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [x, s, z]), s, z])


def detector(
    path: Path, *, opset: int = 17, half: bool = False, quantised: bool = False, batch: int | str = 1, size: int = 64,
    constants: bool = False, bytes_last: bool = False, done: str = "", external: bool = False, metadata: bool = True,
    task: str = "detect",
) -> Path:  # fmt: skip
    """A detector in the form of a default export of Ultralytics: (N, 4 + 3, positions), boxes in pixels.

    Args:
        path: to write.
        opset: of the standard operators.
        half: weights and activations in float16, pictures and outputs too.
        quantised: activations through uint8.
        batch: of pictures, or a name for a free one.
        size: of the picture.
        constants: weights as Constant nodes.
        bytes_last: the input is (N, H, W, 3) uint8.
        done: ``topk``: the graph picks 20 rows (N, 20, 6) itself; ``nms``: it suppresses, and returns as many rows as it finds.
        external: weights in a file of their own.
        metadata: what Ultralytics writes beside the graph.
        task: ``pose`` adds two key points, ``obb`` an angle, ``segment`` four coefficients and a second output of prototypes.
    """
    extras = {"detect": 0, "pose": 6, "obb": 1, "segment": 4}[task]
    kind = np.float16 if half else np.float32
    g = Graph(kind=kind, opset=opset, constants=constants)
    x = "images"
    if bytes_last:
        x = g.add("Transpose", [g.add("Cast", [x], to=T.FLOAT)], perm=[0, 3, 1, 2])
        x = g.add("Mul", [x, g.weight(np.asarray(1 / 255, np.float32))])
    x = g.conv(x, 3, 8, 3, 4, "/model.0/conv/Conv", gain=4)
    x = g.add("Mul", [x, g.add("Sigmoid", [x], "/model.0/act/Sigmoid")], "/model.0/act/Mul")
    if quantised:
        x = g.quantised(x, 0.03, 20)
    levels, side, finest = [], size, ""
    channels = 8
    for index, stride in enumerate(STRIDES):
        x = g.conv(x, channels, 16, 3, 2, f"/model.{index + 1}/conv/Conv", gain=3)
        x = g.add("Relu", [x], f"/model.{index + 1}/act/Relu")
        if quantised:
            x = g.quantised(x, 0.05, 0)
        channels, side = 16, size // stride
        finest = finest or x
        y = g.conv(x, 16, 7 + extras, 1, 1, f"/model.9/cv{index}/Conv", gain=1.2, bias=-0.5)
        if isinstance(batch, str):
            shape = g.add("Shape", [y])
            first = g.add("Gather", [shape, g.weight(np.asarray(0, np.int64))], axis=0)
            first = g.add("Unsqueeze", [first, g.ints(0)]) if opset >= 13 else g.add("Unsqueeze", [first], axes=[0])
            to = g.add("Concat", [first, g.ints(7 + extras, -1)], axis=0)
        else:
            to = g.ints(batch, 7 + extras, side * side)
        levels.append(g.add("Reshape", [y, to], f"/model.9/Reshape_{index}"))
    x = g.add("Concat", levels, "/model.9/Concat", axis=2)
    widths = [2, 2, 3, *([extras] if extras else [])]
    outs = ["centre", "extent", "logits", *(["extras"] if extras else [])]
    if opset >= 13:
        g.nodes.append(helper.make_node("Split", [x, g.ints(*widths)], outs, name="/model.9/Split", axis=1))
    else:
        g.nodes.append(helper.make_node("Split", [x], outs, name="/model.9/Split", axis=1, split=widths))
    cells, strides = _grid(size)
    centre = g.add("Add", [g.add("Tanh", ["centre"]), g.weight((cells + 0.5).T[None].astype(kind))])
    centre = g.add("Mul", [centre, g.weight(strides.T[None].astype(kind))])
    extent = g.add("Mul", [g.add("Exp", [g.add("Tanh", ["extent"])]), g.weight((strides * 1.5).T[None].astype(kind))])
    scores = g.add("Sigmoid", ["logits"], "/model.9/Sigmoid")
    plain = [centre, extent, scores]
    out = _done(g, *plain, done) if done else g.add("Concat", [*plain, *outs[3:]], "/model.9/Concat_1", axis=1)
    element = T.UINT8 if bytes_last else T.FLOAT16 if half else T.FLOAT
    shape = [batch, size, size, 3] if bytes_last else [batch, 3, size, size]
    meta = {
        "task": task, "kpt_shape": "[2, 3]", "stride": "32", "imgsz": f"[{size}, {size}]", "names": str(NAMES),
        "license": "of a test",
    }  # fmt: skip
    outputs = [(out, T.FLOAT16 if half else T.FLOAT)]
    if task == "segment":
        outputs.append((g.conv(finest, 16, 4, 1, 1, "/model.9/proto/Conv", gain=2), T.FLOAT))
    return save(path, g, [("images", element, shape)], outputs, meta if metadata else {}, external=external)


def _grid(size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    cells, strides = [], []
    for stride in STRIDES:
        y, x = np.mgrid[: size // stride, : size // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], 1))
        strides.append(np.full((x.size, 1), stride))
    return np.concatenate(cells), np.concatenate(strides)


def _done(g: Graph, centre: str, extent: str, scores: str, how: str) -> str:
    half = g.add("Mul", [extent, g.weight(np.asarray(0.5, g.kind))])
    corners = g.add("Concat", [g.add("Sub", [centre, half]), g.add("Add", [centre, half])], axis=1)
    rows = g.add("Transpose", [corners], perm=[0, 2, 1])
    best = g.add("ReduceMax", [scores], axes=[1], keepdims=1)
    label = g.add("Cast", [g.add("ArgMax", [scores], axis=1, keepdims=1)], to=T.FLOAT)
    table = g.add("Concat", [rows, g.add("Transpose", [g.add("Concat", [best, label], axis=1)], perm=[0, 2, 1])], axis=2)
    flat = g.add("Squeeze", [table, g.ints(0)])
    if how == "topk":
        values = g.add("Squeeze", [best, g.ints(0, 1)])
        g.nodes.append(helper.make_node("TopK", [values, g.ints(20)], ["top_values", "top_rows"], name="/TopK", axis=0))
        return g.add("Unsqueeze", [g.add("Gather", [flat, "top_rows"], axis=0), g.ints(0)])
    numbers = [g.ints(50), g.weight(np.asarray(0.5, np.float32)), g.weight(np.asarray(0.3, np.float32))]
    chosen = g.add("NonMaxSuppression", [rows, best, *numbers], "/nms")
    index = g.add("Squeeze", [g.add("Slice", [chosen, g.ints(2), g.ints(3), g.ints(1)]), g.ints(1)])
    return g.add("Gather", [flat, index], axis=0)


def quantised(model: Path, out: Path, *, size: int = 64) -> Path:
    """A file in int8 as ONNX Runtime's own tool writes it: every tensor through QuantizeLinear and DequantizeLinear."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    rng = np.random.default_rng(0)
    samples = iter([{"images": rng.random((1, 3, size, size), dtype=np.float32)} for _ in range(4)])

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(samples, None)

    quantize_static(
        str(model), str(out), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8
    )
    return out


def classifier(
    path: Path, *, batch: int | str = "n", body: str = "", softmax: bool = False, size: int = 32, grey: bool = False
) -> Path:
    """Conv, pool, linear: (N, 5) logits.

    Args:
        path: to write.
        batch: of pictures, or a name for a free one.
        body: ``mixer`` subtracts the batch's mean; ``random`` adds noise; ``unknown`` calls an operator nobody has; ``index``
            sends an int64 through the middle; ``sizes`` has a second input, as RT-DETR's own export has.
        softmax: done in the graph.
        size: of the picture.
        grey: one channel.
    """
    g = Graph()
    x = g.conv("input", 1 if grey else 3, 8, 3, 2, "/stem/Conv", gain=3)
    if body == "mixer":
        x = g.add("Sub", [x, g.add("ReduceMean", [x], axes=[0], keepdims=1)], "/mixer/Sub")
    if body == "random":
        x = g.add("Add", [x, g.add("RandomNormalLike", [x])])
    if body == "unknown":
        x = "odd_out"
        g.nodes.append(helper.make_node("Transmogrify", [g.nodes[-1].output[0]], [x], name="/odd", domain="org.example"))
    x = g.add("Relu", [x], "/stem/Relu")
    x = g.conv(x, 8, 8, 3, 2, "/body/Conv", gain=3)
    if body == "index":
        picked = g.add("ArgMax", [x], "/middle/ArgMax", axis=1, keepdims=1)
        x = g.add("Mul", [x, g.add("Cast", [picked], "/middle/Cast", to=T.FLOAT)], "/middle/Mul")
    x = g.add("Flatten", [g.add("GlobalAveragePool", [x], "/pool/Pool")], "/pool/Flatten")
    w = g.weight((g.rng.standard_normal((8, 5)) * 3).astype(np.float32))
    x = g.add("MatMul", [x, w], "/fc/MatMul")
    inputs = [("input", T.FLOAT, [batch, 1 if grey else 3, size, size])]
    if body == "sizes":
        inputs.append(("orig_target_sizes", T.INT64, [batch, 2]))
        wide = g.add("Slice", [g.add("Cast", ["orig_target_sizes"], to=T.FLOAT), g.ints(0), g.ints(1), g.ints(1)])
        x = g.add("Mul", [x, g.add("Mul", [wide, g.weight(np.asarray(1 / size, np.float32))])])
    if softmax:
        x = g.add("Softmax", [x], axis=1)
    return save(path, g, inputs, [(x, T.FLOAT)], {})


def maps(path: Path, *, size: int = 32) -> Path:
    """A class for every pixel: logits (1, 4, size/4, size/4)."""
    g = Graph()
    x = g.add("Relu", [g.conv("input", 3, 8, 3, 2, "/stem/Conv", gain=3)], "/stem/Relu")
    x = g.add("Relu", [g.conv(x, 8, 8, 3, 2, "/body/Conv", gain=3)], "/body/Relu")
    x = g.conv(x, 8, 4, 1, 1, "/head/Conv", gain=3)
    return save(path, g, [("input", T.FLOAT, [1, 3, size, size])], [(x, T.FLOAT)], {})


def save(
    path: Path, g: Graph, inputs: Sequence[tuple[str, int, Sequence[Any]]], outputs: Sequence[tuple[str, int]],
    meta: dict[str, str], *, external: bool = False,
) -> Path:  # fmt: skip
    """Writes the graph as a file."""
    domains = [helper.make_opsetid("", g.opset)]
    if any(n.domain for n in g.nodes):
        domains.append(helper.make_opsetid("org.example", 1))
    graph = helper.make_graph(
        g.nodes, "main_graph", [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_tensor_value_info(n, t, None) for n, t in outputs], initializer=g.weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    helper.set_model_props(model, meta)
    keywords = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 100} if external else {}
    onnx.save(model, str(path), **keywords)
    return path
