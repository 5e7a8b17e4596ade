"""Which cells change, and how: the part of a predicted frame that is coded first.

A camera that stands still sees most cells unchanged, so one flag a cell is coded before anything else, and a cell without change
costs nothing more. The flags go through the same coarse-to-fine passes as symbols do (`splitters.codec.entropy.context`); each is
expected from its nearest cells of earlier passes and from when the reference's own cells last changed. A changed cell then
names its mode (`splitters.codec.predicted.motion`), expected from the mode it had last.

Shape legend: H x W cells, S padded cells, P cells of a pass, K changed cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitters.codec.entropy.coder import Decoder, Encoder, TableSet
from splitters.codec.entropy.context import PASSES, Geometry
from splitters.codec.predicted.motion import MODES

History = NDArray[np.uint8]

# One byte a cell: frames since it changed (saturated) above, the mode of its last change below.
OLD = 15
_NO_MODE = 15
_AGES = np.array([0, 1, 1, 1] + [2] * 11 + [3], dtype=np.intp)  # age → class
_AROUND = np.array([0, 1, 1, 2, 2, 2, 3, 3, 3, 3], dtype=np.intp)  # changed cells in 3 x 3 → class
DENSITIES = 4
_DENSITY_EDGES = (0.008, 0.03, 0.1)  # shares of the cells
_OWN, _BOX, _NEAR = 4, 4, 5
MAP_ROWS = DENSITIES * PASSES * _NEAR * _OWN * _BOX
MODE_ROWS = _NO_MODE + 1


def unknown_history(height: int, width: int) -> History:
    """A key frame's: nothing is known to have changed."""
    return np.full((height, width), OLD << 4 | _NO_MODE, np.uint8)


def next_history(history: History, changed: NDArray[np.bool_], modes: NDArray[np.int64]) -> History:
    """The history after a frame in which the flat cells `changed` (H * W,) took `modes` (K,)."""
    flat = history.ravel()
    age = np.minimum((flat >> 4) + 1, OLD).astype(np.uint8)
    out: History = (age << 4 | flat & 15).astype(np.uint8)
    out[changed] = modes.astype(np.uint8)
    reshaped: History = out.reshape(history.shape)
    return reshaped


def density(changed: NDArray[np.bool_]) -> int:
    """The class of a frame by the share of its cells that change."""
    return int(np.searchsorted(_DENSITY_EDGES, changed.mean(), side="right"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeTables:
    """Frozen tables of flags (`MAP_ROWS` rows of 2) and modes (`MODE_ROWS` rows of `MODES`)."""

    flags: TableSet
    modes: TableSet


class ChangeWalk:
    """The flags of one frame, pass by pass, with the contexts they give.

    Args:
        geometry: of the plane.
        history: the reference's.
        density: the frame's class.
    """

    def __init__(self, geometry: Geometry, history: History, density: int) -> None:
        self._geometry = geometry
        age = history.ravel() >> 4
        fresh = geometry.pad((age == 0).reshape(1, *history.shape))
        around = geometry.activity(fresh)[1].astype(np.intp)
        self._own = _AGES[age] * _BOX
        self._around = _AROUND[around]
        self._density = density
        self._known = np.zeros(geometry.size, np.intp)

    def rows(self, number: int) -> NDArray[np.intp]:
        """Table rows (P,) of a pass."""
        where = self._geometry.passes[number]
        near = self._known.take(where.near).sum(axis=0) if len(where.near) else np.zeros(len(where.cells), np.intp)
        start = (self._density * PASSES + number) * _NEAR
        rows: NDArray[np.intp] = (start + near) * (_OWN * _BOX) + self._own[where.raster] + self._around[where.cells]
        return rows

    def accept(self, number: int, flags: NDArray[np.int32]) -> None:
        """Takes a pass's flags (P,) as known."""
        self._known[self._geometry.passes[number].cells] = flags


def mode_rows(history: History, changed: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Table rows (K,) of the changed cells' modes."""
    rows: NDArray[np.intp] = (history.ravel()[changed] & 15).astype(np.intp)
    return rows


def put_changes(
    encoder: Encoder,
    tables: ChangeTables,
    geometry: Geometry,
    history: History,
    changed: NDArray[np.bool_],
    modes: NDArray[np.int64],
) -> None:
    """Codes flags (H * W,) and modes (K,); the frame's density class is told elsewhere."""
    walk = ChangeWalk(geometry, history, density(changed))
    for number, where in enumerate(geometry.passes):
        flags = changed[where.raster].astype(np.int32)
        encoder.put(flags, tables.flags, walk.rows(number))
        walk.accept(number, flags)
    encoder.put(modes.astype(np.int32), tables.modes, mode_rows(history, changed))


def get_changes(
    decoder: Decoder, tables: ChangeTables, geometry: Geometry, history: History, density: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Reads what `put_changes` wrote.

    Raises:
        PayloadError: the bytes cannot have come from these tables.
    """
    walk = ChangeWalk(geometry, history, density)
    changed = np.zeros(geometry.height * geometry.width, bool)
    for number, where in enumerate(geometry.passes):
        flags = decoder.get(tables.flags, walk.rows(number))
        changed[where.raster] = flags > 0
        walk.accept(number, flags)
    modes = decoder.get(tables.modes, mode_rows(history, changed)).astype(np.int64)
    return changed, modes


__all__ = [
    "DENSITIES", "MAP_ROWS", "MODES", "MODE_ROWS", "ChangeTables", "ChangeWalk", "History", "density", "get_changes", "mode_rows",
    "next_history", "put_changes", "unknown_history",
]  # fmt: skip
