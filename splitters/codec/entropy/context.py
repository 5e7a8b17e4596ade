"""Contexts: what is expected of a symbol from the symbols decoded before it, in exact integers.

A layer is decoded in five passes over a coarse-to-fine lattice (as in multi-resolution image coding; the last two
passes are a checkerboard, He et al. 2021, arXiv 2103.15306). In each pass every symbol gets a mean and a scale, linear
in: co-located symbols of earlier layers, its four nearest cells of earlier passes in its own channel, and activity
(absolute sums) of both. Mean and scale choose a frozen table for the rounded residual.

Everything is a float that holds an integer, so matrix products are exact in any order, on any processor and with any number
of threads. Weights of a trained codec keep every sum below 2^24, where float32 is exact and takes half of the time; those that
could exceed it are computed in float64, exact below 2^53 (`exact_dtype`).

Shape legend: C channels, L layers, H x W cells, S = (H + 4)(W + 4) padded cells, P cells of a pass, G channels of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Exact = NDArray[np.floating[Any]]
Integers = NDArray[np.int32]
Index = NDArray[np.intp]

PASSES = 5
PAD = 2
UNIT = 256  # weights, means and scales are in 1/256
MAX_FEATURE = 127
MAX_MEAN = 2047 * UNIT
FRACTIONS = 8
SCALES = 25
TABLES = SCALES * FRACTIONS
_SCALE_LIMIT = 8191
_SINGLE_LIMIT = 2**24

_OFFSETS: tuple[tuple[tuple[int, int], ...], ...] = (
    (),
    ((2, 2), (2, -2), (-2, 2), (-2, -2)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
)


def scale_thresholds() -> NDArray[np.int64]:
    """Upper edges of the scale classes in 1/256: 0.02 * 1.35^k, (SCALES - 1,)."""
    edges: Exact = UNIT * 0.02 * 1.35 ** np.arange(SCALES - 1, dtype=np.float64)
    return np.rint(edges).astype(np.int64)


_SCALE_CLASS = np.searchsorted(scale_thresholds(), np.arange(_SCALE_LIMIT + 1), side="right").astype(np.intp) * FRACTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Cells that are decoded together, as flat indices.

    Attributes:
        cells: (P,) into the padded plane.
        raster: (P,) into the H x W plane.
        near: (n, P) the nearest cells of earlier passes, in the padded plane; n is 0 or 4.
    """

    cells: Index
    raster: Index
    near: Index


class Geometry:
    """Passes and neighbours of an H x W plane."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.stride = width + 2 * PAD
        self.size = (height + 2 * PAD) * self.stride
        y, x = np.divmod(np.arange(height * width), width)
        even = (y % 2 == 0) & (x % 2 == 0)
        number = np.full(height * width, 4)
        number[(y % 2 == 1) & (x % 2 == 1)] = 3
        number[even & ((y + x) % 4 == 2)] = 2
        number[(y % 4 == 2) & (x % 4 == 2)] = 1
        number[(y % 4 == 0) & (x % 4 == 0)] = 0
        padded = (y + PAD) * self.stride + x + PAD
        self.passes = []
        for k in range(PASSES):
            raster = np.flatnonzero(number == k)
            cells = padded[raster]
            offsets = np.array([dy * self.stride + dx for dy, dx in _OFFSETS[k]], dtype=np.intp)
            self.passes.append(Pass(cells=cells, raster=raster, near=cells[None, :] + offsets[:, None]))

    def pad(self, tensor: NDArray[np.integer] | Exact, dtype: type[np.floating[Any]] = np.float64) -> Exact:
        """(C, H, W) to (C, S)."""
        out = np.zeros((tensor.shape[0], self.height + 2 * PAD, self.stride), dtype)
        out[:, PAD:-PAD, PAD:-PAD] = tensor
        return out.reshape(len(out), self.size)

    def activity(self, planes: Exact) -> Exact:
        """Absolute sum over channels, and that summed over 3 x 3 cells: (G, S) to (2, S)."""
        alone = np.abs(planes).sum(axis=0)
        rows = alone.copy()
        rows[1:] += alone[:-1]
        rows[:-1] += alone[1:]
        box = rows.copy()
        box[self.stride :] += rows[: -self.stride]
        box[: -self.stride] += rows[self.stride :]
        return np.stack([alone, box])


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One tier's weights, integers in 1/256, held as float32 or float64.

    Attributes:
        mean_bias, mean_near, scale_bias, scale_near, scale_near_all: (PASSES, C).
        mean_earlier: (PASSES, C, C), of co-located symbols; only columns of earlier layers are used.
        scale_earlier: (PASSES, C, 2 L), of earlier layers' activity.
    """

    mean_bias: Exact
    mean_near: Exact
    mean_earlier: Exact
    scale_bias: Exact
    scale_near: Exact
    scale_near_all: Exact
    scale_earlier: Exact


WEIGHT_NAMES = tuple(Weights.__dataclass_fields__)


def weight_shapes(channels: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Shape of each of `WEIGHT_NAMES`."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(WEIGHT_NAMES, (PASSES, channels))
    return shapes | {
        "mean_earlier": (PASSES, channels, channels),
        "scale_earlier": (PASSES, channels, 2 * layers),
    }


def exact_dtype(weights: Weights, layers: tuple[int, ...]) -> type[np.floating[Any]]:
    """The shorter float in which no mean, no scale and no part of their sums can be inexact; layers end at ``layers``."""
    groups = np.diff((0, *layers))
    near = MAX_FEATURE * max(map(len, _OFFSETS))
    activity = MAX_FEATURE * np.stack([groups, 9 * groups], axis=1).ravel()
    mean = abs(weights.mean_bias) + abs(weights.mean_near) * near + abs(weights.mean_earlier).sum(axis=2) * MAX_FEATURE
    scale = abs(weights.scale_bias) + abs(weights.scale_near) * near + abs(weights.scale_near_all) * near * groups.max()
    scale += (abs(weights.scale_earlier) * activity).sum(axis=2)
    return np.float32 if max(mean.max(), scale.max(), near * groups.sum()) < _SINGLE_LIMIT else np.float64


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One pass over one layer's channels ``start:stop``; ``layer`` counts from 0."""

    layer: int
    start: int
    stop: int
    number: int


@dataclass(kw_only=True, slots=True)
class State:
    """What has been decoded so far.

    Attributes:
        planes: (C, S) saturated symbols; zero where not decoded.
        activity: (2 L, S), rows of layers not decoded are unused.
    """

    planes: Exact
    activity: Exact


def predict(geometry: Geometry, weights: Weights, state: State, stage: Stage) -> tuple[Exact, Exact]:
    """Mean and scale of every symbol of a stage, in 1/256: two (G, P)."""
    k, rows = stage.number, slice(stage.start, stage.stop)
    where = geometry.passes[k]
    mean = np.repeat(weights.mean_bias[k, rows, None], len(where.cells), axis=1)
    scale = np.repeat(weights.scale_bias[k, rows, None], len(where.cells), axis=1)
    if len(where.near):
        near = state.planes[rows].take(where.near, axis=1)
        mean += weights.mean_near[k, rows, None] * near.sum(axis=1)
        around = np.abs(near, out=near).sum(axis=1)
        scale += weights.scale_near[k, rows, None] * around
        scale += weights.scale_near_all[k, rows, None] * around.sum(axis=0)
    if stage.layer:
        mean += weights.mean_earlier[k, rows, : stage.start] @ state.planes[: stage.start].take(where.cells, axis=1)
        scale += weights.scale_earlier[k, rows, : 2 * stage.layer] @ state.activity[: 2 * stage.layer].take(where.cells, axis=1)
    return mean, scale


def choose(mean: Exact, scale: Exact) -> tuple[Integers, Index]:
    """Turns means and scales (in 1/256) into rounded means and table rows, of the same shape."""
    shifted = np.clip(mean, -MAX_MEAN, MAX_MEAN).astype(np.int32)
    shifted += UNIT // 2
    row = _SCALE_CLASS.take(scale.astype(np.intp), mode="clip")
    row += (shifted & (UNIT - 1)) >> 5
    return shifted >> 8, row
