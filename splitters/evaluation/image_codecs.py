"""The baselines: the model's input as JPEG, WebP or AVIF, over qualities and input sizes.

Every setting is 4:2:0. JPEG: optimised Huffman tables, progressive; WebP: method 6; AVIF: speed 6. Of a letterboxed input only the
content is compressed; its border costs nothing. Shape legend: pictures are (H, W, 3) uint8 BGR.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from protos.errors import ConfigError

Picture = NDArray[np.uint8]
# Shares of the model's input to which pictures are reduced.
CLASSIFIER_SHARES = (128 / 224, 160 / 224, 192 / 224, 1.0)
DETECTOR_SHARES = (0.5, 0.62, 0.8, 1.0)

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "jpeg": {"format": "JPEG", "optimize": True, "progressive": True, "subsampling": "4:2:0"},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF", "speed": 6, "subsampling": "4:2:0", "max_threads": 1},
}
QUALITIES: Mapping[str, tuple[int, ...]] = {
    "jpeg": (6, 14, 28, 50, 80),
    "webp": (2, 12, 30, 60, 88),
    "avif": (10, 20, 32, 48, 70),
}
# A detector needs more of the picture: its lowest qualities are never on the envelope, and four a size suffice for the hull.
DETECTOR_QUALITIES: Mapping[str, tuple[int, ...]] = {
    "jpeg": (10, 25, 50, 80),
    "webp": (5, 25, 55, 85),
    "avif": (16, 30, 46, 66),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One baseline setting.

    Attributes:
        codec: ``jpeg``, ``webp`` or ``avif``.
        quality: as Pillow counts it.
        size_px: pictures are reduced before encoding, and enlarged again after decoding, as if the model's input had a shorter
            side of this many pixels.
    """

    codec: str
    quality: int
    size_px: int

    def __str__(self) -> str:
        return f"{self.codec} q{self.quality} {self.size_px} px"


def ladder(codec: str, input_px: int, qualities: tuple[int, ...] | None = None, *, detector: bool = False) -> list[Setting]:
    """Every setting of one codec for a model whose input's shorter side is ``input_px``.

    Raises:
        ConfigError: the codec is unknown, or this Pillow was built without it.
    """
    if codec not in OPTIONS:
        raise ConfigError(f"image codec {codec!r} is unknown; there are {', '.join(OPTIONS)}")
    if codec != "jpeg" and not features.check(codec):
        raise ConfigError(f"this Pillow cannot write {codec}; install Pillow 11.3 or newer from PyPI")
    sizes = [round(input_px * share) for share in (DETECTOR_SHARES if detector else CLASSIFIER_SHARES)]
    chosen = qualities or (DETECTOR_QUALITIES if detector else QUALITIES)[codec]
    return [Setting(codec=codec, quality=q, size_px=s) for s in sizes for q in chosen]


def encode(picture: Picture, setting: Setting, input_px: int | None = None) -> bytes:
    """The compressed picture, reduced first where the setting says so.

    Args:
        picture: the input, or a letterboxed input's content.
        setting: the codec's.
        input_px: the shorter side of the model's input; the picture's own when None.
    """
    h, w = picture.shape[:2]
    scale = setting.size_px / (input_px or min(h, w))
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    small = picture if scale >= 1 else cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(small[..., ::-1])).save(out, quality=setting.quality, **OPTIONS[setting.codec])
    return out.getvalue()


def decode(data: bytes, height_px: int, width_px: int) -> Picture:
    """Decoded and, where it was reduced, enlarged again (bicubic)."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = np.ascontiguousarray(np.asarray(opened.convert("RGB"))[..., ::-1])
    if picture.shape[:2] != (height_px, width_px):
        picture = cv2.resize(picture, (width_px, height_px), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)
    return picture
