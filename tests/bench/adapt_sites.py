"""What `splitters adapt` saves at equal detections: every site's bundle fitted on a clip's first half, judged on its second.

    python -m tests.bench.adapt_sites --data DATA [--bundle NAME_OR_PATH] [--clips vtest.avi ...] --out rows.jsonl

Both bundles go through the same frames, 10 a second, each predicted from the one before, the first frame included. The figure is
the change of bytes at equal AP50 against the uncut model's own boxes, with its 95 % interval over segments of 2 s. A clip whose
line stands in ``--out`` already is not done again. The last line is the mean over the clips.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from splitters.bundle import open_bundle
from splitters.evaluation.bdrate import compare
from splitters.evaluation.video.adapt import AdaptConfig, adapt
from splitters.evaluation.video.clips import Part
from splitters.evaluation.video.run import VideoConfig, evaluate_video
from splitters.zoo.defaults import ensure_exported
from tests.bench.video_real import CLIPS


def site(path: Path, clip: Path, limit: int, draws: int, scene: bool) -> dict[str, Any]:
    """One clip: the figure, its interval and the accuracies compared over; and what the trials on the first half said."""
    judged = VideoConfig(clips=(clip,), against=(), part=Part(start=0.5), limit=limit, ages=(1,), draws=draws)

    def told(what: str) -> None:
        print(f"  {what}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "site"
        shutil.copytree(path, copy)
        trials = adapt(open_bundle(copy), AdaptConfig(videos=(clip,), until=0.5, scene=scene), tick=told).trials
        before, after = (evaluate_video(open_bundle(b), judged, tick=told).clips[0].curves["ours 1"] for b in (path, copy))
    return asdict(compare(before, after)) | {"trials": [asdict(t) for t in trials]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", default="yolox-nano")
    parser.add_argument("--clips", nargs="+", default=list(CLIPS))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--no-scene", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    path = Path(args.bundle) if Path(args.bundle).is_dir() else ensure_exported(args.bundle)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for name in args.clips:
        if name not in {row["clip"] for row in rows}:
            row = {"clip": name} | site(path, args.data / "video" / name, args.limit, args.draws, not args.no_scene)
            rows.append(row)
            with args.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    chosen = [row["percent"] for row in rows if row["clip"] in args.clips]
    print(json.dumps({"mean_percent": float(np.mean(chosen)), "clips": len(chosen)}))


if __name__ == "__main__":
    main()
