"""Masks and class maps as run lengths, and their way from a model's grid to a source frame."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import ProtocolError
from splitters.bundle.manifest import Preprocess
from splitters.tasks.preprocess import geometry

Floats = NDArray[np.float32]
MAX_PIXELS = 1 << 21  # of a mask; a larger frame's is coarser by a whole factor

Runs = tuple[NDArray[np.int32], NDArray[np.int32]]


def encode(values: NDArray[Any]) -> Runs:
    """A map (H, W) of small integers or booleans, row by row: the length of each run, and its value."""
    flat = np.ascontiguousarray(values).ravel().astype(np.int32)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]) if flat.size else np.zeros(0, np.int64)
    return np.diff(np.concatenate([starts, [flat.size]])).astype(np.int32), flat[starts]


def decode(lengths: NDArray[Any], values: NDArray[Any], size: tuple[int, int]) -> NDArray[np.int32]:
    """The map again.

    Raises:
        ProtocolError: the runs are not a map of that size.
    """
    whole = lengths.astype(np.int64)
    if min(size) < 0 or size[0] * size[1] > MAX_PIXELS or (whole < 0).any() or int(whole.sum()) != size[0] * size[1]:
        raise ProtocolError(f"the runs of a mask do not fill {size[0]}x{size[1]} pixels")
    return np.repeat(values.astype(np.int32), whole).reshape(size)


def mask_size(width_px: int, height_px: int) -> tuple[int, int]:
    """(height, width) of masks of a frame: its own, or a whole fraction of it where that would be too large."""
    factor = 1
    while -(-width_px // factor) * -(-height_px // factor) > MAX_PIXELS:
        factor += 1
    return -(-height_px // factor), -(-width_px // factor)


def to_frame(grid: Floats, preprocess: Preprocess, width_px: int, height_px: int, *, smooth: bool = True) -> Floats:
    """A map (h, w) over the model's input as one over the source frame, of `mask_size`."""
    height, width = mask_size(width_px, height_px)
    where = geometry(preprocess, width_px, height_px)
    # From a mask's pixel to the frame's, the input's, and the grid's; pixel centres lie at halves.
    to_x, to_y = width_px / width, height_px / height
    on_x, on_y = grid.shape[1] / preprocess.size_px[1], grid.shape[0] / preprocess.size_px[0]
    scale_x, scale_y = to_x * where.scale_x * on_x, to_y * where.scale_y * on_y
    offset_x = where.offset_x_px * on_x + 0.5 * scale_x - 0.5
    offset_y = where.offset_y_px * on_y + 0.5 * scale_y - 0.5
    matrix = np.asarray([[scale_x, 0, offset_x], [0, scale_y, offset_y]], np.float64)
    how = (cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST) | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(grid.astype(np.float32), matrix, (width, height), flags=how, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.float32)
