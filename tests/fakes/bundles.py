"""A tiny real bundle, made on the fly: a small random conv net cut after its first layer, with the plain codec.

Everything in it is what a shipped bundle holds (ONNX head, local model and tail, codec table, operating points), only
small: it opens, runs and verifies like any other, in a few milliseconds.

Shape legend: images (N, 3, S, S), the latent (N, 4, S/4, S/4), logits (N, classes).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from splitters.bundle import Bundle, BundleWriter
from splitters.bundle.manifest import Head, LocalModel, Preprocess
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.codec import calibrate_plain

CHANNELS = 4


def tiny_preprocess(size_px: int = 32) -> Preprocess:
    """Short side to the input's plus an eighth, centre crop."""
    return Preprocess(resize="shortest", size_px=(size_px, size_px), resize_px=size_px * 9 // 8, mean=(0.5,) * 3, std=(0.5,) * 3)


def _model(
    nodes: list[onnx.NodeProto], weights: dict[str, NDArray[np.float32]], inputs: str, output: str, shapes: list[list[int | str]]
) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "tiny",
        [helper.make_tensor_value_info(inputs, TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shapes[1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if name in used],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def tiny_models(*, seed: int = 0, size_px: int = 32, classes: int = 10) -> dict[str, onnx.ModelProto]:
    """``stem``, ``tail`` and ``whole`` (= tail of stem), with weights drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    weights = {
        "w0": rng.normal(0, 0.25, (CHANNELS, 3, 4, 4)).astype(np.float32),
        "b0": rng.normal(0, 0.1, CHANNELS).astype(np.float32),
        "w1": rng.normal(0, 0.3, (8, CHANNELS, 3, 3)).astype(np.float32),
        "b1": rng.normal(0, 0.1, 8).astype(np.float32),
        "w2": rng.normal(0, 1.0, (8, classes)).astype(np.float32),
        "b2": rng.normal(0, 0.1, classes).astype(np.float32),
    }
    stem = [
        helper.make_node("Conv", ["image", "w0", "b0"], ["c0"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Relu", ["c0"], ["latent_0"]),
    ]
    tail = [
        helper.make_node("Conv", ["latent_0", "w1", "b1"], ["c1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["p1"]),
        helper.make_node("Flatten", ["p1"], ["f1"]),
        helper.make_node("Gemm", ["f1", "w2", "b2"], ["logits"]),
    ]
    image: list[int | str] = ["n", 3, size_px, size_px]
    latent: list[int | str] = ["n", CHANNELS, size_px // 4, size_px // 4]
    logits: list[int | str] = ["n", classes]
    return {
        "stem": _model(stem, weights, "image", "latent_0", [image, latent]),
        "tail": _model(tail, weights, "latent_0", "logits", [latent, logits]),
        "whole": _model(stem + tail, weights, "image", "logits", [image, logits]),
    }


def write_tiny_bundle(
    out: Path,
    *,
    name: str = "tiny",
    seed: int = 0,
    size_px: int = 32,
    classes: int = 10,
    bits: Sequence[int] = (8, 4),
    local: bool = True,
    task: str = "classification",
    postprocess: Mapping[str, Any] | None = None,
) -> Bundle:
    """Writes and opens the bundle.

    Args:
        out: its directory.
        name: the model's name.
        seed: of the weights; another seed gives another bundle hash.
        size_px: side of the square input, a multiple of 4.
        classes: how many.
        bits: one operating point each, ids 0, 1, ...
        local: whether it carries the local model.
        task: what its ten outputs mean.
        postprocess: the manifest's; None: softmax.
    """
    import onnxruntime as ort

    models = {key: model.SerializeToString() for key, model in tiny_models(seed=seed, size_px=size_px, classes=classes).items()}
    rng = np.random.default_rng(seed + 1)
    samples = rng.uniform(-1, 1, (8, 3, size_px, size_px)).astype(np.float32)
    latents = ort.InferenceSession(models["stem"], providers=["CPUExecutionProvider"]).run(None, {"image": samples})[0]
    codec = calibrate_plain([latents], bits, point_ids=[str(i) for i in range(len(bits))])
    points = [
        OperatingPoint(
            id=i, channels=CHANNELS, bits=b, accuracy=min(1.0, 0.5 + 0.05 * b), accuracy_metric="top1",
            payload_bytes=Quantiles(p50=40.0 * b, p95=50.0 * b), head_ms=Quantiles(p50=0.2, p95=0.3),
        )
        for i, b in enumerate(bits)
    ]  # fmt: skip
    with BundleWriter(out) as writer:
        writer.add("device/stem.onnx", models["stem"], "device")
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        writer.add("server/tail.onnx", models["tail"], "server")
        writer.add("server/whole.onnx", models["whole"], "server")
        if local:
            writer.add("device/local.onnx", models["whole"], "device")
        return writer.finish(
            points=points, name=name, task=task, preprocess=tiny_preprocess(size_px),
            labels={i: f"class {i}" for i in range(classes)}, latent_shape=((CHANNELS, size_px // 4, size_px // 4),),
            head=Head(stem="device/stem.onnx"), codec="device/codec.json",
            local=LocalModel(path="device/local.onnx", preprocess=tiny_preprocess(size_px)) if local else None,
            tail={"kind": "onnx", "path": "server/tail.onnx", "whole": "server/whole.onnx"},
            postprocess={"kind": "softmax"} if postprocess is None else postprocess,
            licence="Apache-2.0", provenance={"base": "random weights, for tests"},
        )  # fmt: skip
