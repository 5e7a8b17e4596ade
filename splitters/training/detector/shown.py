"""From which score on a viewer is shown our detector's boxes: measured on training photos that were kept out of its training.

``python -m splitters.training.detector.shown --data DIR`` looks at every 8th photo of ``coco/train`` and every 16th of
``photos/voc5`` and writes ``shown.json`` beside the weights, with their sha256: other weights need it measured again.
The score is that of the best F0.5 (van Rijsbergen 1979), in which a wrong box weighs more than a missed one: a person who looks
at a picture forgives the second sooner.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.bundle import sha256_file
from splitters.tasks.decoding.boxes import Detections, Floats, Pixels, iou_matrix
from splitters.tasks.labels.coco_classes import INDEX_OF
from splitters.training.detector.data import LABELLED, labelled_photos, left_out
from splitters.zoo.detector.export_plain import SHOWN
from splitters.zoo.detector.network import WEIGHTS, PhotoDetector, load_detector

log = logging.getLogger(__name__)
BETA = 0.5
_IOU = 0.5


class Threshold(NamedTuple):
    """A score, and how the boxes from it on do: shares of right boxes, of found objects, and how many boxes there are."""

    score: float
    f: float
    precision: float
    recall: float
    boxes: int


def best_threshold(scores: NDArray[np.float64], right: NDArray[np.bool_], objects: int, beta: float = BETA) -> Threshold:
    """The score from which on boxes have the best F-measure.

    Args:
        scores: (B,) of boxes.
        right: (B,) whether each is an object's first box.
        objects: how many there are to find.
        beta: how much more recall weighs than precision.

    Raises:
        ConfigError: there is no object, or no box.
    """
    if objects < 1 or not len(scores):
        raise ConfigError("a threshold needs photos with objects, and boxes")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(right[order])
    precision, recall = hits / np.arange(1, len(order) + 1), hits / objects
    f = (1 + beta**2) * precision * recall / np.maximum(beta**2 * precision + recall, 1e-12)
    f[:-1][ranked[1:] == ranked[:-1]] = -1  # equal scores are shown together
    best = int(f.argmax())
    return Threshold(float(ranked[best]), float(f[best]), float(precision[best]), float(recall[best]), best + 1)


def matched(found: Detections, truth: Floats, labelled: frozenset[int]) -> list[tuple[float, bool]]:
    """Score of each box of a labelled class, surest first, and whether it is the first on an object of its class.

    Args:
        found: the detector's boxes.
        truth: (K, 6) true boxes, class index in column 4.
        labelled: category ids that the photo's truth tells of; other boxes cannot be judged.
    """
    free = np.ones(len(truth), bool)
    rows = []
    for i in np.argsort(-found.scores, kind="stable"):
        category = int(found.class_ids[i])
        if category not in labelled:
            continue
        fitting = free & (truth[:, 4] == INDEX_OF[category])
        overlaps = iou_matrix(found.boxes_px[i : i + 1], truth[:, :4])[0] * fitting if fitting.any() else np.zeros(1)
        hit = float(overlaps.max()) >= _IOU
        if hit:
            free[int(overlaps.argmax())] = False
        rows.append((float(found.scores[i]), hit))
    return rows


def measure(detector: Callable[[Pixels], Detections], data: Path) -> tuple[Threshold, Threshold, int]:
    """The thresholds of the best F0.5 and of the best F1, and the number of photos."""
    rows: list[tuple[float, bool]] = []
    objects = photos = 0
    for folder, image, truth in left_out(labelled_photos(data)):
        rows += matched(detector(image), truth, LABELLED[folder])
        objects += len(truth)
        photos += 1
    scores, right = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], bool)
    return best_threshold(scores, right, objects), best_threshold(scores, right, objects, beta=1.0), photos


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with coco/, photos/ and the rest")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=SHOWN)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    chosen, balanced, photos = measure(PhotoDetector(load_detector(args.weights), score_min=0.05), args.data)
    told = {
        "score": round(chosen.score, 4), "beta": BETA, "f": round(chosen.f, 4), "precision": round(chosen.precision, 4),
        "recall": round(chosen.recall, 4), "boxes": chosen.boxes, "photos": photos,
        "best_f1": {"score": round(balanced.score, 4), "f": round(balanced.f, 4)},
        "weights_sha256": sha256_file(args.weights),
        "command": "python -m splitters.training.detector.shown --data $HEADTAIL_DATA",
    }  # fmt: skip
    log.info("%s", told)
    args.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
