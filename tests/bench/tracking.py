"""Boxes carried along between answers, beside boxes that stay where they were: how well they fit 1 to 10 frames later.

``python -m tests.bench.tracking --data $HEADTAIL_DATA [--from-frame 400]``

Every tenth frame of vtest.avi YOLOX-nano's boxes (.5 and more) are given to the tracker; k frames later each is compared with the
boxes YOLOX-nano finds there (.3 and more), paired one to one within a class for the largest total overlap. A box that the tracker
gave up counts as 0, and so does one whose object the detector does not see any more. The tracker's settings were chosen on the
first 400 frames. Takes about a minute; ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import cv2
import numpy as np

from edge_client.gates.tracking import BoxTracker
from protos.messages import Box
from splitters.evaluation.gating.scene import read_video
from splitters.tasks.decoding.boxes import Detections, iou_matrix
from splitters.zoo.onnx_detectors import YoloxNano

LATER, EVERY, CLEAR, SEEN = 10, 10, 0.5, 0.3


def overlaps(boxes: list[Box], there: Detections) -> list[float]:
    """Overlap of every box with its partner, 0 where it has none."""
    from scipy.optimize import linear_sum_assignment

    if not boxes or not len(there.boxes_px):
        return [0.0] * len(boxes)
    table = iou_matrix(np.array([b.box_px for b in boxes], np.float32), there.boxes_px)
    table = table * (np.array([b.class_id for b in boxes])[:, None] == there.class_ids[None])
    rows, columns = linear_sum_assignment(-table)
    found = np.zeros(len(boxes))
    found[rows] = table[rows, columns]
    return found.tolist()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--from-frame", type=int, default=400)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    teacher = YoloxNano(Path(args.data) / "weights/yolox_nano_416.onnx", score_min=SEEN)
    frames = list(read_video(Path(args.data) / "video/vtest.avi")[0])[args.from_frame :]
    found = [teacher(np.ascontiguousarray(f[..., ::-1])) for f in frames]
    carried: list[list[float]] = [[] for _ in range(LATER)]
    still: list[list[float]] = [[] for _ in range(LATER)]
    kept: list[list[float]] = [[] for _ in range(LATER)]
    spent, counts = [], []
    for start in range(0, len(frames) - LATER, EVERY):
        rows = [(b, s, c) for b, s, c in zip(*found[start], strict=True) if s >= CLEAR]
        boxes = [Box(class_id=int(c), score=float(s), box_px=(b[0], b[1], b[2], b[3])) for b, s, c in rows]
        if not boxes:
            continue
        tracker = BoxTracker()
        tracker.restart(frames[start], boxes)
        counts.append(len(boxes))
        for k in range(LATER):
            before = time.perf_counter()
            moved = list(tracker.advance(frames[start + k + 1]))
            spent.append((time.perf_counter() - before) * 1e3)
            there = found[start + k + 1]
            carried[k] += overlaps(moved, there) + [0.0] * (len(boxes) - len(moved))
            still[k] += overlaps(boxes, there)
            kept[k].append(len(moved) / len(boxes))
    report = {
        "bench": "tracking", "frames": len(frames), "starts": len(counts), "boxes_mean": round(float(np.mean(counts)), 2),
        "iou_carried": [round(float(np.mean(v)), 4) for v in carried],
        "iou_not_moved": [round(float(np.mean(v)), 4) for v in still],
        "iou_carried_mean": round(float(np.mean([np.mean(v) for v in carried])), 4),
        "iou_not_moved_mean": round(float(np.mean([np.mean(v) for v in still])), 4),
        "kept": [round(float(np.mean(v)), 4) for v in kept],
        "ms_p50": round(float(np.median(spent)), 2), "ms_p95": round(float(np.percentile(spent, 95)), 2),
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
