"""``splitters cut MODEL --at NAME --out BUNDLE``: divide a model and write a bundle that servers and clients run."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import ConfigError, SourceError
from splitters.commands.common.model_arguments import add_input_arguments, add_model_arguments, load_model, model_size
from splitters.commands.common.progress import Progress
from splitters.commands.common.serving_arguments import UNKNOWN_LICENCE, add_serving_arguments, described
from splitters.runtime.pictures import PICTURE_SUFFIXES, content_of, files_below, readable, shipped_pictures
from splitters.tasks.preprocess import Frame

if TYPE_CHECKING:
    from splitters.cutting.bundle import Serving
    from splitters.cutting.graph.split import Cutter
    from splitters.cutting.sources import ModelSource

BITS = (8, 6, 4, 3, 2)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "cut",
        help="divide a model and write a bundle",
        description="Cuts the model after --at, verifies that head and tail together are the same function, chooses the latent "
        "codec's scales on photographs, and writes a bundle. `splitters profile MODEL` lists the cuts.",
    )
    add_model_arguments(parser, weights="hub")
    add_input_arguments(parser)
    parser.add_argument(
        "--at", metavar="NAME",
        help="the submodule or node after which to cut (default: the fewest bytes with at most 35 %% of the work on the device)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, help="the bundle's directory")
    parser.add_argument("--name", help="the bundle's name (default: the model's)")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="typical photographs (default: those scikit-image ships)")
    parser.add_argument("--photos-max", type=int, default=100, metavar="N", help="use N of them at most (default: %(default)s)")
    parser.add_argument(
        "--bits", type=int, nargs="+", help="an operating point each, 1..14 (default: 8 6 4 3 2; ONNX: 14 and 12 too)"
    )
    parser.add_argument(
        "--show", type=Path, metavar="FILE.jpg", help="a photograph with what was found, of ONNX (default: OUT.jpg)"
    )
    parser.add_argument(
        "--allow-nothing-found", action="store_true", help="write a detector of ONNX that finds nothing on the photographs, too"
    )
    parser.add_argument("--local", action="store_true", help="give the device the whole model too, for when no server answers")
    add_serving_arguments(parser)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Cuts and says what was proved and measured."""
    photos = read_photos(args.photos, args.photos_max)
    if str(args.model).startswith("onnx:"):
        from splitters.commands import cut_onnx

        return cut_onnx.run(args, photos, model_size(args))
    from splitters.cutting.bundle import write_bundle

    source = load_model(args)
    if source.inputs is not None:
        return _of_other_inputs(source, args, photos)
    at, chosen = args.at, ""
    with Progress("cut", every_s=0.5) as show:
        detector = _detector(source, args, photos, show)
        if detector is not None:
            written = detector
        else:
            import torch

            from splitters.cutting.graph.split import Cutter
            from splitters.tasks.preprocess import preprocess

            serving = _serving(source, args, photos)
            image = torch.from_numpy(preprocess(photos[0], serving.preprocess))
            show(0, len(photos), "tracing the model")
            cutter = Cutter(source.model, image)
            at, chosen = _place(cutter, args.at)
            written = write_bundle(cutter, at, photos, serving, args.out, on_step=show)
    bundle, proof = written.bundle, written.verification
    print(f"{bundle.manifest.name} cut at {at}{chosen}: {bundle.path} (sha256 {bundle.sha256[:16]}…)")
    print(f"  latents {list(bundle.manifest.latent_shape)}; head and tail are the model: relative difference "
          f"{proof.relative_difference:.1e} at batches {list(proof.batches)}, in ONNX {written.onnx_difference:.1e}; "
          f"replacing a latent moves the output by {min(proof.sensitivity):.1e} or more")  # fmt: skip
    for warning in proof.warnings:
        print(f"splitters cut: warning: {warning}", file=sys.stderr)
    metric = bundle.points[0].accuracy_metric
    print(f"  point bits  payload p50     p95   head ms  {metric} (scales and bytes from {written.photos} photographs)")
    for p in bundle.points:
        size = p.payload_bytes
        print(f"  {p.id:5} {p.bits:4.0f} {size.p50:10.0f} B {size.p95:7.0f} {p.head_ms.p50:8.2f}  {p.accuracy:.4f}")
    if args.json:
        print(json.dumps({
            "path": str(bundle.path), "sha256": bundle.sha256, "at": at, "relative_difference": proof.relative_difference,
            "onnx_difference": written.onnx_difference, "warnings": list(proof.warnings),
            "points": [p.to_json() for p in bundle.points],
        }))  # fmt: skip
    return 0


def _of_other_inputs(source: ModelSource, args: argparse.Namespace, photos: list[Frame]) -> int:
    """A model of tokens, bytes, clips, volumes or several inputs: exported to ONNX with its own example, and cut as that."""
    import tempfile

    from splitters.commands import cut_onnx
    from splitters.cutting.onnx_export import export_as_given

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{source.name}.onnx"
        example = export_as_given(source.module(), source.inputs, file)
        taken = argparse.Namespace(**{**vars(args), "model": f"onnx:{file}"})
        return cut_onnx.run(taken, photos, model_size(args), examples=[example], name=source.name)


def _place(cutter: Cutter, at: str | None) -> tuple[str, str]:
    """Where to cut, and words that say how that was chosen."""
    if at:
        return at, ""
    from splitters.profiling.measure import fewest_bytes

    name, work = fewest_bytes(cutter)
    return name, f" (the fewest bytes among cuts with at most 35 % of the work on the device: {work:.0%})"


def _detector(source: ModelSource, args: argparse.Namespace, photos: list[Frame], show: Progress) -> Any:
    """The bundle of one of torchvision's detectors, which bring their own resize and postprocess; None for other models."""
    if not str(args.model).startswith("torchvision:"):
        return None
    from splitters.cutting.rcnn import detectors as rcnn

    if not rcnn.is_detector(source.model):
        return None
    from splitters.cutting.rcnn.bundle import write_detector_bundle

    if not args.at:
        raise ConfigError("--at says where to cut one of torchvision's detectors; `splitters profile MODEL` lists the places")
    return write_detector_bundle(
        source,
        args.at,
        photos,
        args.out,
        name=args.name or source.name,
        bits=args.bits or BITS,
        licence=args.licence or UNKNOWN_LICENCE,
        on_step=show,
    )


def _serving(source: ModelSource, args: argparse.Namespace, photos: list[Frame]) -> Serving:
    from splitters.cutting.bundle import Serving

    told = described(source, args, photos)
    return Serving(
        name=args.name or source.name, task=told.task, preprocess=told.preprocess, postprocess=told.postprocess, labels=told.labels,
        licence=args.licence or UNKNOWN_LICENCE, bits=tuple(args.bits or BITS), local=args.local,
        provenance={"model": args.model, "weights": source.weights},
    )  # fmt: skip


def read_photos(folder: Path | None, at_most: int) -> list[Frame]:
    """Photographs of a directory (evenly drawn), or those that scikit-image ships. What cannot be read is left out and named.

    Raises:
        SourceError: none is found.
    """
    if folder is None:
        return shipped_pictures()
    if not folder.is_dir():
        raise SourceError(f"{folder} is no directory of photographs")
    files = [f for f in files_below(folder) if f.suffix.lower() in PICTURE_SUFFIXES or _looks_like_a_picture(f)]
    step = max(1, len(files) // at_most)
    # Evenly drawn, and then the others in turn, where one of those cannot be read.
    drawn = files[::step]
    taken = set(drawn)
    spare = [f for f in files if f not in taken]
    unreadable: list[Path] = []
    found = [picture for _, picture in islice(readable([*drawn, *spare], unreadable=unreadable), at_most)]
    if unreadable:
        print(f"{len(unreadable)} of {len(files)} photographs could not be read and were left out", file=sys.stderr)
    if not found:
        raise SourceError(f"{folder} holds no photographs that can be read")
    return found


def _looks_like_a_picture(file: Path) -> bool:
    try:
        return content_of(file) == "picture"
    except SourceError:
        return False
