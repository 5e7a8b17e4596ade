"""A cut model as a bundle: ONNX head for the device, ONNX tail for the server, a plain latent codec between them.

Nothing is written that has not run: the cut is verified in torch, then both ONNX files together against the model, on
a photograph; payloads and head times of the operating points are measured on the calibration photographs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from protos.errors import CutError, SourceError
from protos.messages import Classification
from splitters.bundle import Bundle, BundleWriter
from splitters.bundle.manifest import Head, LocalModel, Preprocess
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.codec import calibrate_plain, codec_from_spec
from splitters.cutting.answers import check_answers
from splitters.cutting.checks import OnStep, inference, silent
from splitters.cutting.graph.split import Cutter, Split
from splitters.cutting.graph.verify import PICTURES, Verification
from splitters.cutting.onnx_export import export_onnx
from splitters.runtime.sessions import open_session
from splitters.runtime.table import few, measure_table
from splitters.tasks.base import form_of
from splitters.tasks.preprocess import Frame, preprocess

log = logging.getLogger(__name__)

BITS = (8, 6, 4, 3, 2)
ONNX_TOLERANCE = 1e-3
_TIMED_RUNS = 20
_STEPS = 6

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """What a bundle says of a model beyond its two halves.

    Attributes:
        name: the bundle's name.
        task: ``classification`` or ``detection``.
        preprocess: from a frame to the model's input.
        postprocess: the manifest's ``postprocess``, e.g. ``{"kind": "softmax"}``.
        labels: class id → name.
        licence: of the weights, for those who receive the bundle.
        provenance: where the model is from.
        bits: an operating point each.
        local: whether the device also gets the whole model, for when no server answers.
    """

    name: str
    task: str
    preprocess: Preprocess
    postprocess: Mapping[str, Any]
    labels: Mapping[int, str]
    licence: str
    provenance: Mapping[str, Any]
    bits: Sequence[int] = BITS
    local: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The bundle, and what was found while it was written.

    Attributes:
        bundle: opened and verified.
        verification: of the cut, in torch.
        onnx_difference: largest difference of the ONNX halves to the model, over the largest output. Kernels differ there, so that
            a badly conditioned network's own rounding shows.
        photos: how many the codec was calibrated on.
    """

    bundle: Bundle
    verification: Verification
    onnx_difference: float
    photos: int


def channel_axis(shape: Sequence[int]) -> int:
    """Which axis of a latent (without batch) holds channels: first of (C, H, W), last of (L, C) and of (H, W, C)."""
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == shape[1] != shape[2]):
        return len(shape) - 1
    return 0


def write_bundle(
    cutter: Cutter, at: str, photos: Sequence[Frame], serving: Serving, out: Path, *, on_step: OnStep = silent
) -> Written:
    """Cuts, verifies, calibrates, exports and writes.

    Args:
        cutter: the traced model; one image input.
        at: the cut.
        photos: frames as OpenCV reads them; some 50 typical ones, for the codec's scales.
        serving: the rest of the manifest.
        out: the bundle's directory.
        on_step: told how many of how many steps are done, and what is done next.

    Raises:
        CutError: no such cut, it does not verify, its batch is fixed, its outputs are not what the postprocess reads, or the
            ONNX halves differ from the model.
        ModelError: a half cannot be exported.
        SourceError: no photos.
    """
    if not photos:
        raise SourceError("photographs are needed to choose the codec's scales: give --photos DIR")
    total = _STEPS + serving.local + len(photos)
    on_step(0, total, "trying the answers on photographs")
    check_answers(
        cutter.model,
        photos,
        preprocess=serving.preprocess,
        postprocess=serving.postprocess,
        labels=serving.labels,
        task=serving.task,
    )
    split = cutter.split(at)
    cutter.partitioner.check_payload(at)
    if not split.dynamic_batch:
        raise CutError(
            f"{serving.name} works only with a fixed batch of {cutter.trace.batches[0]}, and a server must batch frames; "
            f"{' '.join(split.notes)}. Export the model with a free batch axis"
        )
    images = [preprocess(photo, serving.preprocess) for photo in photos]
    several = torch.from_numpy(np.concatenate(images[:PICTURES]))
    first = several[:1]
    on_step(1, total, "proving that head and tail are the model")
    verification = split.verify(several)
    names = [f"latent_{i}" for i in range(len(split.latent_names))]
    with BundleWriter(out) as writer, inference(cutter.model):
        latents = split.head(first.clone())
        head_path, tail_path = writer.file("device/stem.onnx", "device"), writer.file("server/tail.onnx", "server")
        on_step(2, total, "writing the head")
        export_onnx(Contiguous(split.head), [first], head_path, inputs=["image"], outputs=names)
        outputs = [f"out_{i}" for i in range(_count(split.tail(*latents)))]
        on_step(3, total, "writing the tail")
        export_onnx(flat_tail(split.tail), list(latents), tail_path, inputs=names, outputs=outputs)
        on_step(4, total, "writing the whole model, for offloaded pictures")
        whole = nn.Sequential(Unpacked(split.head, split.tail))
        export_onnx(whole, [first], writer.file("server/whole.onnx", "server"), inputs=["image"], outputs=outputs)
        local = None
        if serving.local:
            answers = ["logits"] if form_of(serving.task) is Classification else outputs
            on_step(5, total, "writing the device's whole model")
            export_onnx(whole, [first], writer.file("device/local.onnx", "device"), inputs=["image"], outputs=answers)
            local = LocalModel(path="device/local.onnx", preprocess=serving.preprocess)
        head = open_session(head_path)
        on_step(5 + serving.local, total, "comparing the written halves with the model")
        difference = _onnx_difference(split, head, open_session(tail_path), several)
        spec, points = calibrate(
            head, images, split, serving.bits,
            on_photo=lambda done: on_step(_STEPS + serving.local + done, total, f"measuring payloads of {len(photos)} photographs"),
        )  # fmt: skip
        writer.add("device/codec.json", json.dumps(spec).encode(), "device")
        bundle = writer.finish(
            points=points, measure=lambda b: measure_table(b, few(photos), on_step),
            name=serving.name, task=serving.task, preprocess=serving.preprocess, labels=dict(serving.labels),
            latent_shape=split.latent_shapes, head=Head(stem="device/stem.onnx"), codec="device/codec.json", local=local,
            tail={"kind": "onnx", "path": "server/tail.onnx", "whole": "server/whole.onnx"},
            postprocess=dict(serving.postprocess), licence=serving.licence,
            provenance={**serving.provenance, "cut": at, "traced_by": f"torch.{split.method}", "codec": "plain"},
        )  # fmt: skip
    return Written(bundle=bundle, verification=verification, onnx_difference=difference, photos=len(images))


def flat_tail(tail: fx.GraphModule) -> fx.GraphModule:
    """The tail with its outputs, however nested, as one tensor or a flat tuple of them."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    nested = graph.graph_copy(tail.graph, env)
    leaves = tuple(leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, fx.Node))
    graph.output(leaves[0] if len(leaves) == 1 else leaves)
    return fx.GraphModule(tail, graph, class_name="Tail")


class Contiguous(nn.Module):
    """A head whose latents lie in memory in their own order; the exporter may trip over strides otherwise."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, image: Tensor) -> Any:
        """(image) → (latents…)."""
        return tuple(t.contiguous() for t in self.head(image))


class Unpacked(nn.Module):
    """Head then tail: the whole model, as graphs that are known to export."""

    def __init__(self, head: fx.GraphModule, tail: fx.GraphModule) -> None:
        super().__init__()
        self.head, self.tail = head, tail

    def forward(self, image: Tensor) -> Any:
        """(image) → (outputs…)."""
        return flat(self.tail(*self.head(image)))


def flat(output: Any) -> Any:
    """A nested output as one tensor, or a tuple of tensors."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return leaves[0] if len(leaves) == 1 else tuple(leaves)


def _count(output: Any) -> int:
    return len(_tuple(flat(output)))


def _onnx_difference(split: Split, head: ort.InferenceSession, tail: ort.InferenceSession, images: Tensor) -> float:
    """Largest difference of the ONNX halves to the model over the largest output: each picture alone, and all in one batch."""
    rows = [images[i : i + 1] for i in range(len(images))]
    singles = [_tuple(flat(split.model(row.clone()))) for row in rows]
    # Frames that a server batches must not see one another: every row is what its picture gives alone.
    together = tuple(torch.cat(parts) for parts in zip(*singles, strict=True))
    worst = 0.0
    for batch, wanted in zip([*rows, images], [*singles, together], strict=True):
        latents = head.run(None, {"image": batch.numpy()})
        got = tail.run(None, {i.name: latent for i, latent in zip(tail.get_inputs(), latents, strict=True)})
        for w, g in zip(wanted, got, strict=True):
            reference = w.numpy()
            if reference.shape != g.shape:
                raise CutError(f"an output has shape {g.shape} for a batch of {len(batch)}, expected {reference.shape}")
            worst = max(worst, float(np.abs(reference - g).max()) / (float(np.abs(reference).max()) or 1.0))
    if not worst <= ONNX_TOLERANCE:
        raise CutError(f"the ONNX halves differ from the model by {worst:.2g} of the largest output (allowed: {ONNX_TOLERANCE})")
    return worst


def _tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def calibrate(
    head: ort.InferenceSession,
    images: Sequence[Floats],
    split: Split,
    bits: Sequence[int],
    *,
    on_photo: Callable[[int], None] = lambda _done: None,
) -> tuple[dict[str, Any], list[OperatingPoint]]:
    """The codec's spec, and operating points with payload bytes and head times measured on the photographs."""
    runs = []
    for number, image in enumerate(images, start=1):
        runs.append(head.run(None, {"image": image}))
        on_photo(number)
    samples = [np.concatenate([run[i] for run in runs]) for i in range(len(split.latent_shapes))]
    spec = calibrate_plain(
        samples, bits, channel_axes=[channel_axis(s) for s in split.latent_shapes], point_ids=[str(i) for i in range(len(bits))]
    )
    codec = codec_from_spec(spec, lambda _path: b"")
    spent = []
    for number in range(_TIMED_RUNS):
        start = time.perf_counter_ns()
        head.run(None, {"image": images[number % len(images)]})
        spent.append((time.perf_counter_ns() - start) / 1e6)
    head_ms = Quantiles(p50=float(np.median(spent)), p95=float(np.percentile(spent, 95)))
    channels = sum(shape[channel_axis(shape)] if shape else 1 for shape in split.latent_shapes)
    points = []
    for number, width in enumerate(bits):
        sizes = [sum(map(len, codec.encode(codec.quantise([t[0] for t in run], str(number))))) for run in runs]
        measured = Quantiles(p50=float(np.median(sizes)), p95=float(np.percentile(sizes, 95)))
        points.append(OperatingPoint(id=number, channels=channels, bits=width, payload_bytes=measured, head_ms=head_ms))
    return spec, points
