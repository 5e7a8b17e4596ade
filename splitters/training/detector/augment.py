"""Pictures for a training step: mosaics of four (Bochkovskiy et al. 2020, arXiv 2004.10934), scale, mirror, colour.

Shape legend: S the canvas's side in px; boxes are (K, 6) as in ``data``, in canvas pixels once placed.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from splitters.tasks.decoding.boxes import Floats, Pixels
from splitters.training.detector.data import Example
from splitters.zoo.detector.network import PAD

Area = tuple[int, int, int, int]


def paste(canvas: Pixels, example: Example, scale: float, origin: tuple[float, float], area: Area, *, mirror: bool) -> Floats:
    """Draws an example into ``area`` (x1, y1, x2, y2) of the canvas, its top left corner at ``origin``.

    Returns:
        Its boxes in canvas pixels, clipped to the area; those of which less than 30 % or 4 px remain are left out.
    """
    image, boxes = example.image, example.boxes.copy()
    if mirror:
        image = image[:, ::-1]
        boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
    matrix = np.asarray([[scale, 0, origin[0] - area[0]], [0, scale, origin[1] - area[1]]], np.float32)
    x1, y1, x2, y2 = area
    if x2 - x1 < 2 or y2 - y1 < 2:
        return np.zeros((0, 6), np.float32)
    how = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR
    if scale < 0.5:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=how).astype(np.uint8)
        matrix[0, 0] = matrix[1, 1] = 1
    canvas[y1:y2, x1:x2] = cv2.warpAffine(
        np.ascontiguousarray(image), matrix, (x2 - x1, y2 - y1), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT,
        borderValue=(PAD, PAD, PAD),
    )  # fmt: skip
    boxes[:, :4] = boxes[:, :4] * scale + np.asarray([*origin, *origin], np.float32)
    before = np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1)
    boxes[:, :4] = np.clip(boxes[:, :4], [x1, y1, x1, y1], [x2, y2, x2, y2])
    sides = boxes[:, 2:4] - boxes[:, :2]
    kept = (sides.min(axis=1, initial=1e9) >= 4) & (np.prod(sides, axis=1) >= 0.3 * before)
    return np.asarray(boxes[kept], np.float32)


def single(example: Example, size_px: int, rng: np.random.Generator) -> tuple[Pixels, Floats]:
    """One example on a canvas, scaled by 0.5 to 1.6 of the letterbox's scale, at a random place."""
    canvas = np.full((size_px, size_px, 3), PAD, np.uint8)
    height, width = example.image.shape[:2]
    scale = size_px / max(height, width) * float(np.exp(rng.uniform(np.log(0.5), np.log(1.6))))
    room_x, room_y = size_px - width * scale, size_px - height * scale
    origin = (float(rng.uniform(min(room_x, 0), max(room_x, 0))), float(rng.uniform(min(room_y, 0), max(room_y, 0))))
    boxes = paste(canvas, example, scale, origin, (0, 0, size_px, size_px), mirror=rng.random() < 0.5)
    return canvas, boxes


def mosaic(examples: Sequence[Example], size_px: int, rng: np.random.Generator) -> tuple[Pixels, Floats]:
    """Four examples around a random point, each touching it with a corner."""
    canvas = np.full((size_px, size_px, 3), PAD, np.uint8)
    cx, cy = (int(v) for v in rng.uniform(0.3, 0.7, 2) * size_px)
    boxes = []
    for index, example in enumerate(examples):
        right, below = index % 2, index // 2
        height, width = example.image.shape[:2]
        scale = size_px / max(height, width) * float(rng.uniform(0.45, 1.1))
        origin = (cx if right else cx - width * scale, cy if below else cy - height * scale)
        area = (cx if right else 0, cy if below else 0, size_px if right else cx, size_px if below else cy)
        boxes.append(paste(canvas, example, scale, origin, area, mirror=rng.random() < 0.5))
    return canvas, np.concatenate(boxes)


def recolour(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Random gain per channel, contrast, brightness and saturation."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    saturation = float(rng.uniform(0.3, 1.6))
    image = cv2.addWeighted(image, saturation, grey, 1 - saturation, 0).astype(np.uint8)
    gain = rng.uniform(0.65, 1.35) * rng.uniform(0.9, 1.1, 3)
    levels = np.arange(256)[:, None] * gain[None] + rng.uniform(-20, 20) + 114 * (1 - gain[None]) * rng.uniform(0, 1)
    table = np.clip(levels, 0, 255).astype(np.uint8).reshape(256, 1, 3)
    return np.asarray(cv2.LUT(image, table), np.uint8)


class Sampler:
    """Draws augmented pictures, the scarcer and better labelled sources more often.

    Args:
        examples: all training pictures.
        weights: how often a picture of each source is drawn, relative to 1; 0 leaves a source out.
        rng: the only source of chance.
        empty: how often a picture without any box is drawn, relative to one with boxes.
    """

    def __init__(
        self, examples: Sequence[Example], weights: dict[str, float], rng: np.random.Generator, *, empty: float = 0.4
    ) -> None:
        self._examples = list(examples)
        chance = np.asarray([weights.get(e.source, 1.0) * (1.0 if len(e.boxes) else empty) for e in examples])
        self._cumulative = np.cumsum(chance / chance.sum())
        self._rng = rng

    def _draw(self) -> Example:
        return self._examples[min(int(np.searchsorted(self._cumulative, self._rng.random())), len(self._examples) - 1)]

    def batch(self, count: int, size_px: int, mosaic_share: float) -> tuple[Pixels, list[Floats]]:
        """``count`` pictures (N, S, S, 3) uint8 and their boxes."""
        images, boxes = [], []
        for _ in range(count):
            if self._rng.random() < mosaic_share:
                image, found = mosaic([self._draw() for _ in range(4)], size_px, self._rng)
            else:
                image, found = single(self._draw(), size_px, self._rng)
            images.append(recolour(image, self._rng) if self._rng.random() < 0.7 else image)
            boxes.append(found)
        return np.stack(images), boxes
