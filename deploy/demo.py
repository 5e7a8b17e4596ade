"""``make demo``: head and tail in two processes, on real photographs that a Python package ships.

    python -m deploy.demo --out build/demo

Exports the default bundles, starts ``edge-server`` as a child of ``edge-client`` and streams the photographs through both,
once for the classifier and once for the detector. Ends with one JSON line; annotated pictures lie in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Photographs that ship inside scikit-image's wheel (public domain or CC0, see its data/README.txt).
PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")
LOOPS = 6


def photos(out: Path) -> Path:
    """Copies the photographs to ``out/photos`` and returns the directory."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        sys.exit("the demo's photographs come with scikit-image; run `make demo`, or pip install 'headtail[demo]'")
    folder = out / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        shutil.copyfile(Path(spec.origin).parent / "data" / name, folder / name)
    return folder


def stream(model: str, folder: Path, out: Path) -> dict[str, Any]:
    """Runs ``edge-client`` with a server of its own on ``folder`` and returns its summary."""
    command = [
        sys.executable, "-m", "edge_client.cli", "--camera", str(folder), "--loop", "--frames", str(LOOPS * len(PHOTOS)),
        "--server", "embedded", "--model", model, "--output", str(out / f"{model}.jsonl"),
        "--save-video", str(out / model), "--json",
    ]  # fmt: skip
    print(f"\n$ edge-client {' '.join(command[3:])}\n", flush=True)
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = run.stdout.strip().split("\n")
    print("\n".join(lines[:-1]))
    if run.returncode:
        sys.exit(run.returncode)
    summary: dict[str, Any] = json.loads(lines[-1])
    return summary


def show(results: Path) -> None:
    """Prints what was seen in each photograph, from ``results.jsonl``."""
    seen: dict[str, dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seen.setdefault(str(row["source"]), row)
    for source, row in seen.items():
        found = row.get("predictions") or row.get("detections") or []
        text = ", ".join(f"{f['label']} {f['score']:.2f}" for f in found[:3]) or "nothing"
        print(f"  {Path(source).name:22} {row['payload_bytes'] or 0:6} B  {row['latency_ms']['total']:6.1f} ms  {text}")


def main() -> int:
    """Runs the demo and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where photographs, results and pictures go")
    parser.add_argument("--models", default="efficientnet-lite0,detector", help="default bundles to run, comma separated")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    folder = photos(args.out)
    summaries = {}
    for model in args.models.split(","):
        summaries[model] = stream(model, folder, args.out)
        show(args.out / f"{model}.jsonl")
    print(f"\nannotated pictures: {args.out}/")
    first, *others = summaries.values()
    print(json.dumps(first | {"others": {str(s["model"]): s for s in others}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
