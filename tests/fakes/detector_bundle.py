"""A tiny detection bundle that is right by construction: every cell of an 8 x 8 grid is a box, its brightness the score.

Shape legend: images (N, 3, 64, 64), letterboxed; the latent (N, 1, 8, 8), a cell's mean brightness 0..1; boxes (N, 64, 4), scores
(N, 64, 1).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from splitters.bundle import Bundle, BundleWriter
from splitters.bundle.manifest import Head, Preprocess
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.codec import calibrate_plain, learned_spec
from splitters.codec.fitting.fit import fit_tables

SIDE_PX, CELL_PX, CATEGORY = 64, 8, 1
SPEC = Preprocess(resize="letterbox", size_px=(SIDE_PX, SIDE_PX), pad=0)


Shapes = dict[str, list[int | str]]


def _model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray[np.generic]],
    given: str,
    outputs: list[str],
    also: Shapes | None = None,
) -> bytes:
    cells = SIDE_PX // CELL_PX
    shapes: Shapes = {
        "image": ["n", 3, SIDE_PX, SIDE_PX], "latent_0": ["n", 1, cells, cells], "boxes": ["n", cells * cells, 4],
        "scores": ["n", cells * cells, 1], **(also or {}),
    }  # fmt: skip
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "cells",
        [helper.make_tensor_value_info(given, TensorProto.FLOAT, shapes[given])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def write_cell_detector(
    out: Path, *, bits: Sequence[int] = (8, 1), whole: bool = True, prefilter: bool = False, learned: bool = False
) -> Bundle:
    """Writes and opens the bundle.

    Args:
        out: its directory.
        bits: an operating point each.
        whole: with the whole model.
        learned: with a learned codec, that predicts nothing yet.
        prefilter: with a filter whose score is the brightest cell's, and a promise (threshold .5) that nothing was calibrated for.
    """
    y, x = np.mgrid[0:SIDE_PX:CELL_PX, 0:SIDE_PX:CELL_PX].astype(np.float32)
    corners = np.stack([x, y, x + CELL_PX, y + CELL_PX], axis=-1).reshape(1, -1, 4)
    constants: dict[str, NDArray[np.generic]] = {
        "mean": np.full((1, 3, CELL_PX, CELL_PX), 1 / (3 * CELL_PX**2), np.float32), "corners": corners,
        "shape": np.array([0, -1, 1], np.int64), "zero": np.zeros(1, np.float32),
    }  # fmt: skip
    stem = [helper.make_node("Conv", ["image", "mean"], ["latent_0"], kernel_shape=[CELL_PX] * 2, strides=[CELL_PX] * 2)]
    tail = [
        helper.make_node("Reshape", ["latent_0", "shape"], ["scores"]),
        helper.make_node("Mul", ["scores", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "corners"], ["boxes"]),
    ]
    samples = np.random.default_rng(0).uniform(0, 1, (8, 1, SIDE_PX // CELL_PX, SIDE_PX // CELL_PX)).astype(np.float32)
    codec = calibrate_plain([samples], bits, point_ids=[str(i) for i in range(len(bits))])
    points = [
        OperatingPoint(
            id=i, channels=1, bits=b, payload_bytes=Quantiles(p50=20.0 * b, p95=25.0 * b), accuracy=min(1.0, 0.5 + 0.05 * b),
            accuracy_metric="ap",
        )
        for i, b in enumerate(bits)
    ]  # fmt: skip
    tables = b""
    if learned:
        gains = np.array([[2.0**b] for b in bits])
        tables = fit_tables([np.rint(samples * g[:, None, None]).astype(np.int32) for g in gains], (1,))
        codec = learned_spec(
            shape=samples.shape[1:], gains=gains, ungains=1 / gains, points={str(i): (i, 1) for i in range(len(bits))},
            tables_path="device/tables.bin",
        )  # fmt: skip
    with BundleWriter(out) as writer:
        if learned:
            writer.add("device/tables.bin", tables, "device")
        writer.add("device/stem.onnx", _model(stem, constants, "image", ["latent_0"]), "device")
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        writer.add("server/tail.onnx", _model(tail, constants, "latent_0", ["boxes", "scores"]), "server")
        spec = {"kind": "onnx", "path": "server/tail.onnx"}
        if whole:
            writer.add("server/whole.onnx", _model(stem + tail, constants, "image", ["boxes", "scores"]), "server")
            spec["whole"] = "server/whole.onnx"
        if prefilter:
            pool = [
                helper.make_node("GlobalMaxPool", ["latent_0"], ["top"]),
                helper.make_node("Flatten", ["top"], ["flat"]),
                helper.make_node("Concat", ["flat", "flat"], ["scores"], axis=1),
            ]
            graph = _model(pool, constants, "latent_0", ["scores"], {"scores": ["n", 2]})
            writer.add("device/prefilter.onnx", graph, "device")
            promise = {
                "category_ids": [CATEGORY],
                "interest": ["person"],
                "threshold": 0.5,
                "recall_asked": 0.98,
                "recall_promised": 0.0,
            }
            writer.add("device/prefilter.json", json.dumps(promise).encode(), "device")
        return writer.finish(
            points=points, name="cells", task="detection",
            preprocess=SPEC, labels={CATEGORY: "person"}, latent_shape=((1, SIDE_PX // CELL_PX, SIDE_PX // CELL_PX),),
            head=Head(stem="device/stem.onnx", prefilter="device/prefilter.onnx" if prefilter else None), codec="device/codec.json",
            tail=spec, licence="Apache-2.0",
            postprocess={"kind": "dense_boxes", "class_ids": [CATEGORY], "score_min": 0.25, "iou": 0.5, "keep": 100},
        )  # fmt: skip


def write_cell_photos(folder: Path, count: int = 12, *, seed: int = 0) -> Path:
    """Photos of 128 x 96 px with bright and dim cells as objects among darker ones; the path of their instances.json.

    The dimmest objects score .15 (below the bundle's threshold), the brightest other cell .08.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(1, count + 1):
        grey = rng.uniform(0.02, 0.08, (6, 8))
        for row, column in rng.permutation([(r, c) for r in range(6) for c in range(8)])[: rng.integers(2, 6)]:
            grey[row, column] = rng.choice([0.15, 0.3, 0.6, 0.9])
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": CATEGORY, "iscrowd": 0, "area": 256,
                "bbox": [int(column) * 16, int(row) * 16, 16, 16],
            })  # fmt: skip
        picture = np.kron(grey * 255, np.ones((16, 16))).round().astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:03}.png"), np.repeat(picture[..., None], 3, axis=2))
        images.append({"id": number, "file_name": f"{number:03}.png", "width": 128, "height": 96})
    path = folder.parent / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": CATEGORY, "name": "person"}]}))
    return path
