"""``splitters cut onnx:FILE``: an ONNX model divided as ONNX, its outputs read as declared or guessed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import cv2

from protos.errors import StorageError
from protos.messages import Classification, Detection
from splitters.commands.common.model_arguments import input_roles, read_examples
from splitters.commands.common.progress import Progress
from splitters.commands.common.serving_arguments import UNKNOWN_LICENCE, read_labels, read_preprocess
from splitters.runtime.inputs import ONLY
from splitters.tasks.base import TASKS, form_of
from splitters.tasks.canvas import Canvas
from splitters.tasks.preprocess import Frame

if TYPE_CHECKING:
    from splitters.cutting.onnx.inputs import Feed
    from splitters.cutting.onnx.model import OnnxModel
    from splitters.cutting.onnx.write import OnnxWritten

BITS = (14, 12, 8, 6, 4, 3, 2)


def say(text: str) -> None:
    """A line of progress: where output is kept, progress is not in it."""
    print(f"splitters: {text}", file=sys.stderr, flush=True)


def run(
    args: argparse.Namespace,
    photos: Sequence[Frame],
    size_px: tuple[int, int] | None,
    *,
    examples: Sequence[Feed] = (),
    name: str = "",
) -> int:
    """Cuts and says what was proved, guessed and measured.

    Args:
        args: of the verb.
        photos: to calibrate and to judge on.
        size_px: (height, width) where the file's own is not wanted.
        examples: values of inputs that take no picture, instead of --example's.
        name: the model's, where the file's is not it.
    """
    from splitters.cutting.onnx.meaning import Asked, understood
    from splitters.cutting.onnx.model import load_onnx_model
    from splitters.cutting.onnx.write import OnnxServing, write_onnx_bundle

    path = Path(str(args.model).removeprefix("onnx:"))
    given = list(examples) or read_examples(args.example)
    roles = input_roles(args)
    alone = [n for n, role in roles.items() if role == "raw"]
    given = [{alone[0] if n == ONLY and alone else n: a for n, a in each.items()} for each in given]
    model = load_onnx_model(path, size_px=size_px, roles=roles, example=given[0] if given else None)
    asked = Asked(
        output=str(args.output), labels=read_labels(args.labels) if args.labels else {},
        labels_from=str(args.labels or "the file's metadata"), score_min=args.score_min, iou=args.iou,
        spec=read_preprocess(args.preprocess, model.picture.size_px) if args.preprocess else None,
    )  # fmt: skip
    told = understood(model, asked, photos, say, given)
    serving = OnnxServing(
        name=args.name or name or path.stem, preprocess=told.preprocess, task=told.task, postprocess=told.postprocess,
        labels=told.labels,
        licence=args.licence or licence_of(model),
        provenance={"model": f"onnx:{path.name}", "weights": path.name}, bits=tuple(args.bits or BITS), local=args.local,
        may_find_nothing=args.allow_nothing_found,
    )  # fmt: skip
    with Progress("cut", every_s=0.5) as show:
        show(0, len(photos), "proving the pieces against the whole file")
        written = write_onnx_bundle(model, args.at, photos, serving, args.out, examples=given, on_step=show)
    picture = (args.show or args.out.with_name(f"{args.out.name}.jpg")) if model.picture.name else None
    if picture is not None:
        _draw(written, photos, picture)
    _report(written, args, picture)
    return 0


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


def _report(written: OnnxWritten, args: argparse.Namespace, picture: Path | None) -> None:
    from splitters.cutting.onnx.cost import DEVICE_SHARE

    bundle, proof, seen = written.bundle, written.proof, written.agreement
    chosen = (
        "as asked" if args.at
        else "the fewest bytes among cuts with at most 35 % of the work on the device" if written.cut.work <= DEVICE_SHARE
        else "none leaves the device with at most 35 % of the work; this one with the least"
    )  # fmt: skip
    print(f"{bundle.manifest.name} cut at {written.cut.name} ({chosen}): {bundle.path} (sha256 {bundle.sha256[:16]}…)")
    print(f"  latents {list(bundle.manifest.latent_shape)}; {100 * written.cut.work:.0f} % of the work on the device; "
          f"{'any batch' if proof.free_batch else 'frame by frame'}")  # fmt: skip
    same = "the file's to the last bit" if proof.identical else "the file's"
    print(f"  head and tail are {same} on {proof.pictures} pictures; as optimised for serving within {proof.difference:.1e}")
    first = max(bundle.points, key=lambda p: p.bits)
    if form_of(bundle.manifest.task) is Detection:
        print(f"  through the codec at {first.bits:g} bits: {seen.matched} of {seen.found} boxes on {seen.photos} photographs "
              f"found again, within {seen.box_px:.2f} px and {seen.score:.3f} of the score")  # fmt: skip
    elif form_of(bundle.manifest.task) is not Classification:
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
    if picture is not None:
        print(f"  what was found in a photograph: {picture}")
    if args.json:
        print(json.dumps({
            "path": str(bundle.path), "sha256": bundle.sha256, "at": written.cut.name, "identical": proof.identical,
            "onnx_difference": proof.difference, "free_batch": proof.free_batch, "agreement": asdict(seen),
            "warnings": list(written.notes), "points": [p.to_json() for p in bundle.points],
        }))  # fmt: skip
