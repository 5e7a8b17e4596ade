"""Cuts torchvision's detectors inside their backbones and compares them with the uncut ones. One JSON line at the end.

    python -m tests.bench.cut_detectors [--photo FILE] [--only NAME ...]

On a real photograph, with random weights (see tests.bench.cut_zoo) and no score threshold: all tensors before
suppression within 1e-4 of their deviation, and the same boxes (IoU ≥ .999), labels and scores (≤ 1e-3), at least 20.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from splitters.cutting.rcnn import detectors as rcnn
from tests.bench.cut_zoo import randomise
from tests.fakes.detector_split import DetectorSplit

SMALL = {"min_size": 320, "max_size": 480}
# Name, options of torchvision's builder, the cuts.
ZOO: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ssdlite320_mobilenet_v3_large": ({}, ("features.0.3", "features.0.6.block.1", "features.0.12")),
    "ssd300_vgg16": ({}, ("features.4", "features.9", "features.16")),
    "retinanet_resnet50_fpn": (SMALL, ("body.layer1", "body.layer2.0.bn2", "body.layer3")),
    "fcos_resnet50_fpn": (SMALL, ("body.layer1", "body.layer2.0.bn2", "body.layer3")),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ({}, ("body.3", "body.6", "body.11.block.1")),
    "fasterrcnn_resnet50_fpn": (SMALL, ("body.layer1", "body.layer2.0.bn2", "body.layer3")),
    "maskrcnn_resnet50_fpn": (SMALL, ("body.layer1", "body.layer2")),
    "keypointrcnn_resnet50_fpn": (SMALL, ("body.layer1", "body.layer2")),
}


def read_photo(path: Path | None) -> torch.Tensor:
    """A photograph as (3, H, W), 0..1."""
    if path is None:
        from skimage import data

        pixels = data.astronaut()[60:-40]
    else:
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255


def build(name: str, options: dict[str, Any]) -> Any:
    """A detector with random weights that reports everything."""
    torch.manual_seed(0)
    detector: Any = rcnn.build_detector(name, options)
    randomise(detector, gain=1.0)
    rcnn.set_score_min(detector, 0.0)
    return detector


def check(name: str, at: str, photo: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Cuts and compares one detector at one place."""
    found = DetectorSplit(build(name, options), at, [photo]).verify([photo])
    if found.boxes < 20:
        raise AssertionError(f"{name}: only {found.boxes} boxes")
    return {"boxes": found.boxes, "before_nms": found.worst_before_nms, "iou": found.worst_iou, "score": found.worst_score,
            "std": found.backbone.output_std, "sensitivity": min(found.backbone.sensitivity)}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs the bench; exit 1 if any detector fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path)
    parser.add_argument("--cuts", type=int, default=3, help="at most so many a detector (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=list(ZOO), choices=list(ZOO), metavar="NAME")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    photo = read_photo(arguments.photo)
    rows, failed = [], {}
    for name in arguments.only:
        options, cuts = ZOO[name]
        for at in cuts[: arguments.cuts]:
            start = time.perf_counter()
            try:
                row = check(name, at, photo, options)
            except Exception as error:  # noqa: BLE001  (one detector's fault must not hide the others')
                failed[f"{name}@{at}"] = f"{type(error).__name__}: {error}"[:300]
                print(f"{name:40} {at:22} FAILED {failed[f'{name}@{at}']}", flush=True)
                continue
            rows.append({"name": name, "at": at, **row})
            print(
                f"{name:40} {at:22} {row['boxes']:4} boxes  before NMS {row['before_nms']:.1e}  IoU {row['iou']:.5f}  "
                f"score {row['score']:.1e} replaced moves {row['sensitivity']:.1e}  {time.perf_counter() - start:.1f} s",
                flush=True,
            )
    print(json.dumps({"cuts": len(rows), "boxes": sum(r["boxes"] for r in rows), "failed": failed,
                      "worst_before_nms": max((r["before_nms"] for r in rows), default=None),
                      "worst_iou": min((r["iou"] for r in rows), default=None)}))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
