"""What the numbers of a box mean: corners or centre, pixels or cells of a grid, distances or distributions.

Shape legend: N batch, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from protos.errors import BundleError
from splitters.tasks.decoding.columns import Floats, activate, sigmoid


@dataclass(frozen=True, kw_only=True, slots=True)
class BoxForm:
    """What the numbers of a box mean.

    Attributes:
        form: ``cxcywh``, ``xyxy``, ``xywh``, ``yxyx`` or ``ltrb`` (distances from the cell's centre to the sides).
        units: ``pixels`` of the model's input, ``normalised`` to 0..1 of it, or ``grid``: of cells, times the stride.
        size: how width and height are given on a grid: ``exp``, ``plain``, or ``sigmoid_of_input``, a share of the input.
        bins: with a distribution a side (DFL), how many bins a distance has; 0: plain distances.
        strides: of a grid's levels, in the order of the positions.
        cell: where in its cell a distance starts, in cells; with ``shift_px`` added.
        shift_px: see ``cell``.
    """

    form: Literal["cxcywh", "xyxy", "xywh", "yxyx", "ltrb"] = "xyxy"
    units: Literal["pixels", "normalised", "grid"] = "pixels"
    size: Literal["exp", "plain", "sigmoid_of_input"] = "plain"
    bins: int = 0
    strides: tuple[int, ...] = (8, 16, 32)
    cell: float = 0.0
    shift_px: float = 0.0

    def corners(self, raw: Floats, size_px: tuple[int, int]) -> Floats:
        """(N, P, 4 or 4·bins) to xyxy in pixels of the model's input of (height, width).

        Raises:
            BundleError: the columns or positions do not fit.
        """
        wanted = 4 * (self.bins or 1)
        if raw.shape[2] != wanted:
            raise BundleError(f"a box of this form has {wanted} columns, the output has {raw.shape[2]}")
        if self.bins:
            shares = activate(raw.reshape(*raw.shape[:2], 4, self.bins), "softmax")
            raw = (shares @ np.arange(self.bins, dtype=np.float32)).astype(np.float32)
        if self.units == "grid":
            return self._on_grid(raw, size_px)
        scale = np.asarray([size_px[1], size_px[0]] * 2, np.float32) if self.units == "normalised" else np.float32(1)
        if self.form == "yxyx":
            raw = raw[..., [1, 0, 3, 2]]
        return _corners(raw * scale, self.form)

    def _on_grid(self, raw: Floats, size_px: tuple[int, int]) -> Floats:
        cells, stride = grid(size_px, self.strides)
        if len(cells) != raw.shape[1]:
            raise BundleError(
                f"strides {list(self.strides)} give {len(cells)} positions at {size_px} px, the output has {raw.shape[1]}"
            )
        centre = (cells + np.float32(self.cell)) * stride + np.float32(self.shift_px)
        if self.form == "ltrb":
            reach = raw * stride
            return np.concatenate([centre - reach[..., :2], centre + reach[..., 2:]], axis=-1)
        middle = centre + raw[..., :2] * stride
        if self.size == "sigmoid_of_input":
            extent = sigmoid(raw[..., 2:]) * np.asarray([size_px[1], size_px[0]], np.float32)
        else:
            extent = (np.exp(raw[..., 2:]) if self.size == "exp" else raw[..., 2:]) * stride
        return np.concatenate([middle - extent / 2, middle + extent / 2], axis=-1).astype(np.float32)


def _corners(raw: Floats, form: str) -> Floats:
    if form == "cxcywh":
        half = raw[..., 2:] / 2
        return np.concatenate([raw[..., :2] - half, raw[..., :2] + half], axis=-1)
    if form == "xywh":
        return np.concatenate([raw[..., :2], raw[..., :2] + raw[..., 2:]], axis=-1)
    return raw


def grid(size_px: tuple[int, int], strides: Sequence[int]) -> tuple[Floats, Floats]:
    """Cells (P, 2) as x, y, level after level in row-major order, and the stride (P, 1) of each."""
    cells, scale = [], []
    for stride in strides:
        rows, columns = -(-size_px[0] // stride), -(-size_px[1] // stride)
        y, x = np.mgrid[:rows, :columns]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        scale.append(np.full((x.size, 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(scale).astype(np.float32)
