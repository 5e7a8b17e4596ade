"""Payloads to what a tail takes: symbols to latents, or a compressed picture to pixels.

Shape legend: latents (C, H, W) float32; pictures (h, w, 3) uint8 BGR.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_server.frames.assembly import ArrivedFrame
from edge_server.models import Model
from protos.errors import LimitError, PayloadError
from protos.messages import PayloadKind
from splitters.bundle.offload import restorable, restore
from splitters.codec import Symbols


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A frame ready for the tail; ``symbols`` is what temporal prediction may refer to later."""

    arrays: tuple[NDArray[Any], ...]
    layers: int = 0
    symbols: Symbols | None = None
    symbols_crc32: int = 0

    @property
    def held(self) -> int:
        """Of a frame in slices with holes, the slices that were there, a bit each; else 0."""
        return self.symbols.held if self.symbols is not None else 0


def decode_frame(model: Model, frame: ArrivedFrame, references: Mapping[int, Symbols], *, max_pixels: int) -> Decoded:
    """Decodes one frame; safe to call from any thread.

    Args:
        model: whose codec.
        frame: with at least its base layer.
        references: this session's decoded symbols by frame id.
        max_pixels: of an offloaded picture.

    Raises:
        PayloadError: the base layer is damaged, or refers to a frame that is no longer held: send a key frame.
        LimitError: larger than a payload of this bundle may be.
    """
    if frame.kind is PayloadKind.VIDEO:
        raise PayloadError("video is decoded where a session holds what its frames depend on: open a session")
    if frame.kind is PayloadKind.IMAGE:
        return Decoded(arrays=(decode_image(b"".join(frame.layers), model.bundle.manifest.preprocess.size_px, max_pixels),))
    symbols = model.codec.decode_slices(frame.layers[0]) if frame.slices else model.codec.decode(frame.layers, references)
    said = {point.id: point.codec_point for point in model.bundle.points}.get(frame.operating_point)
    if said != symbols.point_id:
        held = "which this bundle does not have" if said is None else f"whose payloads are of {said!r}"
        raise PayloadError(
            f"the frame says operating point {frame.operating_point}, {held}; its payload is of {symbols.point_id!r}"
        )
    return Decoded(
        arrays=tuple(model.codec.dequantise(symbols)), layers=symbols.layers, symbols=symbols, symbols_crc32=symbols.crc32()
    )


def decode_image(payload: bytes, size_px: tuple[int, int], max_pixels: int) -> NDArray[np.uint8]:
    """A JPEG or WebP of the model's own input, enlarged again where the device reduced it.

    Args:
        payload: the file's bytes.
        size_px: (height, width) of the model's input.
        max_pixels: checked against the file's header before anything is decoded.

    Raises:
        PayloadError: neither format, damaged, or of another size.
        LimitError: more than ``max_pixels``.
    """
    width, height = image_size(payload)
    if payload.startswith(_JPEG) and (scans := payload.count(_SCAN)) > _MAX_SCANS:
        raise LimitError(f"the picture has {scans} scans; this server decodes at most {_MAX_SCANS}")
    if width * height > max_pixels:
        raise LimitError(f"the picture has {width}x{height} px; this server decodes at most {max_pixels} pixels")
    if not restorable(height, width, size_px):
        raise PayloadError(
            f"an offloaded picture must be the model's input of {size_px[1]}x{size_px[0]} px, or that reduced to a quarter, "
            f"not {width}x{height}"
        )
    try:
        image = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None or image.shape != (height, width, 3):
        raise PayloadError("the offloaded picture cannot be decoded")
    return restore(image.astype(np.uint8, copy=False), size_px)


_JPEG = b"\xff\xd8"
_SCAN = b"\xff\xda"  # within a scan's own data 0xff is followed by 0
_MAX_SCANS = 32  # each goes over all pixels; usual progressive encoders write 10, the most economical fewer than 20
_MAX_SEGMENTS = 256  # before the size; a file from a camera has a dozen


def image_size(payload: bytes) -> tuple[int, int]:
    """(width, height) as a JPEG's or WebP's header says.

    Read here and not by Pillow: to open a WebP, Pillow makes the decoder with its canvas, 124 MB for 8,000 x 8,000 px in
    114 kB, before its size can be asked for and refused.

    Raises:
        PayloadError: it is neither, or ends before its size.
    """
    try:
        if payload.startswith(_JPEG):
            return _jpeg_size(payload)
        if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
            return _webp_size(payload)
    except (struct.error, IndexError) as error:
        raise PayloadError("the offloaded picture ends within its header") from error
    raise PayloadError("an offloaded picture must be a JPEG or a WebP")


# Markers that carry a frame's size: SOF0..15 without DHT (C4), JPG (C8) and DAC (CC).
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at] != 0xFF:
            raise PayloadError("the JPEG's markers are damaged")
        marker = data[at + 1]
        at += 2
        if marker in _BARE or marker == 0xFF:
            at -= marker == 0xFF  # filling
            continue
        if marker in _SOF:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return _positive(width, height)
        if marker in (0xD9, 0xDA):
            raise PayloadError("the JPEG has no size before its pixels")
        (length,) = struct.unpack_from(">H", data, at)
        at += max(2, length)
    raise PayloadError("the JPEG has too much before its size")


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return (
            _positive(1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
            if len(data) >= 30
            else _cut()
        )
    if kind == b"VP8L":
        if data[20] != 0x2F:
            raise PayloadError("the WebP's header is damaged")
        (bits,) = struct.unpack_from("<I", data, 21)
        return _positive((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise PayloadError("the WebP's header is damaged")
        width, height = struct.unpack_from("<HH", data, 26)
        return _positive(width & 0x3FFF, height & 0x3FFF)
    raise PayloadError("the WebP's header is damaged")


def _cut() -> tuple[int, int]:
    raise PayloadError("the offloaded picture ends within its header")


def _positive(width: int, height: int) -> tuple[int, int]:
    if width < 1 or height < 1:
        raise PayloadError("the offloaded picture has no pixels")
    return width, height
