"""YOLOX-nano cut in two, served by edge-server and driven by edge-client: its AP beside the uncut model's.

    python -m tests.bench.yolox_served --data ../shared/data [--bundle DIR] [--points 8 4]

1. cuts the ONNX file (``splitters cut onnx:… --output yolox``) unless --bundle names a bundle cut before;
2. uncut: the ONNX file itself, in ONNX Runtime, with the bundle's preprocessing, decoding and suppression;
3. float: the bundle's two halves with nothing between them;
4. served: a real ``edge-server`` and a real ``edge-client --camera DIR --operating-point N`` over loopback, with the
   quantised, compressed latent.

AP is pycocotools' over the 201 photographs of coco/val. Ends with one JSON line; exit 1 if float is more than 0.002 or
8 bits more than 0.01 from the uncut model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from protos.messages import Detection
from splitters.bundle import Bundle, open_bundle
from splitters.runtime.tail import load_tail
from splitters.tasks.base import open_task
from splitters.tasks.preprocess import preprocess
from tests.fakes.server_running import child

AT = "node_conv2d_9"


def average_precision(truth: Any, found: list[dict[str, Any]]) -> tuple[float, float]:
    """(AP, AP50) over the truth's photographs."""
    if not found:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(truth, truth.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0]), float(run.stats[1])


def rows(image_id: int, answer: Detection) -> list[dict[str, Any]]:
    """An answer as COCO results."""
    return [
        {"image_id": image_id, "category_id": b.class_id, "score": b.score,
         "bbox": [b.box_px[0], b.box_px[1], b.box_px[2] - b.box_px[0], b.box_px[3] - b.box_px[1]]}
        for b in answer.boxes
    ]  # fmt: skip


def in_process(
    bundle: Bundle, truth: Any, images: Path, answer: Callable[[Any, tuple[int, int]], Detection]
) -> list[dict[str, Any]]:
    """Results of a function from an input tensor and the source's size, over all photographs."""
    found = []
    for entry in truth.loadImgs(truth.getImgIds()):
        frame = cv2.imread(str(images / entry["file_name"]))
        found += rows(entry["id"], answer(preprocess(frame, bundle.manifest.preprocess), (frame.shape[1], frame.shape[0])))
    return found


def served(bundle: Bundle, point: int, truth: Any, images: Path, folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Results and payload bytes of a real server and client at one operating point."""
    ids = {entry["file_name"]: entry["id"] for entry in truth.loadImgs(truth.getImgIds())}
    results = folder / f"results-{point}.jsonl"
    with child(folder, bundle.path, arguments=("--tail-threads", "1", "--log-level", "warning")) as server:
        subprocess.run(
            [sys.executable, "-m", "edge_client.cli", "--camera", str(images), "--server", server.address,
             "--operating-point", str(point), "--change-gate", "off", "--output", str(results)],
            check=True, env={**os.environ, "HEADTAIL_CACHE": str(folder / "cache")},
        )  # fmt: skip
    found, sizes = [], []
    for line in map(json.loads, results.read_text().splitlines()):
        if line["outcome"] != "result":
            raise RuntimeError(f"{line['source']}: {line['outcome']} {line.get('reason')}")
        if line["operating_point"] != point:
            raise RuntimeError(f"{line['source']} was sent at point {line['operating_point']}, not {point}")
        sizes.append(line["payload_bytes"])
        for d in line["detections"]:
            x1, y1, x2, y2 = d["box_px"]
            found.append({"image_id": ids[Path(line["source"]).name], "category_id": d["class_id"], "score": d["score"],
                          "bbox": [x1, y1, x2 - x1, y2 - y1]})  # fmt: skip
    return found, sizes


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--bundle", type=Path, help="a bundle of this model, cut before")
    parser.add_argument("--at", default=AT, help="where to cut (default: %(default)s)")
    parser.add_argument("--points", type=int, nargs="+", default=[8], help="bits to serve at (default: 8)")
    args = parser.parse_args()
    data = Path(args.data)
    images, model = data / "coco/val/images", data / "weights/yolox_nano_416.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "coco/val/instances.json"))
    with tempfile.TemporaryDirectory(prefix="headtail-yolox-") as name:
        folder = Path(name)
        path = args.bundle or folder / "bundle"
        if args.bundle is None:
            subprocess.run(
                [sys.executable, "-m", "splitters.cli", "cut", f"onnx:{model}", "--at", args.at, "--out", str(path), "--output",
                 "yolox", "--labels", "coco", "--photos", str(data / "coco/train/images"), "--score-min", "0.01",
                 "--name", "yolox-nano",
                 "--licence", "Apache-2.0"],
                check=True,
            )  # fmt: skip
        bundle = open_bundle(path)
        post = open_task(bundle.manifest).decode
        uncut, head, tail = (
            ort.InferenceSession(str(model)),
            ort.InferenceSession(str(bundle.part_path("device/stem.onnx"))),
            load_tail(bundle),
        )
        figures: dict[str, dict[str, float]] = {}

        def note(what: str, found: list[dict[str, Any]], payload: list[int] | None = None) -> None:
            ap, ap50 = average_precision(truth, found)
            figures[what] = {"ap": round(ap, 4), "ap50": round(ap50, 4)}
            if payload:
                figures[what] |= {
                    "payload_p50_bytes": float(np.median(payload)),
                    "payload_p95_bytes": float(np.percentile(payload, 95)),
                }
            print(
                f"{what:14} AP {ap:.4f}  AP50 {ap50:.4f}" + (f"  payload p50 {np.median(payload):,.0f} B" if payload else ""),
                flush=True,
            )

        note("uncut", in_process(bundle, truth, images, lambda x, size: post(uncut.run(None, {"images": x}), [size])[0]))  # type: ignore[arg-type,return-value]
        note("float", in_process(bundle, truth, images, lambda x, size: tail.run(head.run(None, {"image": x}), [size])[0]))  # type: ignore[arg-type,return-value]
        for bits in args.points:
            point = next(p.id for p in bundle.points if p.bits == bits)
            note(f"served {bits} bits", *served(bundle, point, truth, images, folder))
    gap = {what: round(row["ap"] - figures["uncut"]["ap"], 4) for what, row in figures.items()}
    print(json.dumps({"bench": "yolox_served", "photos": len(truth.getImgIds()), "at": args.at, "figures": figures, "gap": gap}))
    return int(abs(gap["float"]) > 0.002 or abs(gap.get("served 8 bits", 0.0)) > 0.01)


if __name__ == "__main__":
    sys.exit(main())
