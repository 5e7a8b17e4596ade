"""All training pictures in one small file: what a machine without the photos, such as a borrowed GPU, trains the detector from.

The file is a safetensors file. ``pictures`` holds JPEGs one after the other as uint8, ``ends`` (M,) where each ends, ``boxes``
(K, 6) and ``counts`` (M,) the boxes as in ``data``; the sources lie in its metadata. It is read whole, and decoded once.

Shape legend: M pictures, K boxes of all pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from protos.errors import ConfigError, SourceError
from splitters.tasks.decoding.boxes import Floats, Pixels
from splitters.training.detector.data import Example, Photo, examples_of

BUDGET_BYTES = 55 * 2**20
LONGEST_PX = 288
QUALITIES = (90, 80, 70, 60, 50, 40, 30)


def write_pack(photos: Iterable[Photo], path: Path, *, budget_bytes: int = BUDGET_BYTES, longest_px: int = LONGEST_PX) -> int:
    """Writes the pack, at the best JPEG quality with which it stays within the budget.

    Args:
        photos: source, picture and boxes of each.
        path: of the pack; written at once or not at all.
        budget_bytes: of the pictures.
        longest_px: pictures are scaled down to this longest side.

    Returns:
        The quality.

    Raises:
        ConfigError: there is no picture, or they do not fit at any quality.
    """
    small = examples_of(photos, longest_px=longest_px)
    if not small:
        raise ConfigError("there is no picture to pack")
    for quality in QUALITIES:
        coded = _coded((e.image for e in small), quality, budget_bytes)
        if coded is None:
            continue
        tensors = {
            "pictures": np.concatenate(coded), "ends": np.cumsum([len(c) for c in coded]),
            "boxes": np.concatenate([e.boxes for e in small]), "counts": np.array([len(e.boxes) for e in small]),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        save_file(tensors, partial, {"sources": json.dumps([e.source for e in small]), "quality": str(quality)})
        partial.replace(path)
        return quality
    raise ConfigError(f"{len(small)} pictures do not fit into {budget_bytes / 2**20:.0f} MiB even at JPEG quality {QUALITIES[-1]}")


def _coded(pictures: Iterable[Pixels], quality: int, budget_bytes: int) -> list[Pixels] | None:
    """Each picture as JPEG; None as soon as they are more than the budget."""
    coded, total = [], 0
    for picture in pictures:
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
        coded.append(np.asarray(data, np.uint8).reshape(-1))
        total += len(coded[-1])
        if total > budget_bytes:
            return None
    return coded


def read_pack(path: Path) -> Sequence[Example]:
    """The pack's pictures with their boxes.

    Raises:
        SourceError: it cannot be read, or is no pack.
    """
    try:
        with safe_open(path, "numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("pictures", "ends", "boxes", "counts")}
            sources = json.loads((opened.metadata() or {})["sources"])
        return list(_decoded(tensors["pictures"], tensors["ends"], tensors["boxes"], tensors["counts"], sources))
    except (OSError, SafetensorError, KeyError, ValueError, cv2.error) as error:
        raise SourceError(f"{path} is no pack of training pictures that can be read: {error}") from error


def _decoded(
    pictures: Pixels, ends: NDArray[np.int64], boxes: Floats, counts: NDArray[np.int64], sources: Sequence[str]
) -> Iterator[Example]:
    start = first = 0
    for end, count, source in zip(ends.tolist(), counts.tolist(), sources, strict=True):
        image = cv2.imdecode(pictures[start:end], cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"a picture of {source} is damaged")
        yield Example(
            image=np.ascontiguousarray(image[..., ::-1]).astype(np.uint8), boxes=boxes[first : first + count], source=source
        )
        start, first = end, first + count
