"""Photos and boxes for training a detector: ground truth where there is some, a teacher's boxes elsewhere.

The teacher looks at every photo once, as it is and mirrored, and what it finds is cached as one ``.npz``.
Validation photos (``coco/val``) and the car-park video are never listed here.

Shape legend: an example's boxes are (K, 6): x1, y1, x2, y2 in the cached picture's pixels, class index 0..79, confidence
0..1 (1 for ground truth).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from splitters.runtime.folders import pictures_below
from splitters.tasks.decoding.boxes import Detections, Floats, Pixels, iou_matrix, nms, read_rgb
from splitters.tasks.labels.coco_classes import INDEX_OF
from splitters.zoo.onnx_detectors import Detector, YoloxNano

log = logging.getLogger(__name__)
VOC5_CATEGORIES = frozenset({1, 3, 6, 7, 17})
LABELLED = {"coco/train": frozenset(INDEX_OF), "photos/voc5": VOC5_CATEGORIES}
PHOTO_FOLDERS = ("photos/voc_unlabelled", "photos/bsds", "photos/street", "photos/camvid", "photos/indoor", "photos/coco_extra")
VIDEO_STEP = 8
Photo = tuple[str, Pixels, Floats]
"""Source, picture, boxes."""
HELD_OUT_EVERY = {"coco/train": 8, "photos/voc5": 16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One training picture.

    Attributes:
        image: (H, W, 3) uint8 RGB, longest side at most the cache's.
        boxes: (K, 6), see the module.
        source: folder it came from, relative to the data directory.
    """

    image: Pixels
    boxes: Floats
    source: str


def fit(image: Pixels, longest_px: int) -> tuple[Pixels, float]:
    """The picture scaled down to a longest side of at most ``longest_px``, and the scale."""
    scale = min(1.0, longest_px / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.uint8)
    return image, scale


def teach(teacher: Detector, image: Pixels) -> Detections:
    """The teacher's detections of a photo and of its mirror image, merged by suppression."""
    width = image.shape[1]
    straight, mirrored = teacher(image), teacher(np.ascontiguousarray(image[:, ::-1]))
    flipped = mirrored.boxes_px[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0]
    boxes = np.concatenate([straight.boxes_px, flipped.astype(np.float32)])
    scores = np.concatenate([straight.scores, mirrored.scores])
    classes = np.concatenate([straight.class_ids, mirrored.class_ids])
    index = nms(boxes, scores, classes, iou=0.6)
    return Detections(boxes[index], scores[index], classes[index])


def _rows(found: Detections) -> Floats:
    index = np.asarray([INDEX_OF[int(c)] for c in found.class_ids], np.float32).reshape(-1, 1)
    return np.concatenate([found.boxes_px, index, found.scores[:, None]], axis=1).astype(np.float32)


def labelled_photos(data: Path) -> Iterator[Photo]:
    """Every training picture with ground truth: its folder, the picture, its boxes."""
    for folder in LABELLED:
        truth = json.loads((data / folder / "instances.json").read_text())
        per_image: dict[int, list[list[float]]] = {}
        for a in truth["annotations"]:
            x, y, w, h = a["bbox"]
            if not a["iscrowd"] and w > 1 and h > 1:
                per_image.setdefault(a["image_id"], []).append([x, y, x + w, y + h, INDEX_OF[a["category_id"]], 1.0])
        for entry in truth["images"]:
            image = read_rgb(data / folder / "images" / entry["file_name"])
            yield folder, image, np.asarray(per_image.get(entry["id"], []), np.float32).reshape(-1, 6)


def every_photo(data: Path) -> Iterator[Photo]:
    """Every training picture, those of ``photos/diverse`` too; without boxes where nobody drew any: dense teachers need none."""
    for folder, image, truth in _photos(data):
        yield folder, image, np.zeros((0, 6), np.float32) if truth is None else truth
    for path in pictures_below(data / "photos" / "diverse"):
        yield "photos/diverse", read_rgb(path), np.zeros((0, 6), np.float32)


def _photos(data: Path) -> Iterator[tuple[str, Pixels, Floats | None]]:
    """Every training picture with its ground truth (None where it has none)."""
    yield from labelled_photos(data)
    for folder in (*PHOTO_FOLDERS, "imagenette160/train"):
        for path in sorted(p for p in (data / folder).rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"}):
            yield folder, read_rgb(path), None
    video = cv2.VideoCapture(str(data / "video" / "vtest.avi"))
    number = 0
    while True:
        good, frame = video.read()
        if not good:
            return
        if number % VIDEO_STEP == 0:
            yield "video/vtest.avi", np.ascontiguousarray(frame[..., ::-1]).astype(np.uint8), None
        number += 1


def _merge(folder: str, truth: Floats | None, taught: Floats) -> Floats:
    """Ground truth where the folder labels a class, the teacher's boxes for every other class."""
    if truth is None:
        return taught
    labelled = {INDEX_OF[c] for c in LABELLED[folder]}
    others = taught[[int(c) not in labelled for c in taught[:, 4]]]
    if len(others) and len(truth):
        # A confusable class on top of a labelled object (a dog box on a labelled cat) is the teacher's mistake.
        others = others[iou_matrix(others[:, :4], truth[:, :4]).max(axis=1) < 0.7]
    return np.concatenate([truth, others])


def build_examples(data: Path, cache: Path, *, longest_px: int = 320, score_min: float = 0.1) -> list[Example]:
    """All training pictures in memory with their boxes; the first call runs the teacher and fills ``cache``.

    Args:
        data: the shared data directory.
        cache: an ``.npz`` that is written when absent.
        longest_px: pictures are scaled down to this longest side.
        score_min: teacher boxes below are not kept.
    """
    if not cache.exists():
        teacher = YoloxNano(data / "weights" / "yolox_nano_416.onnx", score_min=score_min)
        rows, counts = [], []
        for number, (_, image, _) in enumerate(_photos(data)):
            rows.append(_rows(teach(teacher, image)))
            counts.append(len(rows[-1]))
            if number % 500 == 0:
                log.info("teacher: %d pictures, %d boxes", number + 1, sum(counts))
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(cache, rows=np.concatenate(rows), counts=np.asarray(counts))
    stored = np.load(cache)
    taught = np.split(stored["rows"], np.cumsum(stored["counts"])[:-1])
    examples = []
    for (folder, image, truth), found in zip(_photos(data), taught, strict=True):
        boxes = _merge(folder, truth, found)
        small, scale = fit(image, longest_px)
        boxes[:, :4] *= scale
        examples.append(Example(image=small, boxes=boxes, source=folder))
    return examples


def _every(source: str, seen: dict[str, int]) -> bool:
    """Whether the next picture of ``source`` is one to leave out; counts it."""
    number = seen.setdefault(source, 0)
    seen[source] += 1
    every = HELD_OUT_EVERY.get(source, 0)
    return every > 0 and number % every == 0


def held_out(examples: Sequence[Example]) -> list[bool]:
    """Which training pictures a run may leave out to judge itself: every 8th of ``coco/train``, every 16th of ``photos/voc5``."""
    seen: dict[str, int] = {}
    return [_every(example.source, seen) for example in examples]


def left_out(photos: Iterable[Photo]) -> Iterator[Photo]:
    """Of the photos, those that ``held_out`` names."""
    seen: dict[str, int] = {}
    return (photo for photo in photos if _every(photo[0], seen))


def without_held_out(photos: Iterable[Photo]) -> Iterator[Photo]:
    """Of the photos, all but those."""
    seen: dict[str, int] = {}
    return (photo for photo in photos if not _every(photo[0], seen))


def examples_of(photos: Iterable[Photo], *, longest_px: int = 320) -> list[Example]:
    """The photos as training pictures, scaled down to this longest side."""
    examples = []
    for source, image, boxes in photos:
        small, scale = fit(image, longest_px)
        scaled = boxes.astype(np.float32)
        scaled[:, :4] *= scale
        examples.append(Example(image=small, boxes=scaled, source=source))
    return examples
