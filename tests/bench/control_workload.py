"""Measures what the control bench needs of a bundle, and writes it as one workload file.

    splitters evaluate BUNDLE --images PHOTOS --labels LABELS.json --against jpeg --report report.json
    python -m tests.bench.control_workload --bundle BUNDLE --report report.json --images PHOTOS --labels LABELS.json --out w.json

From the report come the operating points and the JPEG settings (bytes and accuracy, on the same photos); measured here
are the local model's accuracy and time, and the server's times for a tail and for the whole model. Classification only.
The report holds mean JPEG sizes; their 95th percentile is taken to be 1.4 times the mean.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort

from splitters.bundle import Bundle, open_bundle
from splitters.preprocess import preprocess

_P95_OF_MEAN = 1.4


def quantiles(ms: list[float]) -> dict[str, float]:
    return {"p50": round(float(np.median(ms)), 3), "p95": round(float(np.quantile(ms, 0.95)), 3)}


def local(bundle: Bundle, images: Path, labels: dict[str, int], limit: int | None) -> dict[str, object] | None:
    model = bundle.manifest.local
    if model is None:
        return None
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(bundle.part_path(model.path)), options, providers=["CPUExecutionProvider"])
    files = sorted(f for f in images.rglob("*") if f.name in labels)
    files = [files[int(i * len(files) / limit)] for i in range(limit)] if limit and limit < len(files) else files
    hits, ms = 0, []
    for file in files:
        frame = cv2.imread(str(file))
        assert frame is not None
        begin = time.perf_counter()
        (logits, *_) = session.run(None, {"image": preprocess(frame.astype(np.uint8, copy=False), model.preprocess)})
        ms.append((time.perf_counter() - begin) * 1e3)
        hits += int(np.argmax(logits)) == labels[file.name]
    return {"accuracy": hits / len(files), "ms": quantiles(ms)}


def server(bundle: Bundle) -> dict[str, object]:
    from splitters.tails import load_tail  # torch: only when it is needed

    tail = load_tail(bundle)
    latents = [np.zeros((1, *shape), np.float32) for shape in bundle.manifest.latent_shape]
    size = bundle.manifest.preprocess.size_px
    picture = np.zeros((*size, 3), np.uint8)
    tail_ms, whole_ms = [], []
    for _ in range(12):
        begin = time.perf_counter()
        tail.run(latents, [(size[1], size[0])])
        tail_ms.append((time.perf_counter() - begin) * 1e3)
        if tail.takes_images:
            begin = time.perf_counter()
            tail.run_images([picture], [(size[1], size[0])])
            whole_ms.append((time.perf_counter() - begin) * 1e3)
    return {"tail_ms": quantiles(tail_ms[2:]), "whole_ms": quantiles(whole_ms[2:] or tail_ms[2:])}


def offloads(report: dict[str, object]) -> list[dict[str, object]]:
    found = []
    baselines, encode_ms = report["baselines"], report["encode_ms"]
    assert isinstance(baselines, dict)
    assert isinstance(encode_ms, dict)
    for codec, rows in baselines.items():
        if codec.lower() not in ("jpeg", "webp"):
            continue
        for label, size, accuracy in rows:
            quality, *side = (int(n) for n in re.findall(r"\d+", label))
            ms = float(encode_ms.get(codec, 0.5))
            found.append({
                "format": codec.lower(), "quality": quality, "size_px": side[0] if side else 0, "accuracy": accuracy,
                "payload_bytes": {"p50": size, "p95": _P95_OF_MEAN * size}, "encode_ms": {"p50": ms, "p95": 1.3 * ms},
            })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True, help="what `splitters evaluate --report` wrote")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bundle, report = open_bundle(args.bundle), json.loads(args.report.read_text())
    workload = {
        "name": report["model"],
        "points": [{k: v for k, v in p.items() if k != "gap"} for p in report["points"]],
        "offloads": offloads(report),
        "local": local(bundle, args.images, json.loads(args.labels.read_text()), args.limit),
        "server": server(bundle),
        "result_bytes": 180,
    }
    args.out.write_text(json.dumps(workload, indent=1) + "\n")
    print(
        json.dumps(
            {
                "points": len(report["points"]),
                "offloads": len(workload["offloads"]),
                "local": workload["local"],
                "server": workload["server"],
            }
        )
    )


if __name__ == "__main__":
    main()
