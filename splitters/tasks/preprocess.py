"""From a captured frame to the model's input, and boxes back: numpy, OpenCV and Pillow only, shared by device and server.

Shape legend: frames are (H, W, 3) uint8 BGR as OpenCV delivers them; inputs are (1, 3, h, w) float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError
from splitters.bundle.manifest import Preprocess

Frame = NDArray[np.uint8]
Floats = NDArray[np.float32]

BLANK: Frame = np.zeros((8, 8, 3), np.uint8)
"""The picture of a frame that has none, for models that take none."""

_MAX_SCALED = 16  # times the input's pixels
_MARGIN_PX = 4  # source pixels around what is seen, which the interpolation looks at

_FLAGS = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How source pixels map to input pixels: ``input = source * scale + offset``, per axis."""

    scale_x: float
    scale_y: float
    offset_x_px: float
    offset_y_px: float

    def to_source(self, boxes_px: Floats, width_px: int, height_px: int) -> Floats:
        """Maps (K, 4) xyxy boxes from input to source-frame pixels, clipped to the frame."""
        scale = np.array([self.scale_x, self.scale_y] * 2, np.float32)
        offset = np.array([self.offset_x_px, self.offset_y_px] * 2, np.float32)
        limit = np.array([width_px, height_px] * 2, np.float32)
        mapped: Floats = np.clip((boxes_px - offset) / scale, 0, limit).astype(np.float32)
        return mapped


def geometry(spec: Preprocess, width_px: int, height_px: int) -> Geometry:
    """The mapping for a source frame of that size; the same on device and server."""
    in_h, in_w = spec.size_px
    scaled_w, scaled_h = _scaled(spec, width_px, height_px)
    corner = spec.resize == "letterbox" and spec.anchor == "top_left"
    dx, dy = _offset(scaled_w, in_w, corner=corner), _offset(scaled_h, in_h, corner=corner)
    return Geometry(scale_x=scaled_w / width_px, scale_y=scaled_h / height_px, offset_x_px=float(dx), offset_y_px=float(dy))


def _scaled(spec: Preprocess, width_px: int, height_px: int) -> tuple[int, int]:
    """(width, height) of the scaled picture, rounded as torchvision rounds a short side, and timm a box."""
    box_h, box_w = spec.box_px or spec.size_px
    if spec.resize == "stretch":
        return box_w, box_h
    if spec.resize == "shortest":
        long = int(spec.resize_px * max(width_px, height_px) / min(width_px, height_px))
        return (spec.resize_px, long) if width_px <= height_px else (long, spec.resize_px)
    ratios = (height_px / box_h, width_px / box_w)
    ratio = max(ratios) if spec.resize == "letterbox" else min(ratios)
    return max(1, round(width_px / ratio)), max(1, round(height_px / ratio))


def _offset(scaled_px: int, input_px: int, *, corner: bool) -> int:
    """Where the scaled picture begins in the input, negative where it is cut; half pixels are rounded as by torchvision's crop."""
    if scaled_px >= input_px:
        return -round((scaled_px - input_px) / 2)
    return 0 if corner else (input_px - scaled_px) // 2


def _resize(frame: Frame, width_px: int, height_px: int, spec: Preprocess, box: tuple[float, ...] | None = None) -> Frame:
    """Scales a picture, or (Pillow) the ``box`` of it."""
    if frame.shape[1] == width_px and frame.shape[0] == height_px and box is None:
        return frame
    shrinking = frame.shape[1] > width_px or frame.shape[0] > height_px
    name = spec.interpolation if spec.interpolation != "auto" else "area" if shrinking else "bicubic"
    if spec.resampler == "opencv":
        return cv2.resize(frame, (width_px, height_px), interpolation=_FLAGS[name]).astype(np.uint8, copy=False)
    from PIL import Image

    filters = {"area": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    # Every channel is scaled by itself, so their order does not matter.
    return np.asarray(Image.fromarray(frame).resize((width_px, height_px), filters[name], box=cast("Any", box)))


def input_image(frame: Frame, spec: Preprocess) -> Frame:
    """The model's own input as a picture: scaled, then cropped or padded, (h, w, 3) uint8 BGR.

    Raises:
        SourceError: the frame is no (H, W, 3) uint8 picture.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
        raise SourceError(f"a frame must be a (height, width, 3) uint8 picture, got {frame.shape} {frame.dtype}")
    in_h, in_w = spec.size_px
    height, width = frame.shape[:2]
    scaled_w, scaled_h = _scaled(spec, width, height)
    g = geometry(spec, width, height)
    x, y = int(g.offset_x_px), int(g.offset_y_px)
    seen = (max(0, -x), max(0, -y), min(scaled_w, in_w - x), min(scaled_h, in_h - y))
    if scaled_w * scaled_h > _MAX_SCALED * in_w * in_h:
        part = _part(frame, spec, g, seen)
    else:
        part = _resize(frame, scaled_w, scaled_h, spec)[seen[1] : seen[3], seen[0] : seen[2]]
    if part.shape[:2] == (in_h, in_w):
        return np.ascontiguousarray(part)
    colour = spec.pad if isinstance(spec.pad, int) else spec.pad[::-1]
    canvas = np.full((in_h, in_w, 3), colour, np.uint8)
    canvas[y + seen[1] : y + seen[3], x + seen[0] : x + seen[2]] = part
    return canvas


def _part(frame: Frame, spec: Preprocess, g: Geometry, seen: tuple[int, int, int, int]) -> Frame:
    """What is seen of a picture so narrow that it could not be scaled as a whole: 3 x 9000 px would become 256 x 768,000.

    Args:
        frame: the picture.
        spec: how it is scaled.
        g: by how much.
        seen: left, top, right and bottom of the part, in scaled pixels.
    """
    (seen_w, seen_h), (height, width) = (seen[2] - seen[0], seen[3] - seen[1]), frame.shape[:2]
    if spec.resampler == "pillow":
        box = (seen[0] / g.scale_x, seen[1] / g.scale_y, min(width, seen[2] / g.scale_x), min(height, seen[3] / g.scale_y))
        return _resize(frame, seen_w, seen_h, spec, box)
    spans = []
    for low, high, scale, limit in ((seen[0], seen[2], g.scale_x, width), (seen[1], seen[3], g.scale_y, height)):
        spans.append((max(0, math.floor(low / scale) - _MARGIN_PX), min(limit, math.ceil(high / scale) + _MARGIN_PX)))
    (left, right), (top, bottom) = spans
    part_w = max(seen_w, round((right - left) * g.scale_x))
    part_h = max(seen_h, round((bottom - top) * g.scale_y))
    scaled = _resize(np.ascontiguousarray(frame[top:bottom, left:right]), part_w, part_h, spec)
    x = min(max(0, round(seen[0] - left * g.scale_x)), part_w - seen_w)
    y = min(max(0, round(seen[1] - top * g.scale_y)), part_h - seen_h)
    return scaled[y : y + seen_h, x : x + seen_w]


def normalise(image: Frame, spec: Preprocess) -> Floats:
    """A (h, w, 3) BGR picture as the (1, 3, h, w) float32 input."""
    mean = np.array(spec.mean, np.float32) * 255
    std = np.array(spec.std, np.float32) * 255
    ordered = image[..., ::-1] if spec.channel_order == "rgb" else image
    return np.ascontiguousarray(((ordered.astype(np.float32) - mean) / std).transpose(2, 0, 1)[None])


def preprocess(frame: Frame, spec: Preprocess) -> Floats:
    """``input_image`` then ``normalise``."""
    return normalise(input_image(frame, spec), spec)
