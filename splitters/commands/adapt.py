"""``splitters adapt BUNDLE --video FILE --out DIR``: the codec fitted to one site's camera."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitters.evaluation.video.adapt import Trial


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "adapt",
        help="fit a bundle's codec to one site's camera, unlabelled",
        description="Watches a camera's video. The tables of predicted frames are fitted to what moves there, and the bundle may "
        "carry the scene itself, so that a session's first frame costs little more than any other. Both are tried on the last "
        "quarter of the video, which is not fitted on. Tables are kept where they tell the same symbols in fewer bytes, the scene "
        "where it saves bytes at equal accuracy against the uncut model's own answers; else the bundle's own stay. A server that "
        "is told (SIGHUP) rolls the new bundle out by its hash, without a restart.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, or a default model's name")
    parser.add_argument(
        "--video", type=Path, nargs="+", required=True, metavar="FILE", help="of the camera, the more varied the better"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the adapted copy")
    parser.add_argument("--fps", type=float, default=10.0, help="frames a second that the camera will send (default: %(default)s)")
    parser.add_argument(
        "--until",
        type=float,
        default=1.0,
        help="share of the video that is looked at; `splitters evaluate --video` can judge by the rest (default: all)",
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
    print(f"{found.bundle.manifest.name}: {found.frames} frames watched, now {found.bundle.sha256[:12]} in {args.out}")
    for trial in found.trials:
        print(_told(trial))
    if args.json:
        print(json.dumps(found.to_json()))
    return 0


def _told(trial: Trial) -> str:
    if trial.percent is None:
        return f"{trial.what}: left out, for there is no telling what it saves: {trial.reason}"
    on = "of predicted frames" if trial.what == "tables" else "at equal accuracy"
    return f"{trial.what}: {trial.percent:+.1f} % bytes {on}, {'kept' if trial.pays else 'left out'}"
