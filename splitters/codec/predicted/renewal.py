"""The symbols of changed cells: each differs from what its mode predicts, by a little that is expected exactly.

Channels are coded in a few groups, the leading ones first, because they say how much of the others to expect. All cells of a
group are coded in one call: which cells change is known by then, and neighbouring cells tell no more about the size of a
difference than the cell's own leading channels do (measured: .2 % of the bytes). Mean and scale of every symbol are linear in
exact integers and choose a frozen table, as for symbols on their own (`splitters.codec.entropy.context`).

Shape legend: C channels, G channels of a group, K changed cells, F features of a cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitters.codec.entropy.coder import Decoder, Encoder, TableSet
from splitters.codec.entropy.context import Index, Integers, choose
from splitters.codec.entropy.residuals import get_residuals, put_residuals
from splitters.codec.predicted.motion import FRESH, STILL, Quarters

Exact = NDArray[np.float64]

_SHARES = (24, 8, 3, 1)  # a group ends at the channels' number over each of these
_MAX_PREDICTED = 4 * 511
_MAX_DIFFERENCE = 4 * 127
# Features of a cell: constant, still, fresh (16 where they hold), predicted activity, then of every earlier group the sum
# of its differences and the number of its symbols that differ.
_FLAG = 16
_FIXED = 4
MAX_GROUPS = len(_SHARES)
FEATURES = _FIXED + 2 * (MAX_GROUPS - 1)
MEAN_UNIT, SCALE_UNIT = 1024, 16384  # of the weights; those of a prediction's own size are in 1/256 of a quarter


def group_ends(channels: int) -> tuple[int, ...]:
    """Where each group of channels ends; the last is C."""
    return tuple(sorted({max(1, channels // share) for share in _SHARES}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewal:
    """One tier's weights, integers held as float64.

    Attributes:
        mean_bias: (C,) in 1/1024.
        mean_fresh: (C,) in 1/1024, added where the cell is predicted from nothing.
        mean_own: (C,) in 1/256 of the prediction.
        scale_own: (C,) in 1/64 of the prediction's size, quarters.
        scale: (C, FEATURES) in 1/16384.
    """

    mean_bias: Exact
    mean_fresh: Exact
    mean_own: Exact
    scale_own: Exact
    scale: Exact


RENEWAL_NAMES = tuple(Renewal.__dataclass_fields__)


def renewal_shapes(channels: int) -> dict[str, tuple[int, ...]]:
    """Shape of each of `RENEWAL_NAMES`."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(RENEWAL_NAMES, (channels,))
    return shapes | {"scale": (channels, FEATURES)}


@dataclass(kw_only=True, slots=True)
class Cells:
    """The changed cells of one frame.

    Attributes:
        expected: (C, K) quarters.
        size: (C, K) its absolute value.
        fresh: the cells of K that are predicted from nothing.
        features: (FEATURES, K), rows of groups not known are 0.
    """

    expected: Exact
    size: Exact
    fresh: Index
    features: Exact

    @classmethod
    def of(cls, expected: Quarters, modes: NDArray[np.int64]) -> Cells:
        """From what each cell's mode (K,) predicts (C, K)."""
        capped = np.clip(expected, -_MAX_PREDICTED, _MAX_PREDICTED).astype(np.float64)
        features = np.zeros((FEATURES, expected.shape[1]))
        features[0] = _FLAG
        features[1] = _FLAG * (modes == STILL)
        features[2] = _FLAG * (modes == FRESH)
        size = np.abs(capped)
        features[3] = np.floor(size.sum(axis=0) / 32)
        return cls(expected=capped, size=size, fresh=np.flatnonzero(modes == FRESH), features=features)

    def accept(self, group: int, start: int, values: NDArray[np.integer[Any]]) -> None:
        """Takes a group's symbols (G, K), from channel `start` on, as known."""
        if group < MAX_GROUPS - 1:
            off = np.abs(4 * values - self.expected[start : start + len(values)])
            self.features[_FIXED + 2 * group] = np.minimum(off, _MAX_DIFFERENCE).sum(axis=0)
            self.features[_FIXED + 2 * group + 1] = (off > 2).sum(axis=0)


def groups(channels: int, kept: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of every group that the channels kept reach into."""
    start = 0
    for number, stop in enumerate(group_ends(channels)):
        if start < kept:
            yield number, start, min(stop, kept)
        start = stop


def expect(weights: Renewal, cells: Cells, start: int, stop: int) -> tuple[Integers, Index]:
    """Rounded mean (G, K) and table row (G, K) of the symbols of channels ``start:stop``."""
    rows = slice(start, stop)
    expected = cells.expected[rows]
    mean = expected * (256 + weights.mean_own[rows, None])
    mean += weights.mean_bias[rows, None]
    mean[:, cells.fresh] += weights.mean_fresh[rows, None]
    scale = weights.scale[rows] @ cells.features
    scale += weights.scale_own[rows, None] * 64 * cells.size[rows]
    mean *= 0.25
    scale *= 1 / 64
    return choose(np.floor(mean, out=mean), scale)


def put_cells(
    encoder: Encoder, weights: Renewal, tables: TableSet, radius: int, cells: Cells, values: NDArray[np.int16], kept: int
) -> None:
    """Codes the symbols (C, K) of the changed cells; channels not kept are zero and cost nothing."""
    for number, start, stop in groups(len(values), kept):
        mean, rows = expect(weights, cells, start, stop)
        put_residuals(encoder, (values[start:stop] - mean).ravel(), rows.ravel(), tables, radius)
        cells.accept(number, start, values[start:stop])


def get_cells(decoder: Decoder, weights: Renewal, tables: TableSet, radius: int, cells: Cells, kept: int) -> Integers:
    """Reads what `put_cells` wrote, (C, K).

    Raises:
        PayloadError: the bytes cannot have come from these tables.
    """
    values = np.zeros(cells.expected.shape, np.int32)
    for number, start, stop in groups(len(values), kept):
        mean, rows = expect(weights, cells, start, stop)
        values[start:stop] = mean + get_residuals(decoder, rows.ravel(), tables, radius).reshape(mean.shape)
        cells.accept(number, start, values[start:stop])
    return values
