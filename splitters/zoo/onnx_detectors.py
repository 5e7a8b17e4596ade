"""YOLOX-nano (Ge et al. 2021, arXiv 2107.08430) on ONNX Runtime: teacher in training, neighbour in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from splitters.runtime.sessions import open_session
from splitters.tasks.decoding.boxes import Detections, Pixels, letterbox, select, to_source, yolox_boxes
from splitters.tasks.labels.coco_classes import CATEGORY_IDS

IMAGENET_MEAN = np.asarray([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.asarray([0.229, 0.224, 0.225], np.float32)


class Detector(Protocol):
    """Anything that finds objects in an RGB photo."""

    def __call__(self, image: Pixels) -> Detections:
        """Detections of one (H, W, 3) uint8 RGB image, boxes in its own pixels."""
        ...


class YoloxNano:
    """YOLOX-nano at its own 416 px: letterboxed top left with 114, RGB, ImageNet mean and deviation.

    Args:
        path: the ONNX file.
        score_min: detections below are not returned.
        threads: of ONNX Runtime.
    """

    size_px = 416

    def __init__(self, path: Path, *, score_min: float = 0.01, threads: int = 1) -> None:
        self._session = open_session(path, threads=threads)
        self._score_min = score_min

    def __call__(self, image: Pixels) -> Detections:
        """Detections of one RGB image, boxes in its own pixels."""
        square, scale = letterbox(image, self.size_px)
        x = ((square.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)[None]
        raw = np.asarray(self._session.run(None, {"images": np.ascontiguousarray(x)})[0][0], np.float32)
        boxes, scores = yolox_boxes(raw, (self.size_px, self.size_px))
        found = select(boxes, scores, CATEGORY_IDS, score_min=self._score_min, iou=0.65)
        return to_source(found, scale, *image.shape[:2])
