"""Runs a bundle, and image codecs in its place, over photos: real payload bytes, answers, milliseconds.

Shape legend: M photos; pictures are (H, W, 3) uint8 BGR of the model's input size; latents carry no batch axis.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError
from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.bundle.manifest import Preprocess
from splitters.bundle.operating_point import OperatingPoint
from splitters.codec import LatentCodec
from splitters.evaluation.image_codecs import Picture, Setting, decode, encode
from splitters.runtime.head import Head
from splitters.runtime.pictures import readable
from splitters.runtime.sessions import Floats
from splitters.runtime.tail import Tail
from splitters.tasks.base import SizePx
from splitters.tasks.preprocess import geometry, input_image

log = logging.getLogger(__name__)
Each = Callable[[], None]


def nothing() -> None:
    """Called by work that nobody watches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Photos:
    """Photos as the model takes them.

    Attributes:
        pictures: (M, H, W, 3) uint8.
        sizes_px: (width, height) of each source photo.
        content: what of each picture is photo and not a letterbox's border, as (rows, columns).
        files: of each.
        unreadable: files that were asked for and could not be read.
    """

    pictures: NDArray[np.uint8]
    sizes_px: tuple[SizePx, ...]
    content: tuple[tuple[slice, slice], ...]
    files: tuple[Path, ...] = ()
    unreadable: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def input_px(self) -> int:
        """The shorter side of the model's input."""
        return int(min(self.pictures.shape[1:3]))


def load_photos(files: Sequence[Path], bundle: Bundle) -> Photos:
    """Reads and resizes photos as the device would; those that cannot be read are named in a warning and left out.

    Raises:
        SourceError: not one can be read.
    """
    spec = bundle.manifest.preprocess
    pictures, sizes, read, unreadable = [], [], [], list[Path]()
    for file, frame in readable(files, unreadable=unreadable):
        pictures.append(input_image(frame, spec))
        sizes.append((frame.shape[1], frame.shape[0]))
        read.append(file)
    if not read:
        raise SourceError(f"not one of {len(files)} photos can be read")
    return Photos(
        pictures=np.stack(pictures), sizes_px=tuple(sizes), content=tuple(content_area(spec, *size) for size in sizes),
        files=tuple(read), unreadable=tuple(unreadable),
    )  # fmt: skip


def content_area(spec: Preprocess, width_px: int, height_px: int) -> tuple[slice, slice]:
    """What of the model's input is the source's picture and not a letterbox's border, as (rows, columns)."""
    if spec.resize != "letterbox":
        return slice(0, spec.size_px[0]), slice(0, spec.size_px[1])
    g = geometry(spec, width_px, height_px)
    left, top = round(g.offset_x_px), round(g.offset_y_px)
    return slice(top, top + round(height_px * g.scale_y)), slice(left, left + round(width_px * g.scale_x))


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One setting over all photos: bytes of each payload, (M,), and the answers."""

    sizes: NDArray[np.float64]
    answers: list[Answer]


def run_points(
    bundle: Bundle, codec: LatentCodec, tail: Tail, photos: Photos, points: Sequence[OperatingPoint], *,
    tick: Callable[[str], None], each: Each = nothing,
) -> dict[int, Measured]:  # fmt: skip
    """Every operating point over every photo, through real payloads: what the server decodes is what it answers from.

    Args:
        bundle: the bundle.
        codec: its latent codec.
        tail: its tail.
        photos: the photos.
        points: what to measure.
        tick: told of every finished point.
        each: called after every photo at every point.
    """
    head = Head(bundle)
    measured: dict[int, Measured] = {}
    for graphs in dict.fromkeys(p.graphs for p in points):
        latents = [head.latents(head.stem_of(p), graphs) for p in photos.pictures]
        for point in (p for p in points if p.graphs == graphs):
            measured[point.id] = _run_point(codec, tail, photos, latents, point, each)
            tick(f"operating point {point.id}")
    return measured


def _run_point(
    codec: LatentCodec, tail: Tail, photos: Photos, latents: Sequence[Sequence[Floats]], point: OperatingPoint, each: Each
) -> Measured:
    sizes = np.zeros(len(photos))
    answers: list[Answer] = []
    # One photo at a time: a batch gains nothing on a processor, and its large temporaries cost twice the time.
    for i, latent in enumerate(latents):
        layers = codec.compress(latent, point.codec_point).payloads
        sizes[i] = sum(map(len, layers))
        decoded = codec.dequantise(codec.decode(layers))
        answers += tail.run([tensor[None] for tensor in decoded], [photos.sizes_px[i]])
        each()
    return Measured(sizes=sizes, answers=answers)


def run_whole(
    tail: Tail, photos: Photos, pictures: Sequence[Picture] | NDArray[np.uint8] | None = None, *, each: Each = nothing
) -> list[Answer]:
    """The whole model on pictures (default: the photos themselves)."""
    given = photos.pictures if pictures is None else pictures
    answers: list[Answer] = []
    for picture, size_px in zip(given, photos.sizes_px, strict=True):
        answers += tail.run_images([picture], [size_px])
        each()
    return answers


def run_image_codec(tail: Tail, photos: Photos, setting: Setting, *, each: Each = nothing) -> Measured:
    """The whole model on compressed pictures; a letterbox's border is not compressed but put around what was."""
    sizes = np.zeros(len(photos))
    restored = photos.pictures.copy()
    for i, (picture, area) in enumerate(zip(restored, photos.content, strict=True)):
        content = picture[area]
        data = encode(content, setting, photos.input_px)
        sizes[i] = len(data)
        content[...] = decode(data, *content.shape[:2])
    return Measured(sizes=sizes, answers=run_whole(tail, photos, restored, each=each))


def encode_ms(photos: Photos, setting: Setting, count: int = 20) -> float:
    """Median time to compress one picture."""
    taken = []
    for picture, area in zip(photos.pictures[:count], photos.content, strict=False):
        start = time.perf_counter_ns()
        encode(picture[area], setting, photos.input_px)
        taken.append((time.perf_counter_ns() - start) / 1e6)
    return float(np.median(taken))
