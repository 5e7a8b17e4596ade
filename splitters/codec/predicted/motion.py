"""Where a cell's symbols come from: the reference's own cell, a place beside it, or nothing.

A latent's cell covers 16 pixels or so, and things move by less than that between two frames. So a changed cell is predicted
from the reference displaced by halves of a cell (a two-dimensional linear interpolation, as in half-pel motion compensation)
in one of `DISPLACEMENTS`, or from nothing where the scene is new (`FRESH`). Everything is an integer in quarters of a symbol.

Shape legend: C channels, H x W cells, K cells that are looked at, M modes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Quarters = NDArray[np.int32]
Index = NDArray[np.intp]

# (rows, columns) in cells, nearest first; the last of the modes, after these, is FRESH.
DISPLACEMENTS: tuple[tuple[float, float], ...] = (
    (0, 0), (0, -0.5), (0, 0.5), (-0.5, 0), (0.5, 0), (-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5),
    (0, -1), (0, 1), (-1, 0), (1, 0),
)  # fmt: skip
STILL = 0
FRESH = len(DISPLACEMENTS)
MODES = FRESH + 1
_AROUND = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))


def _weights() -> NDArray[np.int32]:
    """Quarters that each of the 3 x 3 cells around gives to a mode's prediction, (M, 9)."""
    out = np.zeros((MODES, len(_AROUND)), np.int32)
    for mode, shift in enumerate(DISPLACEMENTS):
        for near, at in enumerate(_AROUND):
            share = [max(0.0, 1 - abs(a - s)) for a, s in zip(at, shift, strict=True)]
            out[mode, near] = round(4 * share[0] * share[1])
    return out


def _taps(weights: NDArray[np.int32]) -> tuple[Index, NDArray[np.int32]]:
    """The four cells around at most that a mode takes from, and what each gives: two (M, 4)."""
    order = np.argsort(-weights, axis=1, kind="stable")[:, :4]
    return order.astype(np.intp), np.take_along_axis(weights, order, axis=1)


WEIGHTS = _weights()
_TAPS, _GIVES = _taps(WEIGHTS)
_SHARES = (WEIGHTS / np.float32(4)).astype(np.float32)


def neighbours(height: int, width: int) -> Index:
    """The 3 x 3 cells around every cell, those outside replaced by the nearest inside: (9, H * W)."""
    y, x = np.divmod(np.arange(height * width), width)
    near = [np.clip(y + dy, 0, height - 1) * width + np.clip(x + dx, 0, width - 1) for dy, dx in _AROUND]
    return np.stack(near).astype(np.intp)


def candidates(reference: NDArray[np.int16], near: Index, cells: Index) -> NDArray[np.float32]:
    """What every mode predicts for some cells, in symbols: (M, C, K).

    Args:
        reference: (C, H * W).
        near: from `neighbours`.
        cells: (K,).
    """
    around = np.empty((len(near), len(reference), len(cells)), np.float32)
    for place, found in zip(near[:, cells], around, strict=True):
        found[...] = reference.take(place, axis=1)
    offered: NDArray[np.float32] = (_SHARES @ around.reshape(len(near), -1)).reshape(MODES, *around.shape[1:])
    return offered


def predicted(reference: NDArray[np.int16], near: Index, cells: Index, modes: NDArray[np.int64]) -> Quarters:
    """What each cell's own mode predicts, in quarters of a symbol: (C, K); exact."""
    found: Quarters = reference.take(cells, axis=1).astype(np.int32)
    found <<= 2
    moved = np.flatnonzero(modes != STILL)
    if len(moved):
        taps, gives, at = _TAPS[modes[moved]], _GIVES[modes[moved]], cells[moved]
        total = np.zeros((len(reference), len(moved)), np.int32)
        for tap in range(taps.shape[1]):
            total += reference.take(near[taps[:, tap], at], axis=1) * gives[:, tap]
        found[:, moved] = total
    return found
