"""``splitters export NAME``: write a default bundle, or a trained run, to a directory."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from protos.errors import SourceError
from splitters.bundle import Bundle, exported_path, rewrite_points
from splitters.commands.common.progress import Progress
from splitters.zoo.defaults import EXPORTERS, export, recalibrate

if TYPE_CHECKING:
    from splitters.bundle import Measured
    from splitters.tasks.preprocess import Frame

PHOTOS = 200


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write a default bundle, or a trained run, to a directory",
        description="Writes a bundle. A trained run's operating points are measured first, on the photos that its training held "
        "out: real payload bytes, agreement with the whole model, head time. `splitters evaluate` measures against labels.",
    )
    parser.add_argument("what", metavar="NAME|RUN", help=f"{', '.join(EXPORTERS)}, or a directory that `splitters train` wrote")
    parser.add_argument("--out", type=Path, help="the bundle's directory (default: where `--model NAME` looks)")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="measure a run's points on these instead of the photos held out")
    parser.add_argument(
        "--photos-max", type=int, default=PHOTOS, metavar="N", help="use N photos at most, evenly drawn (default: %(default)s)"
    )
    parser.add_argument("--calibrate", type=Path, metavar="DIR", help="plain latents only: new scales from 200 photos of DIR")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports and says where to."""
    out = args.out or exported_path(Path(args.what).name)
    if args.calibrate is not None:
        recalibrate(args.what, args.calibrate)
        bundle = export(args.what, out)
        # The committed table is of the committed scales.
        found = measured(bundle, photos=args.calibrate, at_most=args.photos_max)
        bundle = rewrite_points(bundle, found.points, local=found.local)
    else:
        measure = partial(measured, run=Path(args.what), photos=args.photos, at_most=args.photos_max)
        bundle = export(args.what, out, measure)
    size = sum(p.bytes for p in bundle.manifest.device_parts())
    print(f"{bundle.manifest.name}: {bundle.path} (device part {size / 1e6:.1f} MB, sha256 {bundle.sha256[:16]}…)")
    tell_points(bundle)
    if args.json:
        points = [p.to_json() for p in bundle.points]
        print(json.dumps({
            "name": bundle.manifest.name, "path": str(bundle.path), "sha256": bundle.sha256, "device_bytes": size, "points": points,
        }))  # fmt: skip
    return 0


def measured(bundle: Bundle, *, run: Path | None = None, photos: Path | None = None, at_most: int = PHOTOS) -> Measured:
    """Measures a bundle's points, with a progress bar.

    Args:
        bundle: written, not yet measured.
        run: the training it is of; its held-out photos are taken where no others are named.
        photos: a folder.
        at_most: photos, evenly drawn.

    Raises:
        SourceError: there is no readable photo.
    """
    from splitters.runtime.table import measure_table

    frames = photos_for(run, photos, at_most)
    with Progress(f"measuring {bundle.manifest.name}") as show:
        return measure_table(bundle, frames, show)


def photos_for(run: Path | None, photos: Path | None, at_most: int = PHOTOS) -> list[Frame]:
    """The photos to measure a bundle's points on; see `measured`."""
    from splitters.runtime.folders import pictures_below
    from splitters.runtime.pictures import readable
    from splitters.training.run import DEV_FILE

    if at_most < 1:
        raise SourceError(f"--photos-max must be at least 1, got {at_most}")
    if photos is not None:
        files, where = pictures_below(photos), str(photos)
    else:
        file = (run or Path()) / DEV_FILE
        held_out = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        files, where = [Path(p) for p in held_out], f"{run}, which held none out of its training,"
    files = [files[i * len(files) // at_most] for i in range(at_most)] if len(files) > at_most else files
    frames = [frame for _, frame in readable(files)]
    if not frames:
        raise SourceError(f"{where} has no readable photo to measure the operating points on: give --photos DIR")
    return frames


def tell_points(bundle: Bundle) -> None:
    """The table for people."""
    print(" id  graphs          codec  bytes p50    p95  head ms  accuracy  frontier")
    for p in bundle.points:
        size, graphs = p.payload_bytes, "+".join(p.graphs) or "stem"
        print(
            f"{p.id:3d}  {graphs:14s}  {p.codec_point:5s}  {size.p50:9.0f} {size.p95:6.0f}  {p.head_ms.p50:7.2f}  "
            f"{p.accuracy:8.4f}  {'*' if p.pareto else ''}"
        )
    print(f"accuracy is {bundle.points[0].accuracy_metric}")
