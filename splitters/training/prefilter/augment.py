"""Objects on foreign ground: what teaches the prefilter to see things, not scenes.

A crop of a picture without objects, magnified at random, receives cut-outs of objects at small scale, feathered, as
a fixed camera would see them. As often it receives cut-outs of nothing, or stays empty, so neither seams nor scenery tell the
answer (after Ghiasi et al. 2021, arXiv 2012.07177).

Shape legend: S the canvas's side in px; boxes are (K, 6) as in `splitters.training.detector.data`.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from splitters.tasks.decoding.boxes import Floats, Pixels
from splitters.training.detector.data import Example

SURE = 0.5
SIDE_PX = (14.0, 110.0)


class Composer:
    """Draws composed pictures.

    Args:
        examples: whose objects are cut out, and whose empty pictures are the ground.
        labels: class indices of the objects to paste.
        rng: the only source of chance.
    """

    def __init__(self, examples: Sequence[Example], labels: Sequence[int], rng: np.random.Generator) -> None:
        self.rng = rng
        self._ground = [e.image for e in examples if len(e.boxes) == 0 and min(e.image.shape[:2]) >= 100 and e.image.mean() > 20]
        per_class: dict[int, list[tuple[int, int]]] = {label: [] for label in labels}
        self._examples = examples
        for number, example in enumerate(examples):
            for row, (x1, y1, x2, y2, label, confidence) in enumerate(example.boxes):
                if int(label) in per_class and confidence >= SURE and min(x2 - x1, y2 - y1) >= 24:
                    per_class[int(label)].append((number, row))
        self._objects = {label: found for label, found in per_class.items() if found}
        plenty = np.sqrt([len(found) for found in self._objects.values()])
        self._shares = plenty / max(1e-9, float(plenty.sum()))

    @property
    def ready(self) -> bool:
        """Whether there is ground to paste on and something to paste."""
        return bool(self._ground) and bool(self._objects)

    def picture(self, size_px: int) -> tuple[Pixels, Floats]:
        """One (S, S, 3) picture and its boxes, none in half of the pictures."""
        rng = self.rng
        canvas = self._crop(size_px)
        objects = rng.random() < 0.5
        rows: list[Floats] = []
        for _ in range(int(rng.integers(1, 4)) if objects or rng.random() < 0.6 else 0):
            patch, label = self._object() if objects else (self._crop(int(rng.integers(24, 160))), -1)
            box = self._paste(canvas, patch)
            if label >= 0:
                rows.append(np.asarray([*box, label, 1.0], np.float32))
        return canvas, np.stack(rows) if rows else np.zeros((0, 6), np.float32)

    def _crop(self, size_px: int) -> Pixels:
        image = self._ground[int(self.rng.integers(len(self._ground)))]
        side = int(self.rng.uniform(0.25, 1.0) * min(image.shape[:2]))
        y, x = (int(self.rng.integers(0, limit - side + 1)) for limit in image.shape[:2])
        part = cv2.resize(image[y : y + side, x : x + side], (size_px, size_px), interpolation=cv2.INTER_LINEAR)
        return np.ascontiguousarray(part[:, :: int(self.rng.choice([1, -1]))]).astype(np.uint8)

    def _object(self) -> tuple[Pixels, int]:
        label = int(self.rng.choice(list(self._objects), p=self._shares))
        found = self._objects[label]
        number, row = found[int(self.rng.integers(len(found)))]
        example = self._examples[number]
        x1, y1, x2, y2 = example.boxes[row, :4].astype(int)
        patch = example.image[max(0, y1) : y2, max(0, x1) : x2]
        return np.ascontiguousarray(patch[:, :: int(self.rng.choice([1, -1]))]), label

    def _paste(self, canvas: Pixels, patch: Pixels) -> tuple[int, int, int, int]:
        rng, size_px = self.rng, canvas.shape[0]
        longest = float(np.exp(rng.uniform(*np.log(SIDE_PX))))
        scale = longest / max(patch.shape[:2])
        width, height = (max(6, round(side * scale)) for side in (patch.shape[1], patch.shape[0]))
        patch = cv2.resize(patch, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)
        x, y = int(rng.integers(-width // 3, size_px - 2 * width // 3)), int(rng.integers(-height // 3, size_px - 2 * height // 3))
        x1, y1, x2, y2 = max(0, x), max(0, y), min(size_px, x + width), min(size_px, y + height)
        # An ellipse for most, a soft rectangle for the rest: photos of cars fill their boxes, people do not.
        v, u = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        power = float(rng.choice([2.0, 4.0]))
        mask = np.clip((1.1 - (np.abs(u) ** power + np.abs(v) ** power)) * 3, 0, 1)[..., None]
        inside = (slice(y1 - y, y2 - y), slice(x1 - x, x2 - x))
        ground = canvas[y1:y2, x1:x2].astype(np.float32)
        gain = rng.uniform(0.7, 1.2)
        blended = ground + mask[inside] * (patch[inside].astype(np.float32) * gain - ground)
        canvas[y1:y2, x1:x2] = np.clip(blended, 0, 255).astype(np.uint8)
        return x1, y1, x2, y2
