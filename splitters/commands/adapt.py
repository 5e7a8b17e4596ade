"""``splitters adapt BUNDLE --video FILE --out DIR``: the codec fitted to one site's camera."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "adapt",
        help="fit a bundle's codec to one site's camera, unlabelled",
        description="Watches a camera's video and fits the tables of predicted frames to what moves there; the bundle also "
        "carries the scene itself, so that a session's first frame costs little more than any other. Bytes fall, and detections "
        "may too: compare with `splitters evaluate --video`. With --until, the rest of the video tests. A server that is told "
        "(SIGHUP) rolls the new bundle out by its hash, without a restart.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, or a default model's name")
    parser.add_argument(
        "--video", type=Path, nargs="+", required=True, metavar="FILE", help="of the camera, the more varied the better"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapted copy")
    parser.add_argument("--fps", type=float, default=10.0, help="frames a second that the camera will send (default: %(default)s)")
    parser.add_argument(
        "--until", type=float, default=1.0, help="share of the video that is fitted on; the rest tests (default: all)"
    )
    parser.add_argument("--no-scene", action="store_true", help="fit tables alone: for a camera that is moved about")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Copies, watches, fits, tests."""
    from protos.errors import ConfigError
    from splitters.bundle import open_bundle
    from splitters.evaluation.video.adapt import AdaptConfig, adapt
    from splitters.zoo.defaults import ensure_exported

    config = AdaptConfig(videos=tuple(args.video), fps=args.fps, until=args.until, scene=not args.no_scene)
    path = Path(args.bundle)
    bundle = open_bundle(path if path.is_dir() else ensure_exported(args.bundle))
    if args.out.exists():
        raise ConfigError(f"{args.out} exists; choose another --out")
    shutil.copytree(bundle.path, args.out)
    try:
        found = adapt(open_bundle(args.out), config, tick=lambda what: print(f"  {what}", flush=True))
    except BaseException:
        shutil.rmtree(args.out, ignore_errors=True)
        raise
    print(f"{found.bundle.manifest.name}: fitted on {found.frames} frames, now {found.bundle.sha256[:12]} in {args.out}")
    for c in found.test:
        saved = 1 - c.bytes_after / c.bytes_before
        print(
            f"point {c.id}: {c.bytes_before:.0f} → {c.bytes_after:.0f} bytes a frame ({saved:+.0%} saved; first frame "
            f"{c.key_before:.0f} → {c.key_after:.0f}), error {c.error_before:.4f} → {c.error_after:.4f}"
        )
    if args.json:
        print(json.dumps(found.to_json()))
    return 0
