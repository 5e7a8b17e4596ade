"""SIGKILL of a real server at frame 60 of a 30 fps camera, a cold restart three seconds later: who answers, and how soon again.

python -m tests.bench.recovery [--model efficientnet-lite0] [--camera clip.avi] [--fps 30] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from edge_server.models import locate
from tests.fakes.client_process import write_clip
from tests.fakes.recovery import Recovery, cheapest, kill_and_restart


def main() -> None:
    """Runs it and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet-lite0", help="a default bundle's name, or a directory")
    parser.add_argument("--camera", type=Path, help="a video; without one a clip with something moving in it")
    parser.add_argument("--fps", type=float, default=30.0)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    bundle = locate(args.model)
    runs: list[Recovery] = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as text:
        tmp = Path(text)
        clip = args.camera or write_clip(tmp / "clip.avi", frames=120, fps=args.fps, size=(640, 480))
        camera = ("--camera", str(clip), "--loop", "--realtime", "--fps", f"{args.fps:g}", "--change-gate", "off")
        camera += ("--prefilter", "off", "--operating-point", cheapest(bundle))
        for i in range(args.runs):
            (tmp / str(i)).mkdir()
            run = kill_and_restart(tmp / str(i), bundle, camera)
            runs.append(run)
            print(json.dumps(run.as_json()), flush=True)
    print(
        json.dumps(
            {
                "bench": "recovery", "model": args.model, "fps": args.fps, "runs": len(runs),
                "start_s": round(statistics.median(r.start_s for r in runs), 2),
                "back_s": round(statistics.median(r.back_s for r in runs), 2),
                "back_s_worst": round(max(r.back_s for r in runs), 2),
                "balanced": all(r.finished.summary["balanced"] for r in runs),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
