"""One of torchvision's detectors as a bundle: ONNX head for the device, torch tail with the detector's own code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import save_file

from protos.errors import CutError, SourceError
from splitters.bundle import BundleWriter
from splitters.bundle.manifest import Head, Preprocess
from splitters.cutting.bundle import Contiguous, Written, calibrate
from splitters.cutting.checks import OnStep, inference, silent
from splitters.cutting.graph.split import Cutter
from splitters.cutting.graph.verify import PICTURES
from splitters.cutting.onnx_export import export_onnx
from splitters.cutting.rcnn.detectors import PREFIX, RcnnTail, ServedTail, shell
from splitters.cutting.sources import ModelSource
from splitters.runtime.sessions import open_session
from splitters.runtime.table import few, measure_table
from splitters.tasks.preprocess import Frame, preprocess


def detector_preprocess(detector: Any, size_px: tuple[int, int] | None = None) -> Preprocess:
    """The transform of a detector as a fixed input size, which one latent shape needs.

    Detectors of a fixed size stretch the frame, as torchvision does. The others scale it and pad to a multiple of 32 px;
    here they scale it into ``size_px`` (default: 4:3 at the transform's own short side), at the top left.
    """
    transform = detector.transform
    mean, std = tuple(transform.image_mean), tuple(transform.image_std)
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
        return Preprocess(resize="stretch", size_px=(height, width), interpolation="bilinear", mean=mean, std=std)
    if size_px is None:
        short = transform.min_size[-1]
        size_px = (_multiple(short), _multiple(min(transform.max_size, short * 4 / 3)))
    return Preprocess(
        resize="letterbox", size_px=size_px, anchor="top_left", pad=round(255 * sum(mean) / 3), interpolation="bilinear",
        mean=mean, std=std,
    )  # fmt: skip


def backbone_source(source: ModelSource) -> ModelSource:
    """The detector's backbone, to be profiled: that is where detectors are cut."""
    spec = detector_preprocess(source.model)
    return replace(
        source, model=cast("Any", source.model).backbone, name=f"{source.name}'s backbone", preprocess=spec,
        example=torch.zeros(1, 3, *spec.size_px),
    )  # fmt: skip


def _multiple(side: float, of: int = 32) -> int:
    return ceil(side / of) * of


def write_detector_bundle(
    source: ModelSource,
    at: str,
    photos: Sequence[Frame],
    out: Path,
    *,
    name: str,
    bits: Sequence[int],
    licence: str,
    size_px: tuple[int, int] | None = None,
    score_min: float = 0.05,
    on_step: OnStep = silent,
) -> Written:
    """Cuts, verifies on the first photograph, calibrates and writes.

    Args:
        source: a torchvision detector.
        at: a module of its backbone, with or without ``backbone.``.
        photos: for the codec's scales.
        out: the bundle's directory.
        name: the bundle's name.
        bits: an operating point each.
        licence: of the weights.
        size_px: (height, width) of the input, where the detector leaves it open.
        score_min: objects below are not reported.
        on_step: told how many of how many steps are done, and what is done next.

    Raises:
        CutError: no such cut, or it does not verify.
        SourceError: no photos.
    """
    if not photos:
        raise SourceError("photographs are needed to choose the codec's scales: give --photos DIR")
    detector: Any = source.model
    spec = detector_preprocess(detector, size_px)
    images = [preprocess(photo, spec) for photo in photos]
    first = torch.from_numpy(images[0])
    cutter = Cutter(detector.backbone, first)
    split = cutter.split(at.removeprefix(PREFIX))
    cutter.partitioner.check_payload(split.at)
    if not split.dynamic_batch:
        raise CutError(f"{name}: {' '.join(split.notes)}")
    total = 3 + len(photos)
    on_step(0, total, "proving that head and tail are the backbone")
    verification = split.verify(torch.from_numpy(np.concatenate(images[:PICTURES])))
    names = [f"latent_{i}" for i in range(len(split.latent_names))]
    on_step(1, total, "detecting on a photograph")
    with inference(detector):  # what the server will run, on a photograph, before anything is written
        latents = [t.numpy() for t in split.head(first)]
        served = ServedTail(RcnnTail(shell(detector), split.tail, spec.size_px).eval(), spec)
        served.answers(latents, [(photos[0].shape[1], photos[0].shape[0])])
    with BundleWriter(out) as writer, inference(detector):
        on_step(2, total, "writing the head")
        path = writer.file("device/stem.onnx", "device")
        export_onnx(Contiguous(split.head), [first], path, inputs=["image"], outputs=names)
        head = open_session(path)
        worst = max(
            float((torch.from_numpy(got) - wanted).abs().max() / (wanted.std() or 1.0))
            for wanted, got in zip(split.head(first), head.run(None, {"image": images[0]}), strict=True)
        )
        codec, points = calibrate(
            head, images, split, bits,
            on_photo=lambda done: on_step(3 + done, total, f"measuring payloads of {len(photos)} photographs"),
        )  # fmt: skip
        writer.add("device/codec.json", json.dumps(codec).encode(), "device")
        state = {k: v.contiguous() for k, v in detector.state_dict().items()}
        save_file(state, writer.file("server/detector.safetensors", "server"))
        bundle = writer.finish(
            points=points, measure=lambda b: measure_table(b, few(photos), on_step),
            name=name, task="detection", preprocess=spec, labels=dict(source.labels),
            latent_shape=split.latent_shapes, head=Head(stem="device/stem.onnx"), codec="device/codec.json",
            tail={
                "kind": "torch", "factory": f"torchvision:{source.name}", "weights": ["server/detector.safetensors"], "at": at,
                "input_size": list(spec.size_px), "preprocess": asdict(spec), "score_min": score_min,
                "options": {"num_classes": classes(detector)},
            },
            licence=licence, provenance={"model": f"torchvision:{source.name}", "weights": source.weights, "cut": at},
        )  # fmt: skip
    return Written(bundle=bundle, verification=verification, onnx_difference=worst, photos=len(images))


def classes(detector: Any) -> int:
    """How many classes a detector tells apart, background included where it counts it."""
    if hasattr(detector, "roi_heads"):
        return int(detector.roi_heads.box_predictor.cls_score.out_features)
    head = detector.head.classification_head
    return int(getattr(head, "num_classes", 0) or head.num_columns)
