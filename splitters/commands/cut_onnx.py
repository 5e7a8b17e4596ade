"""``splitters cut onnx:FILE``: an ONNX model divided as ONNX, its outputs read as declared or guessed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from protos.errors import ConfigError, StorageError
from splitters.bundle.manifest import Preprocess
from splitters.commands.common.progress import Progress
from splitters.commands.common.serving_arguments import AUTO, TENSORS, UNKNOWN_LICENCE, read_labels, read_preprocess
from splitters.tasks.base import TASKS
from splitters.tasks.canvas import Canvas
from splitters.tasks.decoding import Decoding, Preset
from splitters.tasks.decoding.guess import Guess, Outputs, fitted, guess, labels_of
from splitters.tasks.preprocess import Frame, preprocess

if TYPE_CHECKING:
    from splitters.cutting.onnx.model import OnnxModel
    from splitters.cutting.onnx.write import OnnxWritten

BITS = (14, 12, 8, 6, 4, 3, 2)
_INTEGERS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "UINT8": ((0.0,) * 3, (1 / 255,) * 3), "INT8": ((128 / 255,) * 3, (1 / 255,) * 3),
}  # fmt: skip
_FLOAT_CLASSIFIER: Mapping[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def say(text: str) -> None:
    """A line of progress: where output is kept, progress is not in it."""
    print(f"splitters: {text}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace, photos: Sequence[Frame], size_px: tuple[int, int] | None) -> int:
    """Cuts and says what was proved, guessed and measured."""
    from splitters.cutting.onnx.model import load_onnx_model
    from splitters.cutting.onnx.write import OnnxServing, write_onnx_bundle

    path = Path(str(args.model).removeprefix("onnx:"))
    model = load_onnx_model(path, size_px=size_px)
    task, postprocess, spec, labels = understood(model, args, photos)
    serving = OnnxServing(
        name=args.name or path.stem, preprocess=spec, task=task, postprocess=postprocess, labels=labels,
        licence=args.licence or licence_of(model),
        provenance={"model": f"onnx:{path.name}", "weights": path.name}, bits=tuple(args.bits or BITS), local=args.local,
    )  # fmt: skip
    with Progress("cut", every_s=0.5) as show:
        show(0, len(photos), "proving the pieces against the whole file")
        written = write_onnx_bundle(model, args.at, photos, serving, args.out, on_step=show)
    picture = args.show or args.out.with_name(f"{args.out.name}.jpg")
    _draw(written, photos, picture)
    _report(written, args, picture)
    return 0


def understood(
    model: OnnxModel, args: argparse.Namespace, photos: Sequence[Frame]
) -> tuple[str, Mapping[str, Any], Preprocess, dict[int, str]]:
    """Task, decoding, preprocessing and labels, as asked for or guessed; says which.

    Raises:
        ConfigError: a guess is ambiguous, or what was asked for does not fit.
    """
    from splitters.cutting.onnx.pieces import whole_outputs

    plain = preprocess_for(model, {"resize": "stretch", "interpolation": "bilinear"})
    values = whole_outputs(model, preprocess(photos[0], plain))
    outputs = Outputs(names=model.outputs, values=tuple(values), size_px=model.picture.size_px, metadata=model.metadata)
    chosen = Guess(preset=str(args.output), why="as asked")
    if args.output == AUTO:
        chosen = guess(outputs)
    labels = read_labels(args.labels) if args.labels else labels_of(model.metadata)
    if chosen.preset == TENSORS:
        own = {"resize": "letterbox", "anchor": "centre"} if "stride" in model.metadata else {"resize": "stretch"}
        task, postprocess, fields = TENSORS, {"names": list(model.outputs)}, own
    else:
        preset = fitted({"boxes": "boxes-scores"}.get(chosen.preset, chosen.preset), outputs)
        changes = {k: v for k, v in (("score_min", args.score_min), ("iou", args.iou)) if v is not None}
        how = replace(preset.decoding, **changes)
        _fit_labels(how, labels, outputs, str(args.labels or "the file's metadata"))
        task, postprocess, fields = how.task, how.to_json(), _preset_fields(preset, how)
    spec = read_preprocess(args.preprocess, model.picture.size_px) if args.preprocess else preprocess_for(model, fields)
    if spec.size_px != model.picture.size_px:
        raise ConfigError(f"--preprocess makes pictures of {spec.size_px}, the model takes {model.picture.size_px} (height, width)")
    named = labels or task in (TENSORS, "embedding")
    say(f"outputs {outputs.shapes()} are read as {chosen.preset} ({chosen.why}); input {_words(spec)}"
        + ("" if named else "; class names are not known, numbers are shown (--labels)"))  # fmt: skip
    return task, postprocess, spec, labels


def _preset_fields(preset: Preset, how: Decoding) -> dict[str, Any]:
    fields = dict(preset.preprocess)
    if how.task == "classification":
        fields = {"resize": "shortest", **(_FLOAT_CLASSIFIER if not fields else {}), **fields}
    return fields


def preprocess_for(model: OnnxModel, fields: Mapping[str, Any]) -> Preprocess:
    """A preset's preprocessing at the model's size; a model of bytes gets the pixels as they are."""
    size = model.picture.size_px
    made: dict[str, Any] = {"resize": "letterbox", "interpolation": "bilinear", **fields, "size_px": size}
    if made["resize"] == "shortest" and "resize_px" not in made:
        made["resize_px"] = max(*size, round(min(size) * 8 / 7)) if "mean" in made else max(size)
    whole_numbers = _INTEGERS.get(model.picture.dtype.name)
    if whole_numbers is not None:
        made["mean"], made["std"] = whole_numbers
    for name in ("mean", "std"):
        if name in made:
            made[name] = tuple(made[name])
    return Preprocess(**made)


def _words(spec: Preprocess) -> str:
    plain = spec.mean == (0.0, 0.0, 0.0)
    scale = "pixels 0..1" if plain and spec.std == (1.0, 1.0, 1.0) else (
        "pixels 0..255" if plain and abs(spec.std[0] - 1 / 255) < 1e-6 else f"mean {list(spec.mean)}, deviation {list(spec.std)}"
    )  # fmt: skip
    return f"{spec.size_px[0]}x{spec.size_px[1]} {spec.resize} {spec.channel_order.upper()}, {scale}"


def _fit_labels(how: Decoding, labels: Mapping[int, str], outputs: Outputs, where: str) -> None:
    """Class columns and names are as many, where both are known."""
    if not labels or how.class_id is not None or how.task in ("segmentation", "embedding"):
        return
    columns = how.scores.read([np.asarray(v, np.float32) for v in outputs.values]).shape[2] - (how.background != "none")
    if not how.class_ids and len(labels) != columns:
        raise ConfigError(f"{where} names {len(labels)} classes, the model's output has {columns}")


def _draw(written: OnnxWritten, photos: Sequence[Frame], path: Path) -> None:
    """The photograph in which most was found, with the answer that came through the bundle.

    Raises:
        StorageError: the picture cannot be written.
    """
    manifest = written.bundle.manifest
    kind = TASKS.get(manifest.task)
    seen = max(range(len(written.answers)), key=lambda i: sum(kind.classes(written.answers[i]).values()))
    canvas = Canvas(photos[seen])
    kind.draw(canvas, written.answers[seen], manifest.labels)
    done, data = cv2.imencode(".jpg", canvas.finish())
    try:
        path.write_bytes(data.tobytes() if done else b"")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; the bundle is whole") from error


def licence_of(model: OnnxModel) -> str:
    """What the exporter says, or that nobody does."""
    return model.metadata.get("license", "") or UNKNOWN_LICENCE


def _report(written: OnnxWritten, args: argparse.Namespace, picture: Path) -> None:
    bundle, proof, seen = written.bundle, written.proof, written.agreement
    chosen = "as asked" if args.at else "the fewest bytes among cuts with at most 35 % of the work on the device"
    print(f"{bundle.manifest.name} cut at {written.cut.name} ({chosen}): {bundle.path} (sha256 {bundle.sha256[:16]}…)")
    print(f"  latents {list(bundle.manifest.latent_shape)}; {100 * written.cut.work:.0f} % of the work on the device; "
          f"{'any batch' if proof.free_batch else 'frame by frame'}")  # fmt: skip
    same = "the file's to the last bit" if proof.identical else "the file's"
    print(f"  head and tail are {same} on {proof.pictures} pictures; as optimised for serving within {proof.difference:.1e}")
    first = max(bundle.points, key=lambda p: p.bits)
    if bundle.manifest.task == "detection":
        print(f"  through the codec at {first.bits:g} bits: {seen.matched} of {seen.found} boxes on {seen.photos} photographs "
              f"found again, within {seen.box_px:.2f} px and {seen.score:.3f} of the score")  # fmt: skip
        if not seen.found:
            lowest = bundle.manifest.postprocess["score_min"]
            print(
                f"splitters cut: warning: no box scores above {lowest} on {seen.photos} photographs: are --output and "
                "--preprocess right, and is the model trained? (--score-min, --photos)", file=sys.stderr,
            )  # fmt: skip
    elif bundle.manifest.task != "classification":
        print(
            f"  through the codec at {first.bits:g} bits: the same answer within 1e-3 on {seen.matched} of {seen.found} photographs"
        )
    else:
        print(f"  through the codec at {first.bits:g} bits: the same class on {seen.matched} of {seen.found} photographs, "
              f"scores within {seen.score:.3f}")  # fmt: skip
    for note in written.notes:
        print(f"splitters cut: warning: {note}", file=sys.stderr)
    print(f"  point bits  payload p50     p95   head ms  agreement with the whole file (on {written.photos} photographs)")
    for p in bundle.points:
        sent = f"{p.payload_bytes.p50:10.0f} B {p.payload_bytes.p95:7.0f}"
        print(f"  {p.id:5} {p.bits:4.0f} {sent} {p.head_ms.p50:8.2f}  {p.accuracy:.4f}")
    print(f"  what was found in a photograph: {picture}")
    if args.json:
        print(json.dumps({
            "path": str(bundle.path), "sha256": bundle.sha256, "at": written.cut.name, "identical": proof.identical,
            "onnx_difference": proof.difference, "free_batch": proof.free_batch, "agreement": asdict(seen),
            "warnings": list(written.notes), "points": [p.to_json() for p in bundle.points],
        }))  # fmt: skip
