"""Our detector as a bundle with a plain quantised latent, cut inside its backbone, the prefilter beside the encoder.

Shape legend: N batch; images (N, 3, 320, 320); the stem's map (N, 32, 160, 160); the latent is block 4's output, (N, 40, 40, 40);
P positions, C = 80 classes.

The device's stem is a graph of its own, so that a frame the prefilter stops has paid for nothing else.
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

from splitters.bundle import Bundle, BundleWriter, sha256_file
from splitters.bundle.manifest import Head, LocalModel, Preprocess
from splitters.bundle.operating_point import OperatingPoint, load_points
from splitters.codec import calibrate_plain
from splitters.cutting.onnx_export import export_onnx, write_server
from splitters.tasks.labels.coco_classes import CATEGORY_IDS, NAME_OF
from splitters.zoo.detector.network import INPUT_SIZE_PX, PREPROCESS, TAPS, WEIGHTS, Detector, dense, load_detector
from splitters.zoo.prefilter.export import write_prefilter

CUT_BLOCK = TAPS[0]  # the first pyramid tap: one latent carries all that the tail needs
BITS = (8, 6, 4, 3, 2)
LOCAL_SIZE_PX = 160
SCORE_MIN = 0.25
SHOWN = WEIGHTS.parent / "shown.json"
PLAIN_CODEC = WEIGHTS.parent / "plain.json"
PLAIN_POINTS = WEIGHTS.parent / "plain_points.json"
LICENCE = (
    "Apache-2.0 (code); weights trained from EfficientNet-Lite0 (Apache-2.0) and YOLOX-nano's boxes (Apache-2.0) on photographs "
    "of COCO, ImageNet and others, which are for research, non-commercial use"
)


class DetectorBlocks(nn.Module):
    """Backbone blocks up to the cut, on the stem's map."""

    def __init__(self, model: Detector, at: int = CUT_BLOCK) -> None:
        super().__init__()
        self.blocks = model.backbone.blocks[: at + 1]

    def forward(self, stem: Tensor) -> Tensor:
        """Maps (N, 32, H / 2, W / 2) to block ``at``'s output."""
        latent: Tensor = self.blocks(stem)
        return latent


class DetectorTail(nn.Module):
    """From the latent to dense boxes and scores.

    Args:
        model: the whole detector.
        at: index of the last block that runs on the device, at most the first tap's.
    """

    def __init__(self, model: Detector, at: int = CUT_BLOCK) -> None:
        super().__init__()
        if not 0 <= at <= TAPS[0]:
            raise ValueError(f"the detector can be cut after blocks 0..{TAPS[0]}, not {at}")
        self.model, self.at = model, at

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Maps block ``at``'s output to boxes (N, P, 4) xyxy in input pixels and scores (N, P, C)."""
        taps = (latent,) if self.at == TAPS[0] else ()
        return scored(self.model.from_taps(self.model.backbone.after(latent, self.at + 1, taps)))


class WholeDetector(nn.Module):
    """Images to dense boxes and scores, for export."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N, 3, H, W) to boxes (N, P, 4) and scores (N, P, C)."""
        return scored(self.model(image))


def scored(raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes (N, P, 4) in input pixels and scores (N, P, C) of raw outputs."""
    boxes, logits = dense(raw)
    return boxes, logits.sigmoid()


def calibrate(images: Iterator[NDArray[np.float32]]) -> dict[str, Any]:
    """The plain codec's scales, from preprocessed (1, 3, 320, 320) inputs."""
    model = load_detector()
    head = nn.Sequential(model.backbone.stem, DetectorBlocks(model)).eval()
    with torch.inference_mode():
        latents = np.concatenate([head(torch.from_numpy(image)).numpy() for image in images])
    return calibrate_plain([latents], BITS, point_ids=[str(i) for i in range(len(BITS))])


def local_preprocess() -> Preprocess:
    """The detector's preprocessing at the local model's smaller input."""
    from dataclasses import replace

    return replace(PREPROCESS, size_px=(LOCAL_SIZE_PX, LOCAL_SIZE_PX))


def common_fields() -> dict[str, Any]:
    """The manifest's fields that every bundle of our detector shares."""
    return {
        "task": "detection",
        "preprocess": PREPROCESS,
        "labels": dict(NAME_OF),
        "codec": "device/codec.json",
        "local": LocalModel(path="device/local.onnx", preprocess=local_preprocess()),
        "postprocess": {
            "kind": "dense_boxes", "class_ids": CATEGORY_IDS.tolist(), "score_min": SCORE_MIN, "iou": 0.5, "keep": 100,
        },
        "licence": LICENCE,
    }  # fmt: skip


def shown_from(detector: Path) -> float | None:
    """The score from which on boxes are shown, as ``splitters.training.detector.shown`` measured it for exactly these weights."""
    stored = json.loads(SHOWN.read_text(encoding="utf-8"))
    return float(stored["score"]) if stored["weights_sha256"] == sha256_file(detector) else None


def write_local(writer: BundleWriter, model: Detector) -> None:
    """Adds the whole network at a reduced input size, for when no server answers."""
    image = torch.zeros(1, 3, LOCAL_SIZE_PX, LOCAL_SIZE_PX)
    path = writer.file("device/local.onnx", "device")
    export_onnx(WholeDetector(model), [image], path, inputs=["image"], outputs=["boxes", "scores"])


def export_plain(out: Path, codec: Mapping[str, Any] | None = None, points: Sequence[OperatingPoint] | None = None) -> Bundle:
    """Writes the bundle.

    Args:
        out: its directory.
        codec: the plain codec's spec, from ``calibrate``; the committed one when None.
        points: measured operating points; those measured for the committed codec when None.
    """
    codec = codec or json.loads(PLAIN_CODEC.read_text(encoding="utf-8"))
    model = load_detector()
    shape = tuple(codec["tensors"][0]["shape"])
    table = points or load_points(PLAIN_POINTS.read_text(encoding="utf-8"))
    with BundleWriter(out) as writer:
        image = torch.zeros(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX)
        stem = model.backbone.stem
        export_onnx(stem, [image], writer.file("device/stem.onnx", "device"), inputs=["image"], outputs=["stem"])
        blocks_path = writer.file("device/blocks.onnx", "device")
        with torch.no_grad():
            export_onnx(DetectorBlocks(model), [stem(image)], blocks_path, inputs=["stem"], outputs=["latent_0"])
        write_local(writer, model)
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        tail = write_server(
            writer, DetectorTail(model).eval(), torch.zeros(1, *shape), WholeDetector(model).eval(), image,
            outputs=["boxes", "scores"],
        )  # fmt: skip
        prefilter = write_prefilter(writer, input_px=INPUT_SIZE_PX, detector=WEIGHTS, score_min=SCORE_MIN)
        return writer.finish(
            points=table, name="detector", latent_shape=(shape,),
            head=Head(stem="device/stem.onnx", graphs={"blocks": "device/blocks.onnx"}, prefilter=prefilter),
            tail=tail,
            **common_fields(), score_min=shown_from(WEIGHTS), provenance={
                "base": "EfficientNet-Lite0 backbone, light pyramid, trained here; see splitters/zoo/detector/weights/recipe.json",
                "cut": f"backbone.blocks.{CUT_BLOCK}",
                "codec": "plain: per-channel quantisation, zstandard",
            },
        )  # fmt: skip
