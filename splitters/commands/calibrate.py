"""``splitters calibrate BUNDLE --video FILE``: a prefilter's threshold for the scene a fixed camera sees."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from splitters.commands.common.progress import Progress

if TYPE_CHECKING:
    from splitters.bundle import Bundle
    from splitters.evaluation.gating.scene import Fit, Look


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit a bundle's prefilter to the scene a fixed camera sees",
        description="Watches a video of the scene with a teacher detector and chooses the prefilter's threshold for the recall "
        "asked for. Independent units are passages: what comes, stays and goes. Threshold and 95 % bound are written into the "
        "bundle; with few passages the bound is low, and said to be. With --until, the rest of the video tests.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a detector's bundle, or a default model's name")
    parser.add_argument("--video", type=Path, required=True, help="from the camera's place, with and without things of interest")
    parser.add_argument(
        "--teacher", default="own", help="a YOLOX-nano ONNX file that says what is there; own: the bundle's model (default)"
    )
    parser.add_argument("--interest", help="class names, comma-separated (default: the bundle's)")
    parser.add_argument("--recall", type=float, default=0.98, help="asked for (default: %(default)s)")
    parser.add_argument(
        "--sure", type=float, default=0.5, help="a passage needs a teacher's box of this score (default: %(default)s)"
    )
    parser.add_argument(
        "--until", type=float, default=1.0, help="share of the video that calibrates; the rest tests (default: all)"
    )
    parser.add_argument("--out", type=Path, help="write a copy of the bundle there instead of changing it")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Watches, fits, writes, tests."""
    from protos.errors import ConfigError
    from splitters.bundle import open_bundle
    from splitters.bundle.draft import Draft
    from splitters.evaluation.gating.scene import columns_named, examine, fit, promise_part, read_video, store, watch
    from splitters.zoo.defaults import ensure_exported

    if not 0 < args.until <= 1 or not 0 < args.sure < 1:
        raise ConfigError("--until must lie in (0, 1] and --sure between 0 and 1")
    path = Path(args.bundle)
    bundle = open_bundle(path if path.is_dir() else ensure_exported(args.bundle))
    if args.out is not None and args.out.exists():
        raise ConfigError(f"{args.out} exists; choose another --out")
    known = json.loads(bundle.read_part(promise_part(bundle))) if bundle.manifest.head.prefilter else {"interest": []}
    interest = [n.strip() for n in args.interest.split(",")] if args.interest else [str(n) for n in known["interest"]]
    with Progress(f"watching {args.video.name}") as show:
        frames, fps, count = read_video(args.video)
        scene = watch(bundle, frames, fps, _teacher(args.teacher, bundle), sure=args.sure, show=show, count=count)
    columns = columns_named(bundle, interest, scene.category_ids)
    fitted = fit(scene, columns, args.recall, sure=args.sure, until=max(1, round(len(scene) * args.until)))
    told = (
        f"{args.video.name}, first {fitted.frames} of {len(scene)} frames, {fitted.asked.units} passages; "
        f"teacher {args.teacher if args.teacher == 'own' else Path(args.teacher).name} at {args.sure:g}"
    )
    if args.out is None:
        bundle = store(bundle, interest, fitted, told)
    else:
        with Draft(args.out) as draft:
            shutil.copytree(bundle.path, draft.path, dirs_exist_ok=True)
            store(open_bundle(draft.path), interest, fitted, told)
            draft.publish()
        bundle = open_bundle(args.out)
    report = _told(interest, fitted, told)
    if fitted.frames < len(scene):
        report["test"] = test = examine(scene, columns, fitted, sure=args.sure)
        print("the rest tests: " + ", ".join(f"{k} {v}" for k, v in test.items()))
    if args.json:
        print(json.dumps({"bundle": str(bundle.path), "sha256": bundle.sha256, "interest": interest, **report}))
    return 0


def _told(interest: list[str], fitted: Fit, told: str) -> dict[str, object]:
    c = fitted.asked
    print(f"{', '.join(interest)}: {told}")
    print(f"threshold {c.threshold:.3f}; recall {c.recall_asked:g} asked, {c.recall_promised:.3f} promised at 95 % confidence")
    if not c.kept:
        print(f"{c.units} passages cannot promise more: some 150 would be needed for .98")
    return {"threshold": c.threshold, "sure": fitted.sure, "calibration": {**c.to_json(), "frames": fitted.frames}}


def _teacher(name: str, bundle: Bundle) -> Look:
    """A detector of BGR frames.

    Raises:
        ConfigError: no such file, or the bundle cannot run its model on whole frames.
    """
    import numpy as np

    from protos.errors import ConfigError
    from splitters.evaluation.gating.scene import UNSURE, own_detector
    from splitters.zoo.onnx_detectors import YoloxNano

    if name == "own":
        manifest = replace(bundle.manifest, postprocess={**bundle.manifest.postprocess, "score_min": UNSURE})
        if (own := own_detector(replace(bundle, manifest=manifest))) is None:
            raise ConfigError(f"bundle {bundle.manifest.name!r} holds no whole model; give a --teacher")
        return own
    if not Path(name).is_file():
        raise ConfigError(f"--teacher {name} does not exist")
    teacher = YoloxNano(Path(name), score_min=UNSURE)
    return lambda frame: teacher(np.ascontiguousarray(frame[..., ::-1]))
