"""Is head ∘ tail the same function, and what do 8 bits cost? On real photographs.

    python -m tests.bench.split_equality --data ../shared/data

Runs the exported plain EfficientNet-Lite0 bundle as it ships (ONNX head, codec, torch tail) beside the whole network on
imagenette's val photos: the largest difference of logits without quantisation, top-1 (1000-way) of the whole model, the
unquantised split and every plain operating point, with the real payload bytes. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import torch

from splitters.codec import codec_from_spec
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import preprocess
from splitters.zoo.defaults import PLAIN, export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--photos", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    root = args.data / "imagenette160"
    index = json.loads((root / "imagenet_class_index.json").read_text())
    files = sorted((root / "val").rglob("*.JPEG"))[: args.photos]
    with tempfile.TemporaryDirectory() as folder:
        bundle = export(PLAIN, Path(folder) / "bundle")
        codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
        head = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.stem)))
        tail = load_tail(bundle)
    hits = {"whole": 0, "split": 0} | {f"bits{p.bits:.0f}": 0 for p in bundle.points}
    payload = {f"bits{p.bits:.0f}": [] for p in bundle.points}
    worst = 0.0
    for file in files:
        image = preprocess(cv2.imread(str(file)), bundle.manifest.preprocess)
        latent = head.run(None, {"image": image})[0]
        truth = index[file.parent.name]
        whole, split = tail._whole([image])[0], tail._tail([latent])[0]
        worst = max(worst, float(np.abs(whole - split).max()))
        hits["whole"] += int(whole.argmax() == truth)
        hits["split"] += int(split.argmax() == truth)
        for point in bundle.points:
            layers = codec.encode(codec.quantise([latent[0]], point.codec_point))
            decoded = codec.dequantise(codec.decode(layers))[0][None]
            hits[f"bits{point.bits:.0f}"] += int(tail._tail([decoded])[0].argmax() == truth)
            payload[f"bits{point.bits:.0f}"].append(sum(map(len, layers)))
    top1 = {name: round(count / len(files), 4) for name, count in hits.items()}
    for name, value in top1.items():
        print(f"{name:8} top-1 {value:.4f}" + (f"  payload p50 {np.median(payload[name]):.0f} B" if name in payload else ""))
    print(f"largest difference of logits, head ∘ tail against whole, {len(files)} photos: {worst:.2e}")
    result = {"photos": len(files), "max_abs_logit_difference": worst, "top1": top1}
    print(json.dumps(result | {"payload_bytes_p50": {k: float(np.median(v)) for k, v in payload.items()}}))


if __name__ == "__main__":
    main()
