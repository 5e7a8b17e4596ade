"""What the detector's plain latent costs and keeps: bytes and AP of every operating point, beside the uncut detector and JPEG.

``python -m tests.bench.detector_latent --data $HEADTAIL_DATA [--bundle DIR] [--limit N]``; real payloads, paired differences, and
detections from a score of 0.01 on (the bundle itself answers from 0.25 on). Some three minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from protos.messages import Answer, Detection
from splitters.bundle import open_bundle
from splitters.codec import codec_from_spec
from splitters.evaluation.detection import DetectionScores, interval, load_truth, score
from splitters.evaluation.image_codecs import Setting
from splitters.evaluation.measure import load_photos, run_image_codec, run_points, run_whole
from splitters.models.boxes import Detections
from splitters.models.detector_export import export_plain
from splitters.tails import load_tail


def scores_of(truth: object, ids: list[int], answers: list[Answer]) -> DetectionScores:
    """The answers as matched detections."""
    found = {}
    for image_id, answer in zip(ids, answers, strict=True):
        assert isinstance(answer, Detection)
        table = np.asarray([(*b.box_px, b.score, b.class_id) for b in answer.boxes], np.float32).reshape(-1, 6)
        found[image_id] = Detections(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))
    return score(truth, found)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--bundle", type=Path, help="default: the plain detector, exported now")
    parser.add_argument("--limit", type=int, default=201, help="photos at most")
    parser.add_argument("--draws", type=int, default=100, help="bootstrap draws over photos")
    parser.add_argument("--jpeg", default="95,75,50", help="JPEG qualities beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(args.data)
    truth = load_truth(data / "coco/val/instances.json")
    entries = truth.loadImgs(sorted(truth.getImgIds()))[: args.limit]
    ids = [e["id"] for e in entries]
    with tempfile.TemporaryDirectory() as folder:
        bundle = open_bundle(args.bundle) if args.bundle else export_plain(Path(folder) / "detector")
        loose = {**bundle.manifest.postprocess, "score_min": 0.01, "iou": 0.6}
        bundle = replace(bundle, manifest=replace(bundle.manifest, postprocess=loose))
        photos = load_photos([data / "coco/val/images" / e["file_name"] for e in entries], bundle)
        codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
        tail = load_tail(bundle)
        whole = scores_of(truth, ids, run_whole(tail, photos))
        base = whole.bootstrap(args.draws)[:, 0]
        rows = [{"what": "uncut", "ap": round(whole.ap(), 4), "ap50": round(whole.ap50(), 4)}]
        measured = run_points(bundle, codec, tail, photos, bundle.points, tick=lambda _: None)
        every = {f"point {p.id}: {p.bits:g} bits": measured[p.id] for p in bundle.points}
        for quality in filter(None, args.jpeg.split(",")):
            setting = Setting(codec="jpeg", quality=int(quality), size_px=bundle.manifest.preprocess.size_px[0])
            every[f"JPEG {quality}"] = run_image_codec(tail, photos, setting)
        for name, found in every.items():
            scores = scores_of(truth, ids, found.answers)
            low, high = interval(scores.bootstrap(args.draws)[:, 0] - base)
            rows.append(
                {
                    "what": name, "bytes_mean": round(float(found.sizes.mean())), "ap": round(scores.ap(), 4),
                    "ap50": round(scores.ap50(), 4), "ap_minus_uncut": round(scores.ap() - whole.ap(), 4),
                    "ap_minus_uncut_95": [round(low, 4), round(high, 4)],
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"bench": "detector_latent", "photos": len(ids), "rows": rows}))


if __name__ == "__main__":
    main()
