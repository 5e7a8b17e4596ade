"""``make demo``: head and tail in two processes, on real photographs that a Python package ships.

    python -m deploy.demo --out build/demo

Exports the bundles, starts ``edge-server`` as a child of ``edge-client`` and streams the photographs through both, once for
the classifier and once for the detector: YOLOX-nano with our bottleneck where its published weights can be had (a network, or
``HEADTAIL_WEIGHTS``), else the small detector of our own. Ends with one JSON line; annotated pictures lie in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Photographs that ship inside scikit-image's wheel (public domain or CC0, see its data/README.txt).
PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")
LOOPS = 6
# Without a deadline a client takes the most accurate point. This one loses half an AP point at a third of the bytes.
POINTS = {"yolox-nano": ("--operating-point", "4")}


_BEGAN_S = time.monotonic()


def step(what: str) -> None:
    """Says what is done next, and how long the demo has been running."""
    print(f"[{time.monotonic() - _BEGAN_S:4.0f} s] {what}", flush=True)


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
        "--save-video", str(out / model), "--json", *POINTS.get(model, ()),
    ]  # fmt: skip
    print(f"\n$ edge-client {' '.join(command[3:])}\n", flush=True)
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = run.stdout.strip().split("\n")
    print("\n".join(lines[:-1]))
    if run.returncode:
        sys.exit(run.returncode)
    summary: dict[str, Any] = json.loads(lines[-1])
    return summary


def detector() -> str:
    """The better detector where its weights can be had, else our own small one; says which, and why."""
    from protos.errors import HeadtailError
    from splitters.zoo.fetch import fetch
    from splitters.zoo.published import find

    wanted = find("yolox-nano")
    try:
        path = fetch(wanted)
    except HeadtailError as error:
        print(f"detector: our own small one, which is weak. The weights of {wanted.name} are not to be had: {error.message}")
        return "detector"
    print(f"detector: {wanted.name} with our bottleneck; weights {path}, {wanted.licence}, from {wanted.repository}")
    return wanted.name


def show(results: Path, folder: Path, model: str) -> None:
    """Prints what was seen in each photograph, and the bytes beside those of the model's input as JPEG and H.264."""
    seen: dict[str, dict[str, Any]] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        seen.setdefault(str(row["source"]), row)
    print(f"\n  {'photograph':22} {'ours':>7} {'JPEG 75':>8} {'H.264':>7}   bytes; H.264 as one key frame, veryfast, CRF 28")
    for source, row in seen.items():
        jpeg, h264 = others(folder / Path(source).name, model)
        found = row.get("predictions") or row.get("detections") or []
        text = ", ".join(f"{f['label']} {f['score']:.2f}" for f in found[:3]) or "nothing"
        print(f"  {Path(source).name:22} {row['payload_bytes'] or 0:7,} {jpeg:8,} {h264:7,}   {text}")


def others(photo: Path, model: str) -> tuple[int, int]:
    """Bytes of the model's input picture as JPEG of quality 75, and as one H.264 key frame."""
    from splitters.bundle import exported_path, open_bundle
    from splitters.evaluation.image_codecs import Setting, encode
    from splitters.evaluation.video.codecs import VideoSetting, code_clip
    from splitters.runtime.pictures import read_picture
    from splitters.tasks.preprocess import input_image

    picture = input_image(read_picture(photo), open_bundle(exported_path(model)).manifest.preprocess)
    jpeg = encode(picture, Setting(codec="jpeg", quality=75, size_px=1 << 14))
    return len(jpeg), int(code_clip([picture], VideoSetting(codec="h264", crf=28, share=1.0), 10.0).sizes[0])


def main() -> int:
    """Runs the demo and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="where photographs, results and pictures go")
    parser.add_argument("--models", default="", help="bundles to run, comma separated (default: a classifier and a detector)")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    step("photographs that come with scikit-image")
    folder = photos(args.out)
    step("weights of the detector: fetched the first time")
    models = args.models.split(",") if args.models else ["efficientnet-lite0", detector()]
    summaries = {}
    for model in models:
        step(f"{model}: exported the first time, then head and tail in two processes")
        summaries[model] = stream(model, folder, args.out)
        step(f"{model}: what it saw, in how many bytes")
        show(args.out / f"{model}.jsonl", folder, model)
    print(f"\nannotated pictures: {args.out}/")
    first, *others = summaries.values()
    print(json.dumps(first | {"others": {str(s["model"]): s for s in others}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
