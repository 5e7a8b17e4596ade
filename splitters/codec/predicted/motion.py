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


WEIGHTS = _weights()


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
    around = reference.take(near[:, cells], axis=1).astype(np.float32)  # (C, 9, K)
    shares = (WEIGHTS / np.float32(4)).astype(np.float32)
    found: NDArray[np.float32] = np.tensordot(shares, around, axes=(1, 1))
    return found


def predicted(reference: NDArray[np.int16], near: Index, cells: Index, modes: NDArray[np.int64]) -> Quarters:
    """What each cell's own mode predicts, in quarters of a symbol: (C, K); exact."""
    around = reference.take(near[:, cells], axis=1).astype(np.int32)
    found: Quarters = np.einsum("cnk,nk->ck", around, WEIGHTS[modes].T)
    return found
