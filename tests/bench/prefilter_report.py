"""What the prefilter is worth on what it never saw: COCO val photos, and the car-park video split by time.

``python -m tests.bench.prefilter_report --data $HEADTAIL_DATA [--weights FILE] [--figure deploy/figures/prefilter.png]``

In the video the first half calibrates and the second half tests; positive is a frame where YOLOX-nano is confident (--sure) of a
person, bicycle or car. Takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch

from splitters.evaluation.detection import load_truth
from splitters.evaluation.prefilter import Array, draw_curves, passage_scores, passages, roc_auc
from splitters.models.boxes import Pixels, read_rgb
from splitters.models.detector import PREPROCESS
from splitters.models.efficientnet_lite import load_efficientnet_lite0
from splitters.models.onnx_detectors import YoloxNano
from splitters.models.prefilter import WEIGHTS, InterestScore, columns_of, load_prefilter
from splitters.models.prefilter_promise import calibrate
from splitters.preprocess import preprocess

Score = Callable[[Pixels], float]


def scorer(weights: Path, interest: list[str]) -> Score:
    """A function from a BGR frame to the prefilter's score."""
    model, ids = load_prefilter(weights)
    stem, filt = load_efficientnet_lite0().stem, InterestScore(model, columns_of(interest, ids))

    @torch.inference_mode()
    def run(frame: Pixels) -> float:
        return float(filt(stem(torch.from_numpy(preprocess(frame, PREPROCESS))))[0, -1])

    return run


def frames(path: Path) -> Iterator[Pixels]:
    """All frames of a video, BGR."""
    video = cv2.VideoCapture(str(path))
    while True:
        good, frame = video.read()
        if not good:
            return
        yield frame.astype(np.uint8)


def coco(data: Path, score: Score, category_ids: list[int], side_min: float) -> tuple[Array, np.ndarray]:
    """Scores and truth of the COCO val photos; ``side_min`` is a box's least side as a share of the photo's longest."""
    truth = load_truth(data / "coco/val/instances.json")
    scores, positive = [], []
    for entry in truth.loadImgs(truth.getImgIds()):
        scores.append(score(np.ascontiguousarray(read_rgb(data / "coco/val/images" / entry["file_name"])[..., ::-1])))
        boxes = truth.loadAnns(truth.getAnnIds(imgIds=[entry["id"]], catIds=category_ids))
        least = side_min * max(entry["width"], entry["height"])
        positive.append(any(max(a["bbox"][2:]) >= least for a in boxes))
    return np.asarray(scores), np.asarray(positive)


def car_park(data: Path, score: Score, recall: float, sure: float) -> tuple[dict[str, object], Array, np.ndarray]:
    """Calibrated on the first half of the video, tested on the second."""
    teacher = YoloxNano(data / "weights/yolox_nano_416.onnx", score_min=0.1)
    scores, best = [], []
    for frame in frames(data / "video/person-bicycle-car-detection.mp4"):
        scores.append(score(frame))
        found = teacher(np.ascontiguousarray(frame[..., ::-1]))
        best.append(max((float(s) for s, c in zip(found.scores, found.class_ids, strict=True) if c in (1, 2, 3)), default=0.0))
    values, confidence = np.asarray(scores), np.asarray(best)
    positive, half = confidence >= sure, len(scores) // 2
    runs = passages(positive[:half], gap=12)
    promise = calibrate(passage_scores(values[:half], runs, recall), recall)
    test, is_positive = values[half:], positive[half:]
    sent = test >= promise.threshold
    reached = np.sort(test[is_positive])[int(np.floor((1 - recall) * is_positive.sum() + 1e-9))]  # by hindsight
    unclear = (confidence[half:] > 0.1) & ~is_positive
    report: dict[str, object] = {
        "frames": len(scores), "calibration": promise.to_json(), "calibration_positive_frames": int(positive[:half].sum()),
        "test_positive_frames": int(is_positive.sum()), "test_passages": len(passages(is_positive, gap=12)),
        "test_recall_of_frames": round(float(sent[is_positive].mean()), 4),
        "test_passages_seen": sum(bool(sent[r].any()) for r in passages(is_positive, gap=12)),
        "test_frames_stopped": round(float((~sent).mean()), 4),
        "test_empty_frames_stopped": round(float((~sent)[~is_positive].mean()), 4),
        "stopped_at_that_recall_by_hindsight": round(float((test < reached).mean()), 4),
        "roc_auc": round(roc_auc(test, is_positive), 4),
        "roc_auc_without_unclear_frames": round(roc_auc(test[~unclear], is_positive[~unclear]), 4),
        "unclear_frames": int(unclear.sum()), "roc_auc_whole_video": round(roc_auc(values, positive), 4),
    }  # fmt: skip
    return report, test, is_positive


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--sure", type=float, default=0.5, help="YOLOX-nano's confidence from which a frame is positive")
    parser.add_argument("--figure", type=Path, help="write ROC and PR curves there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(args.data)
    person = coco(data, scorer(args.weights, ["person"]), [1], 0.05)
    everything = coco(data, scorer(args.weights, ["person"]), [1], 0.0)
    park, test, is_positive = car_park(data, scorer(args.weights, ["person", "bicycle", "car"]), args.recall, args.sure)
    report = {
        "coco_val_person": {"photos": len(person[0]), "positive": int(person[1].sum()), "roc_auc": round(roc_auc(*person), 4),
                            "roc_auc_any_size": round(roc_auc(*everything), 4)},
        "car_park": park,
    }  # fmt: skip
    if args.figure:
        draw_curves({"COCO val, person": person, "car park, second half": (test, is_positive)}, args.figure)
    print(json.dumps({"bench": "prefilter_report", **report}))


if __name__ == "__main__":
    main()
