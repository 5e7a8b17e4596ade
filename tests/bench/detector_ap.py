"""AP of our detector on COCO val photos, beside FastestDet and YOLOX-nano on the same photos with the same evaluator.

``python -m tests.bench.detector_ap --data $HEADTAIL_DATA [--weights FILE]``; takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from splitters.evaluation.judging.detection import DetectionScores, interval, load_truth, score
from splitters.runtime.sessions import open_session
from splitters.tasks.decoding.boxes import Detections, Pixels, read_rgb, select
from splitters.tasks.labels.coco_classes import CATEGORY_IDS, NAMES
from splitters.training.detector.data import HELD_OUT_EVERY, LABELLED
from splitters.zoo.detector.network import WEIGHTS, PhotoDetector, load_detector
from splitters.zoo.onnx_detectors import Detector, YoloxNano

SHOWN = ("person", "car", "bicycle", "bus", "dog", "cat", "chair", "bottle")


class FastestDet:
    """FastestDet (github.com/dog-qiuqiu/FastestDet) at its own 352 px: stretched to a square, BGR, 0..1.

    Args:
        path: the ONNX file.
        score_min: detections below are not returned.
        threads: of ONNX Runtime.
    """

    size_px = 352

    def __init__(self, path: Path, *, score_min: float = 0.01, threads: int = 1) -> None:
        self._session = open_session(path, threads=threads)
        self._input = self._session.get_inputs()[0].name
        self._score_min = score_min

    def __call__(self, image: Pixels) -> Detections:
        """Detections of one RGB image, boxes in its own pixels."""
        import cv2

        height, width = image.shape[:2]
        square = cv2.resize(image, (self.size_px, self.size_px), interpolation=cv2.INTER_LINEAR)[..., ::-1]
        x = np.ascontiguousarray(square.transpose(2, 0, 1)[None].astype(np.float32) / 255)
        raw = np.asarray(self._session.run(None, {self._input: x})[0][0], np.float32)
        side = raw.shape[1]
        y_grid, x_grid = np.mgrid[:side, :side]
        centre = np.stack([(np.tanh(raw[1]) + x_grid) / side, (np.tanh(raw[2]) + y_grid) / side])
        half = 1 / (1 + np.exp(-raw[3:5])) / 2
        unit = np.concatenate([centre - half, centre + half]).reshape(4, -1).T
        boxes = np.clip(unit * [width, height, width, height], 0, [width, height, width, height]).astype(np.float32)
        scores = (raw[:1] ** 0.6 * raw[5:] ** 0.4).reshape(80, -1).T
        return select(boxes, scores.astype(np.float32), CATEGORY_IDS, score_min=self._score_min, iou=0.45)


def look(detector: Detector, truth: object, images: Path, every: int = 1) -> tuple[DetectionScores, float]:
    """Scores of one detector on every n-th photo, and its median ms a photo, preprocessing and suppression included."""
    found, spent = {}, []
    for entry in truth.loadImgs(truth.getImgIds())[::every]:  # type: ignore[attr-defined]
        image = read_rgb(images / entry["file_name"])
        before = time.perf_counter()
        found[entry["id"]] = detector(image)
        spent.append((time.perf_counter() - before) * 1e3)
    return score(truth, found), float(np.median(spent))


def row(scores: DetectionScores, draws: int) -> dict[str, object]:
    """The figures of one detector as plain JSON types."""
    table = scores.table()
    whole = scores.bootstrap(draws)
    ids = {name: int(c) for name, c in zip(NAMES, CATEGORY_IDS, strict=True)}
    result: dict[str, object] = {
        "ap": round(float(np.nanmean(table)), 4), "ap_95": [round(v, 4) for v in interval(whole[:, 0])],
        "ap50": round(float(np.nanmean(table[:, 0])), 4), "ap50_95": [round(v, 4) for v in interval(whole[:, 1])],
    }  # fmt: skip
    for name in SHOWN:
        line = table[scores.category_ids.index(ids[name])]
        drawn = scores.bootstrap(draws, category_ids=[ids[name]])[:, 1]
        result[name] = {"ap": round(float(line.mean()), 4), "ap50": round(float(line[0]), 4),
                        "ap50_95": [round(v, 4) for v in interval(drawn)]}  # fmt: skip
    return result


def held_out(detector: Detector, data: Path) -> dict[str, dict[str, float]]:
    """AP and AP50 on the training photos that ``detector_loop --hold-out`` leaves out: what a run may be judged by."""
    figures = {}
    for folder, every in HELD_OUT_EVERY.items():
        truth = load_truth(data / folder / "instances.json")
        scores, _ = look(detector, truth, data / folder / "images", every)
        labelled = sorted(LABELLED[folder] & set(scores.category_ids))
        figures[folder] = {
            "photos": len(scores.image_ids),
            "ap": round(scores.ap(labelled), 4),
            "ap50": round(scores.ap50(labelled), 4),
        }
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--only-ours", action="store_true", help="leave the published detectors out")
    parser.add_argument("--draws", type=int, default=200, help="bootstrap draws over photos")
    parser.add_argument("--held-out", action="store_true", help="ours alone, on the training photos kept out of the training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(args.data)
    if args.held_out:
        figures = held_out(PhotoDetector(load_detector(args.weights)), data)
        print(json.dumps({"bench": "detector_ap", "weights": str(args.weights), "held_out": figures}))
        return
    truth = load_truth(data / "coco/val/instances.json")
    detectors: dict[str, Detector] = {"ours": PhotoDetector(load_detector(args.weights))}
    if not args.only_ours:
        detectors["FastestDet"] = FastestDet(data / "weights/FastestDet.onnx")
        detectors["YOLOX-nano"] = YoloxNano(data / "weights/yolox_nano_416.onnx")
    report = {}
    for name, detector in detectors.items():
        scores, ms = look(detector, truth, data / "coco/val/images")
        report[name] = {**row(scores, args.draws), "ms_median": round(ms, 1)}
        print(name, json.dumps(report[name]))
    print(json.dumps({"bench": "detector_ap", "photos": len(truth.getImgIds()), "detectors": report}))


if __name__ == "__main__":
    main()
