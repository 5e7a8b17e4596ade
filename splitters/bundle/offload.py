"""Offload: the model's input compressed as an image or as video, for a server that runs the whole model.

Device, server and ``splitters evaluate`` all compress and restore with the functions here, and with `splitters.runtime.h264` for
video, so what was measured is what is sent. Shape legend: a picture is (H, W, 3) uint8 BGR; ``size_px`` is the shorter side of what
is compressed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ConfigError, ModelError
from protos.schema import checked, read_json
from splitters.bundle.operating_point import Quantiles

Picture = NDArray[np.uint8]

_QUALITY_FLAG = {"jpeg": cv2.IMWRITE_JPEG_QUALITY, "webp": cv2.IMWRITE_WEBP_QUALITY}
# Of an input whose shorter side is 224; smaller qualities and sizes lose more accuracy than they save bytes.
_LADDER: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "jpeg": ((14, 28, 50, 80), (128, 160, 192, 224)),
    "webp": ((12, 30, 60), (160, 224)),
}
# Constant rate factors and sizes, the latter as above; whole inputs and halves of detectors' are what the clips were measured with.
_VIDEO_LADDER = ((22, 28, 34, 40, 46), (112, 168, 224))
VIDEO = "h264"
_MAX_RATE_FACTOR = 51
_SAME_MS = 0.3
_MAX_OPTIONS = 256
_MAX_SIZE_PX = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadOption:
    """The model's input, compressed; the server runs the whole model.

    Attributes:
        format: ``jpeg`` (baseline, 4:2:0), ``webp``, or ``h264``.
        quality: the encoder's own scale: 1..100, or of ``h264`` the constant rate factor 1..51, of which 51 is worst.
        size_px: shorter side of what is compressed; 0: the model's input size.
        payload_bytes, accuracy: as measured, accuracy 0..1 in the operating points' metric; of ``h264`` those of a frame that
            depends on the one before.
        key_bytes: of ``h264`` alone: a frame that depends on no other.
        encode_ms: frame to payload, resizing included, on the machine that measured; a prior, the client measures its own.
    """

    format: str
    quality: int
    size_px: int = 0
    payload_bytes: Quantiles
    accuracy: float
    encode_ms: Quantiles
    key_bytes: Quantiles | None = None

    def __post_init__(self) -> None:
        if self.format not in (*_QUALITY_FLAG, VIDEO):
            raise ConfigError(f"offload format must be jpeg, webp or h264, got {self.format!r}")
        if self.is_video and (self.quality > _MAX_RATE_FACTOR or self.key_bytes is None):
            raise ConfigError(f"offload as h264 needs key_bytes and a quality of 1..{_MAX_RATE_FACTOR}, got {self.quality}")
        if not 1 <= self.quality <= 100 or not 0 <= self.size_px <= _MAX_SIZE_PX:
            raise ConfigError(
                f"offload quality must be 1..100 and size_px 0..{_MAX_SIZE_PX}, got {self.quality} and {self.size_px}"
            )
        if not 0 <= self.accuracy <= 1:
            raise ConfigError(f"offload accuracy must be a fraction 0..1, got {self.accuracy}")

    @property
    def is_video(self) -> bool:
        """Whether its frames depend on each other."""
        return self.format == VIDEO


def video_ladder(input_px: int) -> list[tuple[int, int]]:
    """What is worth measuring of H.264: rate factor, shorter side."""
    return [(q, round(input_px * s / 224)) for s in _VIDEO_LADDER[1] for q in _VIDEO_LADDER[0]]


def ladder(input_px: int, formats: Sequence[str] = ("jpeg", "webp")) -> list[tuple[str, int, int]]:
    """What is worth measuring for a model whose input's shorter side is ``input_px``: format, quality, shorter side."""
    return [(f, q, round(input_px * s / 224)) for f in formats for s in _LADDER[f][1] for q in _LADDER[f][0]]


def compress(picture: Picture, *, image_format: str, quality: int, size_px: int = 0) -> bytes:
    """The compressed picture, reduced first where ``size_px`` is below its shorter side.

    Raises:
        ModelError: OpenCV cannot write it.
    """
    height, width = picture.shape[:2]
    scale = size_px / min(height, width) if size_px else 1.0
    if scale < 1:
        picture = cv2.resize(picture, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA).astype(
            np.uint8, copy=False
        )
    ok, data = cv2.imencode(f".{image_format}", picture, [_QUALITY_FLAG[image_format], quality])
    if not ok:
        raise ModelError(f"OpenCV could not write a {image_format} of {picture.shape}")
    return data.tobytes()


def restore(picture: Picture, size_px: tuple[int, int]) -> Picture:
    """A decoded picture at the model's own input size (height, width), enlarged (bicubic) where it was reduced."""
    if picture.shape[:2] == tuple(size_px):
        return picture
    return cv2.resize(picture, (size_px[1], size_px[0]), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)


def restorable(height_px: int, width_px: int, size_px: tuple[int, int]) -> bool:
    """Whether a picture of that size can be a reduced input: no larger, at least a quarter, and of the same shape."""
    scale = min(height_px, width_px) / min(size_px)
    same = abs(height_px - size_px[0] * scale) <= 1 and abs(width_px - size_px[1] * scale) <= 1
    return 0.25 <= scale <= 1 and same


def pareto_offloads(offloads: Iterable[OffloadOption]) -> list[OffloadOption]:
    """Those no other beats in bytes, time and accuracy, fewest bytes first; times that differ little count as the same.

    Pictures and video are not weighed against each other: a device may have no encoder, and video begins with a key frame.
    """
    every = list(offloads)
    if len({o.is_video for o in every}) > 1:
        return [*pareto_offloads(o for o in every if not o.is_video), *pareto_offloads(o for o in every if o.is_video)]

    def beaten(o: OffloadOption) -> bool:
        mine = (o.payload_bytes.p50, -o.accuracy)
        for p in every:
            theirs = (p.payload_bytes.p50, -p.accuracy)
            quicker = p.encode_ms.p50 < o.encode_ms.p50 or theirs != mine
            as_quick = p.encode_ms.p50 <= 1.25 * o.encode_ms.p50 + _SAME_MS
            if p is not o and quicker and as_quick and all(a <= b for a, b in zip(theirs, mine, strict=True)):
                return True
        return False

    return sorted((o for o in every if not beaten(o)), key=lambda o: o.payload_bytes.p50)


def dump_offloads(offloads: Iterable[OffloadOption]) -> str:
    """``offloads.json`` as text."""
    return json.dumps([asdict(o) for o in offloads], indent=1) + "\n"


def load_offloads(text: str | bytes) -> tuple[OffloadOption, ...]:
    """Reads ``offloads.json``.

    Raises:
        BundleError: not JSON, or an option cannot be read.
    """
    try:
        offloads = read_json(text, tuple[OffloadOption, ...], what="offloads.json")
    except ConfigError as error:
        raise BundleError(f"offloads.json cannot be read: {error.message}") from error
    if len(offloads) > _MAX_OPTIONS:
        raise BundleError(f"offloads.json lists {len(offloads)} options; at most {_MAX_OPTIONS} are allowed")
    return offloads


def offload_from_json(data: Mapping[str, Any]) -> OffloadOption:
    """From plain JSON types.

    Raises:
        BundleError: a field is missing, unknown or of the wrong type.
    """
    return checked(dict(data), OffloadOption, what="an offload option")
