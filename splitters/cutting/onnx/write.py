"""An ONNX model as a bundle: pieces of the user's own graph, proved, decoded, measured, and only then written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from protos.errors import ConfigError, SourceError
from protos.messages import Answer
from splitters.bundle import Bundle, BundleWriter
from splitters.bundle.manifest import Head, LocalModel, Preprocess
from splitters.bundle.operating_point import OperatingPoint
from splitters.codec import calibrate_plain, codec_from_spec
from splitters.cutting.checks import OnStep, silent
from splitters.cutting.onnx.cost import best_cut, crossing_costs
from splitters.cutting.onnx.cuts import BYTES, Cuts, OnnxCut
from splitters.cutting.onnx.feeds import feeds_of
from splitters.cutting.onnx.inputs import Feed
from splitters.cutting.onnx.judge import METRIC, Agreement, judge
from splitters.cutting.onnx.model import OnnxModel, at_batch_one, to_bytes
from splitters.cutting.onnx.pieces import Latent, Pieces, divide, latent_name
from splitters.cutting.onnx.proof import Proof, prove
from splitters.cutting.onnx.runtime import Session
from splitters.cutting.points import channel_axis, measure_points
from splitters.runtime.tail import batched
from splitters.tasks.base import make_task
from splitters.tasks.preprocess import BLANK, Frame

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxServing:
    """What a bundle says of an ONNX model beyond its pieces; see ``splitters.cutting.bundle.Serving``.

    Attributes:
        may_find_nothing: whether a bundle is written though nothing is found on any photograph.
    """

    name: str
    preprocess: Preprocess
    task: str
    postprocess: Mapping[str, Any]
    labels: Mapping[int, str]
    licence: str
    provenance: Mapping[str, Any]
    bits: Sequence[int]
    local: bool = False
    may_find_nothing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What was measured of a published file once, so that no photographs are needed to cut it again.

    Attributes:
        at: the cut.
        codec: the latent codec's spec.
        points: operating points, measured.
        score_min: of a detector, the score from which on boxes are shown.
    """

    at: str
    codec: Mapping[str, Any]
    points: tuple[OperatingPoint, ...]
    score_min: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxWritten:
    """The bundle, and what was found while it was made."""

    bundle: Bundle
    cut: OnnxCut
    proof: Proof
    agreement: Agreement
    answers: tuple[Answer, ...]
    photos: int
    notes: tuple[str, ...]


def write_onnx_bundle(
    model: OnnxModel,
    at: str | None,
    photos: Sequence[Frame],
    serving: OnnxServing,
    out: Path,
    *,
    examples: Sequence[Feed] = (),
    on_step: OnStep = silent,
) -> OnnxWritten:
    """Cuts, proves, decodes, calibrates and writes.

    Args:
        model: ready to be cut.
        at: the cut; None: the one that sends the fewest bytes with at most 35 % of the work on the device.
        photos: frames as OpenCV reads them.
        serving: the rest of the manifest.
        out: the bundle's directory.
        examples: values of the inputs that take no picture, a frame each; empty: what the model was loaded with.
        on_step: told how far the work is.

    Raises:
        CutError: no such cut, or the pieces are not the file.
        ConfigError: the decoding does not fit the outputs.
        ModelError: a piece cannot be run.
        SourceError: no photographs.
    """
    if not photos:
        raise SourceError("photographs are needed to choose the codec's scales: give --photos DIR")
    if serving.local and model.manifest_inputs():
        raise ConfigError("--local is for models of one picture: the device's own copy is given nothing else")
    images = feeds_of(model, photos, serving.preprocess, examples)
    photos = photos if model.picture.name else [BLANK] * len(images)
    asked = model
    model, cut, pieces, proof = _proved(model, at, images)
    head = Session(to_bytes(pieces.head, serving.name), optimised=True, what="the head")
    tail = Session(to_bytes(pieces.tail, serving.name), optimised=True, what="the tail")
    runs = []
    for number, image in enumerate(images):
        on_step(number, len(images), "running the head on the photographs")
        runs.append(head.run(image))
    exact = all(latent.dtype in BYTES for latent in pieces.latents)
    bits = tuple(dict.fromkeys(min(width, 8) for width in serving.bits)) if exact else serving.bits
    spec = _calibrated(pieces.latents, runs, bits)
    codec = codec_from_spec(spec, lambda _path: b"")
    decode = make_task(serving.task, serving.postprocess, serving.preprocess).decode
    judged = judge(model, decode, _tail_runner(tail), photos, images)
    if not serving.may_find_nothing:
        judged.check_found(serving.task, serving.postprocess)
    agreements = []
    for number, width in enumerate(bits):
        on_step(number, len(bits), f"comparing answers at {width} bits with the whole file's")
        agreements.append(judged.point(codec, str(number), runs))
    on_step(len(bits), len(bits), "writing the bundle")
    agreement, answers = agreements[int(np.argmax(bits))]
    points = measure_points(
        head.run, images, runs, codec, [latent.shape for latent in pieces.latents], bits,
        accuracy=[a.accuracy for a, _ in agreements], metric=METRIC,
    )  # fmt: skip
    bundle = _written(model, cut, pieces, proof, serving, spec, points, out)
    notes = [*model.notes, *proof.notes]
    if asked.free_batch and not proof.free_batch:
        notes.append("pictures in one batch do not give what each gives alone: the server runs them one by one")
    return OnnxWritten(
        bundle=bundle, cut=cut, proof=proof, agreement=agreement, answers=tuple(answers), photos=len(images), notes=tuple(notes)
    )


def write_prepared(model: OnnxModel, prepared: Prepared, serving: OnnxServing, out: Path) -> Bundle:
    """Cuts and proves a file whose codec and operating points are known; the proof's pictures are noise.

    Raises:
        CutError: no such cut, or the pieces are not the file.
        ModelError: a piece cannot be run.
    """
    noise = np.random.default_rng(0).integers(0, 256, (2, *model.picture.size_px, 3), dtype=np.uint8)
    model, cut, pieces, proof = _proved(model, prepared.at, feeds_of(model, list(noise), serving.preprocess))
    return _written(model, cut, pieces, proof, serving, prepared.codec, prepared.points, out, prepared.score_min)


def _written(
    model: OnnxModel, cut: OnnxCut, pieces: Pieces, proof: Proof, serving: OnnxServing, spec: Mapping[str, Any],
    points: Sequence[OperatingPoint], out: Path, score_min: float | None = None,
) -> Bundle:  # fmt: skip
    with BundleWriter(out) as writer:
        inputs = model.manifest_inputs()
        parts = [("device/stem.onnx", "device", pieces.head), ("server/tail.onnx", "server", pieces.tail)]
        # The server runs a whole model on a picture that was sent instead; other inputs cannot be sent so.
        whole = {} if inputs else {"whole": "server/whole.onnx"}
        for path, side, piece in [*parts, *((p, "server", pieces.whole) for p in whole.values())]:
            writer.add(path, to_bytes(piece, serving.name), "device" if side == "device" else "server")
        local = None
        if serving.local:
            writer.add("device/local.onnx", to_bytes(pieces.whole, serving.name), "device")
            # The device's copy is the whole file: it agrees with it.
            local = LocalModel(path="device/local.onnx", preprocess=serving.preprocess, accuracy=1.0, accuracy_metric=METRIC)
        writer.add("device/codec.json", json.dumps(spec).encode(), "device")
        batch = {} if proof.free_batch else {"batch": 1}
        return writer.finish(
            points=points, name=serving.name, task=serving.task, preprocess=serving.preprocess, score_min=score_min,
            labels=dict(serving.labels), inputs=inputs,
            latent_shape=tuple(latent.shape for latent in pieces.latents), head=Head(stem="device/stem.onnx"),
            codec="device/codec.json", local=local, postprocess=dict(serving.postprocess), licence=serving.licence,
            tail={
                "kind": "onnx", "path": "server/tail.onnx", **whole, "outputs": list(model.outputs), **batch,
            },
            provenance={
                **serving.provenance, "cut": cut.name, "cut_by": "ONNX IR", "codec": "plain", "opset": model.opset,
                "sha256": hashlib.sha256(model.path.read_bytes()).hexdigest(),
            },
        )  # fmt: skip


def _proved(model: OnnxModel, at: str | None, images: Sequence[Feed]) -> tuple[OnnxModel, OnnxCut, Pieces, Proof]:
    """The cut and its proof; with a batch of one where a free batch does not hold."""
    cuts = Cuts(model)
    if at is None:
        cut, cost = best_cut(cuts, images[0])
    else:
        cut = cuts.find(at)
        cost = crossing_costs(cuts, [cut], images[0])[cut.position]
    fixed = not model.free_batch
    if fixed or all(shape and shape[0] == 1 for shape in cost.shapes):
        pieces = divide(model, cut, cost.shapes)
        proof = prove(model, pieces, images)
        if fixed or proof.free_batch:
            return model, cut, pieces, proof
    alone = at_batch_one(model)
    cuts = Cuts(alone)
    cut = cuts.find(cut.name)
    cost = crossing_costs(cuts, [cut], images[0])[cut.position]
    pieces = divide(alone, cut, cost.shapes)
    return alone, cut, pieces, prove(alone, pieces, images)


def _tail_runner(session: Session) -> Any:
    def run(arrays: Sequence[Array]) -> list[Array]:
        return session.run({latent_name(i): a for i, a in enumerate(arrays)})

    return batched(run, 1)


def _calibrated(latents: Sequence[Latent], runs: Sequence[Sequence[Array]], bits: Sequence[int]) -> dict[str, Any]:
    """The codec's spec; bytes of the graph travel as they are at 8 bits."""
    samples = [np.concatenate([run[i] for run in runs]) for i in range(len(latents))]
    axes = [channel_axis(latent.shape) for latent in latents]
    spec: dict[str, Any] = dict(calibrate_plain(samples, bits, channel_axes=axes, point_ids=[str(i) for i in range(len(bits))]))
    for index, latent in enumerate(latents):
        low = {ir.DataType.UINT8: 0.0, ir.DataType.INT8: -128.0, ir.DataType.BOOL: 0.0}.get(latent.dtype)
        if low is None:
            continue
        for point in spec["points"]:
            levels = 1 if latent.dtype == ir.DataType.BOOL else 255
            entry = point["tensors"][index]
            entry["low"] = [low] * len(entry["low"])
            entry["step"] = [max(levels / (2 ** point["bits"] - 1), 1.0)] * len(entry["step"])
    return spec
