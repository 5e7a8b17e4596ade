"""From a captured frame to the model's input, and boxes back: numpy and OpenCV only, shared by device and server.

Shape legend: frames are (H, W, 3) uint8 BGR as OpenCV delivers them; inputs are (1, 3, h, w) float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError
from splitters.bundle.manifest import Preprocess

Frame = NDArray[np.uint8]
Floats = NDArray[np.float32]

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
    if spec.resize == "stretch":
        return Geometry(scale_x=in_w / width_px, scale_y=in_h / height_px, offset_x_px=0.0, offset_y_px=0.0)
    scaled_w, scaled_h = _scaled(spec, width_px, height_px)
    if spec.resize == "letterbox":
        dx, dy = ((in_w - scaled_w) // 2, (in_h - scaled_h) // 2) if spec.anchor == "centre" else (0, 0)
    else:
        dx, dy = -((scaled_w - in_w) // 2), -((scaled_h - in_h) // 2)
    return Geometry(scale_x=scaled_w / width_px, scale_y=scaled_h / height_px, offset_x_px=float(dx), offset_y_px=float(dy))


def _scaled(spec: Preprocess, width_px: int, height_px: int) -> tuple[int, int]:
    in_h, in_w = spec.size_px
    if spec.resize == "letterbox":
        ratio = min(in_w / width_px, in_h / height_px)
        return max(1, min(in_w, round(width_px * ratio))), max(1, min(in_h, round(height_px * ratio)))
    ratio = spec.resize_px / min(width_px, height_px)
    return max(in_w, round(width_px * ratio)), max(in_h, round(height_px * ratio))


def _resize(frame: Frame, width_px: int, height_px: int, interpolation: str) -> Frame:
    if frame.shape[1] == width_px and frame.shape[0] == height_px:
        return frame
    shrinking = frame.shape[1] > width_px or frame.shape[0] > height_px
    flag = _FLAGS["area" if shrinking else "bicubic"] if interpolation == "auto" else _FLAGS[interpolation]
    return cv2.resize(frame, (width_px, height_px), interpolation=flag).astype(np.uint8, copy=False)


def input_image(frame: Frame, spec: Preprocess) -> Frame:
    """The model's own input as a picture: resized and cropped or letterboxed, (h, w, 3) uint8 BGR.

    Raises:
        SourceError: the frame is no (H, W, 3) uint8 picture.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
        raise SourceError(f"a frame must be a (height, width, 3) uint8 picture, got {frame.shape} {frame.dtype}")
    in_h, in_w = spec.size_px
    height, width = frame.shape[:2]
    if spec.resize == "stretch":
        return _resize(frame, in_w, in_h, spec.interpolation)
    scaled_w, scaled_h = _scaled(spec, width, height)
    g = geometry(spec, width, height)
    if spec.resize == "shortest" and scaled_w * scaled_h > _MAX_SCALED * in_w * in_h:
        return _middle(frame, spec, g)
    scaled = _resize(frame, scaled_w, scaled_h, spec.interpolation)
    x, y = int(g.offset_x_px), int(g.offset_y_px)
    if spec.resize == "shortest":
        return np.ascontiguousarray(scaled[-y : -y + in_h, -x : -x + in_w])
    canvas = np.full((in_h, in_w, 3), spec.pad, np.uint8)
    canvas[y : y + scaled_h, x : x + scaled_w] = scaled
    return canvas


def _middle(frame: Frame, spec: Preprocess, g: Geometry) -> Frame:
    """The same crop of a picture so narrow that it could not be scaled as a whole: 3 x 9000 px would become 256 x 768,000."""
    in_h, in_w = spec.size_px
    height, width = frame.shape[:2]
    spans = []
    for size, scale, offset, limit in ((in_w, g.scale_x, g.offset_x_px, width), (in_h, g.scale_y, g.offset_y_px, height)):
        first, last = -offset / scale, (size - offset) / scale
        spans.append((max(0, math.floor(first) - _MARGIN_PX), min(limit, math.ceil(last) + _MARGIN_PX)))
    (left, right), (top, bottom) = spans
    part_w, part_h = round((right - left) * g.scale_x), round((bottom - top) * g.scale_y)
    scaled = _resize(np.ascontiguousarray(frame[top:bottom, left:right]), part_w, part_h, spec.interpolation)
    x = min(max(0, round(-g.offset_x_px - left * g.scale_x)), part_w - in_w)
    y = min(max(0, round(-g.offset_y_px - top * g.scale_y)), part_h - in_h)
    return np.ascontiguousarray(scaled[y : y + in_h, x : x + in_w])


def normalise(image: Frame, spec: Preprocess) -> Floats:
    """A (h, w, 3) BGR picture as the (1, 3, h, w) float32 input."""
    mean = np.array(spec.mean, np.float32) * 255
    std = np.array(spec.std, np.float32) * 255
    ordered = image[..., ::-1] if spec.channel_order == "rgb" else image
    return np.ascontiguousarray(((ordered.astype(np.float32) - mean) / std).transpose(2, 0, 1)[None])


def preprocess(frame: Frame, spec: Preprocess) -> Floats:
    """``input_image`` then ``normalise``."""
    return normalise(input_image(frame, spec), spec)
