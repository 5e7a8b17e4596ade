"""``splitters export NAME``: write a default bundle, or a trained run, to a directory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from splitters.bundle import exported_path
from splitters.zoo.defaults import EXPORTERS, export, recalibrate


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser("export", help="write a default bundle, or a trained run, to a directory")
    parser.add_argument("what", metavar="NAME|RUN", help=f"{', '.join(EXPORTERS)}, or a directory that `splitters train` wrote")
    parser.add_argument("--out", type=Path, help="the bundle's directory (default: where `--model NAME` looks)")
    parser.add_argument("--calibrate", type=Path, metavar="DIR", help="plain latents only: new scales from 200 photos of DIR")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports and says where to."""
    if args.calibrate is not None:
        recalibrate(args.what, args.calibrate)
    bundle = export(args.what, args.out or exported_path(Path(args.what).name))
    size = sum(p.bytes for p in bundle.manifest.device_parts())
    print(f"{bundle.manifest.name}: {bundle.path} (device part {size / 1e6:.1f} MB, sha256 {bundle.sha256[:16]}…)")
    if args.json:
        print(json.dumps({"name": bundle.manifest.name, "path": str(bundle.path), "sha256": bundle.sha256, "device_bytes": size}))
    return 0
