"""From which score on our detector's boxes can be believed: what the client's probes of the prefilter are judged by.

``python -m splitters.training.prefilter.sure --data DIR [--cache teacher.npz]`` looks at photos kept out of the detector's training
and writes ``prefilter_sure.json`` beside the weights, with their sha256: other weights need it measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from splitters.bundle import sha256_file
from splitters.tasks.decoding.boxes import Detections, Pixels, iou_matrix
from splitters.tasks.labels.coco_classes import INDEX_OF
from splitters.training.detector.data import Example, build_examples, held_out
from splitters.zoo.detector.network import INPUT_SIZE_PX, WEIGHTS, PhotoDetector, load_detector
from splitters.zoo.prefilter.export import SURE_OF_DETECTOR
from splitters.zoo.prefilter.network import CATEGORY_IDS
from splitters.zoo.prefilter.promise import PRECISION, SURE, score_at_precision

log = logging.getLogger(__name__)
_IOU = 0.5
_TEACHER_SURE = 0.5


def judged(detector: Callable[[Pixels], Detections], example: Example) -> list[tuple[float, bool]]:
    """Score of each box of a class that the prefilter knows, and whether an object of its class lies there."""
    rows = []
    sure = example.boxes[example.boxes[:, 5] >= _TEACHER_SURE]
    for box, score, category in zip(*detector(example.image), strict=True):
        if int(category) in CATEGORY_IDS:
            same = sure[sure[:, 4] == INDEX_OF[int(category)], :4]
            rows.append((float(score), bool(len(same)) and float(iou_matrix(box[None], same).max()) >= _IOU))
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with coco/, photos/, weights/ and the rest")
    parser.add_argument("--cache", type=Path, default=Path("runs/teacher.npz"), help="the teacher's boxes; made where absent")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=SURE_OF_DETECTOR)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    detector = PhotoDetector(load_detector(args.weights))
    examples = build_examples(args.data, args.cache, longest_px=INPUT_SIZE_PX)
    chosen = [e for e, out in zip(examples, held_out(examples), strict=True) if out]
    rows = [row for example in chosen for row in judged(detector, example)]
    scores, right = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], bool)
    score = score_at_precision(scores, right) or SURE
    told = {
        "score": round(score, 4), "precision_asked": PRECISION, "precision": round(float(right[scores >= score].mean()), 4),
        "boxes": int((scores >= score).sum()), "photos": len(chosen), "weights_sha256": sha256_file(args.weights),
        "command": "python -m splitters.training.prefilter.sure --data $HEADTAIL_DATA",
    }  # fmt: skip
    log.info("%d boxes score %.3f and more; of them %.2f are right", told["boxes"], score, told["precision"])
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
