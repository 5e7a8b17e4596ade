"""``splitters inspect BUNDLE``: what a bundle holds, verified."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from splitters.bundle import Bundle, exported_path, open_bundle


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser("inspect", help="show what a bundle holds and verify it")
    parser.add_argument("bundle", help="a bundle's directory, or the name of an exported one")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Opens, verifies and prints."""
    path = Path(args.bundle)
    bundle = open_bundle(path if path.exists() else exported_path(args.bundle))
    _print_table(bundle)
    if args.json:
        print(json.dumps({"sha256": bundle.sha256, "path": str(bundle.path), "points": [p.to_json() for p in bundle.points]}))
    return 0


def _print_table(bundle: Bundle) -> None:
    m = bundle.manifest
    print(f"{m.name}  ({m.task}, {len(m.labels)} labels)  sha256 {bundle.sha256[:16]}…  every part verified")
    print(f"  input {m.preprocess.size_px} px {m.preprocess.resize}, latents {list(m.latent_shape)}, tail {m.tail.get('kind')}")
    print(f"  licence: {m.licence}")
    for part in m.parts:
        print(f"  {part.side:7} {part.bytes:>11,} B  {part.path}")
    print("  point  encoders width channels  bits   bytes p50      p95  accuracy            head ms  Pareto")
    for p in bundle.points:
        print(
            f"  {p.id:5} {p.encoders:9} {p.width:5.2f} {p.channels:8} {p.bits:5.1f}"
            f" {p.payload_bytes.p50:11.0f} {p.payload_bytes.p95:8.0f}  {p.accuracy:.4f} {p.accuracy_metric:11}"
            f" {p.head_ms.p50:7.2f}  {'yes' if p.pareto else ''}"
        )
