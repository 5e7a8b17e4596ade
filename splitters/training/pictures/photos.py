"""Training photographs: a folder of any images, decoded once, cropped at random.

Shape legend: images (N, 3, size, size) float32, normalised; photos uint8 (H, W, 3) RGB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from protos.errors import SourceError
from splitters.runtime.folders import pictures_below
from splitters.runtime.pictures import read_picture
from splitters.training.pictures.disturb import disturbed

log = logging.getLogger(__name__)
_PARTS = 0.5
_GREY = 114
_LONGEST = 1.6  # longest to shortest side kept
_FORMAT = 2  # of the cache
Told = Callable[[int, int, str], None]
"""Told how many steps are done, of how many, and of what."""


def list_photos(roots: Iterable[Path]) -> list[Path]:
    """Every image below ``roots``, sorted within each root.

    Raises:
        SourceError: a root does not exist or none holds an image.
    """
    found: list[Path] = []
    for root in roots:
        found += pictures_below(root)
    if not found:
        raise SourceError("no images found: --data must be a folder of photos")
    return found


def hold_out(photos: Sequence[Path], count: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Splits ``photos`` into training and held-out ones, the same split for the same files and seed."""
    order = sorted(photos, key=lambda p: hashlib.sha256(f"{seed}/{p.parent.name}/{p.name}".encode()).digest())
    return sorted(order[count:]), sorted(order[:count])


def hold_out_evenly(photos: Sequence[Path], count: int, seed: int, within: Path) -> tuple[list[Path], list[Path]]:
    """As ``hold_out``, but only photos below ``within`` are held out, equally many from each folder there."""
    folders: dict[Path, list[Path]] = {}
    for photo in photos:
        if within in photo.parents:
            folders.setdefault(photo.parent, []).append(photo)
    if not folders:
        return hold_out(photos, count, seed)
    dev = sorted(p for members in folders.values() for p in hold_out(members, count // len(folders), seed)[1])
    gone = set(dev)
    return sorted(p for p in photos if p not in gone), dev


def _rgb(path: Path) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(read_picture(path)[..., ::-1]))


def _load(path: Path, short_px: int) -> NDArray[np.uint8]:
    image = _rgb(path)
    w, h = image.size
    scale = short_px / min(w, h)
    if scale < 1:
        image = image.resize((max(short_px, round(w * scale)), max(short_px, round(h * scale))), Image.Resampling.BICUBIC)
    a = np.asarray(image)
    h, w = a.shape[:2]
    across, down = min(w, max(1, int(_LONGEST * h))), min(h, max(1, int(_LONGEST * w)))
    top, left = (h - down) // 2, (w - across) // 2
    return np.ascontiguousarray(a[top : top + down, left : left + across])


def _load_whole(path: Path, longest_px: int) -> NDArray[np.uint8]:
    image = _rgb(path)
    scale = longest_px / max(image.size)
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BICUBIC)
    return np.asarray(image)


@dataclass(frozen=True, kw_only=True, slots=True)
class Crops:
    """How training crops are drawn.

    Attributes:
        size_px: side of the model's input.
        area: smallest share of the photo's area that a crop shows.
        mean: subtracted per channel, of values in 0..1.
        std: divided by per channel.
        letterbox: keep proportions: whole photos and large parts, scaled to fit, at the top left of a grey square.
        bgr: the model takes blue first.
        disturb: probability that a crop is made poorer, see `disturb`.
    """

    size_px: int
    area: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    letterbox: bool = False
    bgr: bool = False
    disturb: float = 0.0


class PhotoCache:
    """Decoded photos in one flat file, read through a memory map. Photos that cannot be read are named, and left out.

    Args:
        photos: the files, in order.
        folder: where the cache lies; reused while names, sizes and times of the photos are the same.
        short_px: shortest side they are reduced to.
        longest_px: longest side they are reduced to, and nothing is cut off; 0: as ``short_px`` says.
        progress: told how many are decoded, of how many.

    Raises:
        SourceError: not one can be read.

    Attributes:
        digest: changes with the photos' names, folders and sizes, and with those that could not be read.
        unreadable: the files left out.
    """

    def __init__(
        self, photos: Sequence[Path], folder: Path, short_px: int = 256, longest_px: int = 0, progress: Told | None = None
    ) -> None:
        size = f"{short_px}" if not longest_px else f"longest {longest_px}"
        files = [(str(p), *_size_and_time(p)) for p in photos]
        key = hashlib.sha256(repr((_FORMAT, size, files)).encode()).hexdigest()[:16]
        self.path, index = folder / f"photos-{key}.u8", folder / f"photos-{key}.json"
        if not index.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_cache(
                photos, self.path, index, lambda p: _load_whole(p, longest_px) if longest_px else _load(p, short_px), progress
            )
        told = json.loads(index.read_text(encoding="utf-8"))
        self.shapes: list[tuple[int, int, int]] = [tuple(s) for s in told["shapes"]]
        self.unreadable = [Path(p) for p in told["unreadable"]]
        for path in self.unreadable:
            log.warning("%s cannot be read; training goes on without it", path)
        if not self.shapes:
            raise SourceError(f"not one of {len(photos)} photos can be read; the first is {photos[0] if photos else 'none'}")
        named = [(f"{Path(name).parent.name}/{Path(name).name}", taken) for name, taken, _ in files]
        self.digest = hashlib.sha256(repr((size, named, len(self.unreadable))).encode()).hexdigest()
        self.flat = np.memmap(self.path, np.uint8, "r")

    def __len__(self) -> int:
        return len(self.shapes)

    def photo(self, i: int) -> NDArray[np.uint8]:
        """Photo ``i``, (H, W, 3)."""
        offset, h, w = self.shapes[i]
        return self.flat[offset : offset + h * w * 3].reshape(h, w, 3)

    def batch(self, indices: Iterable[int], crops: Crops, rng: np.random.Generator) -> Tensor:
        """Random resized crops, mirrored half of the time."""
        taken = [drawn(self.photo(i), crops, rng) for i in indices]
        return normalise(np.stack(taken), crops.mean, crops.std)


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _write_cache(
    photos: Sequence[Path], flat: Path, index: Path, load: Callable[[Path], NDArray[np.uint8]], progress: Told | None
) -> None:
    shapes: list[tuple[int, int, int]] = []
    unreadable: list[str] = []
    offset = 0
    partial = flat.with_name(f"{flat.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            for number, path in enumerate(photos, 1):
                try:
                    a = load(path)
                except SourceError as error:
                    log.info("%s", error.message)
                    unreadable.append(str(path))
                else:
                    out.write(a.tobytes())
                    shapes.append((offset, a.shape[0], a.shape[1]))
                    offset += a.nbytes
                if progress is not None:
                    progress(number, len(photos), "decoding photos")
        partial.replace(flat)
    finally:
        partial.unlink(missing_ok=True)
    half = index.with_name(f"{index.name}.{os.getpid()}.partial")
    try:
        half.write_text(json.dumps({"shapes": shapes, "unreadable": unreadable}), encoding="utf-8")
        half.replace(index)
    finally:
        half.unlink(missing_ok=True)
    log.info("decoded %d photos, %.1f MB", len(shapes), offset / 1e6)


def normalise(photos: NDArray[np.uint8], mean: float | Sequence[float], std: float | Sequence[float]) -> Tensor:
    """uint8 (N, H, W, 3) to the model's input (N, 3, H, W); mean and standard deviation are shared or one a channel."""
    x = torch.from_numpy(photos).permute(0, 3, 1, 2).float().div_(255.0)
    return x.sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))


def drawn(photo: NDArray[np.uint8], crops: Crops, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One random crop of a picture (H, W, 3) RGB, mirrored half of the time: (size, size, 3) in the model's order of colours."""
    taken = _letterboxed(photo, crops, rng) if crops.letterbox else _crop(photo, crops, rng)
    if crops.disturb:
        taken = disturbed(taken, crops.disturb, rng)
    return taken[..., ::-1] if crops.bgr else taken


def _crop(photo: NDArray[np.uint8], crops: Crops, rng: np.random.Generator) -> NDArray[np.uint8]:
    import cv2

    h, w = photo.shape[:2]
    area = h * w * rng.uniform(crops.area, 1.0)
    aspect = np.exp(rng.uniform(-0.288, 0.288))  # 3:4 to 4:3
    across, down = min(w, int((area * aspect) ** 0.5)), min(h, int((area / aspect) ** 0.5))
    top, left = int(rng.integers(0, h - down + 1)), int(rng.integers(0, w - across + 1))
    part = photo[top : top + down, left : left + across]
    if rng.random() < 0.5:
        part = part[:, ::-1]
    shrinks = down * across > crops.size_px**2
    resized = cv2.resize(
        np.ascontiguousarray(part), (crops.size_px, crops.size_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    return resized.astype(np.uint8, copy=False)


def _letterboxed(photo: NDArray[np.uint8], crops: Crops, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Half of the time the whole photo as a detector sees it, else a part of it at another scale."""
    import cv2

    h, w = photo.shape[:2]
    if rng.random() < _PARTS:
        share = float(np.sqrt(rng.uniform(crops.area, 1.0)))
        down, across = max(1, int(h * share)), max(1, int(w * share))
        top, left = int(rng.integers(0, h - down + 1)), int(rng.integers(0, w - across + 1))
        photo = photo[top : top + down, left : left + across]
        h, w = down, across
    if rng.random() < 0.5:
        photo = photo[:, ::-1]
    scale = crops.size_px / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    resized = cv2.resize(np.ascontiguousarray(photo), size, interpolation=cv2.INTER_LINEAR)
    square = np.full((crops.size_px, crops.size_px, 3), _GREY, np.uint8)
    square[: size[1], : size[0]] = resized
    return square
