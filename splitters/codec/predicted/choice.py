"""What a camera's frame should say: symbols chosen against the reference, bytes weighed against the error they leave.

Every cell either keeps the reference's symbols, at next to no cost, or is coded from the best of its modes; in a coded cell
every symbol either stays as predicted or moves, whichever costs less of error + price * bits (rate-distortion optimised
quantisation, Sullivan & Wiegand 1998). The error is counted in squared quantiser steps: a bottleneck's channels are scaled so
that a step of each costs the model's outputs the same (`splitters.bottleneck.sensitivity`), and the gains of a tier keep that.

What a decision leaves out is bounded: a cell is skipped only where its error is below what coding it would cost. One in
`TURNS` cells a frame, each in its turn, is held to half of that bound, so that a still scene reaches its finest form.

Shape legend: C channels, H x W cells, K cells that are looked at, M modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitters.codec.predicted.motion import FRESH, MODES, STILL, Quarters, candidates, predicted

Floats = NDArray[np.float32]
Modes = NDArray[np.int64]

DEFAULT_PRICE = 0.2
TURNS = 64
_SKIP_BITS = 0.15
_CELL_BITS = 5.0
_MODE_BITS = np.full((MODES, 1), 4.0, np.float32)
_MODE_BITS[STILL] = 1.0
# Bits for every doubling of a difference, by its size; sizes beyond the table's end count as its last.
_MORE_BITS = (1.5 * np.log2(np.maximum(np.arange(4096), 1))).astype(np.float32)
_WORTH_BITS = 6.0  # a cell that could save less than the price of these is not looked at
_LEADING = 3  # modes are compared on the first third of the channels, which hold most of what changes
_TURN_SHARE = 0.5
_BLOCK = 64  # cells whose modes are compared at once
_MARGIN = 1e-3  # far above what float32 rounds away


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Rough bits of a symbol that stays as predicted, and of one that does not, by channel: (C, 1); or one of all: (1, 1)."""

    same: Floats
    other: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One frame's decisions.

    Attributes:
        values: (C, H * W) symbols.
        changed: (H * W,) cells that do not keep the reference's symbols.
        modes: (K,) of the changed cells, in raster order.
        expected: (C, K) what those predict, quarters of a symbol.
    """

    values: NDArray[np.int16]
    changed: NDArray[np.bool_]
    modes: Modes
    expected: Quarters


def choose_symbols(
    wanted: Floats, reference: NDArray[np.int16], near: NDArray[np.intp], costs: Costs, price: float, turn: int, limit: int
) -> Choice:
    """Decides one frame.

    Args:
        wanted: (C, H * W), latent times gain.
        reference: (C, H * W) symbols in the same tier's units.
        near: from `motion.neighbours`.
        costs: rough bits.
        price: squared steps that a bit is worth; 0: symbols are rounded, whatever they cost.
        turn: which cells are held to less this time.
        limit: largest size of a symbol.
    """
    off = wanted - reference
    steps = np.rint(off)
    # What moving every symbol to its nearest would save; where that is little, nothing else can save much either.
    saved = np.einsum("cn,cn->n", steps, 2 * off - steps)
    prices = np.full(saved.shape, price, np.float32)
    prices[turn % TURNS :: TURNS] *= _TURN_SHARE
    looked = np.flatnonzero(saved > _WORTH_BITS * prices)
    values = reference.copy()
    changed = np.zeros(saved.shape, bool)
    if not len(looked):
        return _unchanged(values, changed)
    target, lam = wanted.take(looked, axis=1), prices[looked]
    lead = max(1, len(wanted) // _LEADING)
    best = _modes(target[:lead], reference[:lead], near, looked, lam)
    expected = predicted(reference, near, looked, best)
    coded, spent = _coded(target, expected.astype(np.float32) * np.float32(0.25), costs, lam)
    spent += lam * (_CELL_BITS + _MODE_BITS[best, 0])
    symbols = np.clip(coded, -limit, limit).astype(np.int16)
    differs = (symbols != reference[:, looked]).any(axis=0)
    take = (spent < np.square(off[:, looked]).sum(axis=0) + lam * _SKIP_BITS) & differs
    cells = looked[take]
    changed[cells] = True
    values[:, cells] = symbols[:, take]
    return Choice(values=values, changed=changed, modes=best[take].astype(np.int64), expected=expected[:, take])


def _modes(target: Floats, reference: NDArray[np.int16], near: NDArray[np.intp], cells: NDArray[np.intp], lam: Floats) -> Modes:
    """Each cell's cheapest mode (K,), some cells at a time: all modes of all cells are memory that the system takes back."""
    best = np.empty(len(cells), np.int64)
    for start in range(0, len(cells), _BLOCK):
        part = slice(start, start + _BLOCK)
        offered = candidates(reference, near, cells[part])
        offered -= target[:, part]
        around = np.square(offered, out=offered).sum(axis=1)
        best[part] = (around + lam[part] * _MODE_BITS).argmin(axis=0)
    return best


def _coded(target: Floats, base: Floats, costs: Costs, lam: Floats) -> tuple[Floats, Floats]:
    """The symbols (C, K) of cells if they are coded, and error + price * bits of each cell (K,)."""
    symbols = np.rint(base)
    off = target - symbols
    spent = np.square(off)
    spent += lam * costs.same
    # One step saves 2 |off| - 1 of the error: below this, moving cannot pay. Above it is looked at exactly.
    least = lam * (0.5 * (costs.other - costs.same)) + np.float32(0.5 - _MARGIN)
    size = np.abs(off)
    at = np.flatnonzero(size >= np.minimum(least, 1, out=least))
    channel, cell = np.divmod(at, off.shape[1])
    size, weight, other = size.take(at), lam[cell], np.broadcast_to(costs.other, (len(off), 1))[channel, 0]
    low, best, chosen = size.astype(np.int32), spent.take(at), np.zeros(len(at), np.float32)
    for step in (low, low + 1):
        move = np.square(size - step) + weight * (other + _MORE_BITS.take(step, mode="clip"))
        better = (move < best) & (step > 0)
        np.copyto(best, move, where=better, casting="same_kind")
        np.copyto(chosen, step, where=better, casting="same_kind")
    spent.put(at, best)
    symbols.put(at, symbols.take(at) + np.copysign(chosen, off.take(at)))
    return symbols, spent.sum(axis=0)


def _unchanged(values: NDArray[np.int16], changed: NDArray[np.bool_]) -> Choice:
    return Choice(values=values, changed=changed, modes=np.zeros(0, np.int64), expected=np.zeros((len(values), 0), np.int32))


def match(values: NDArray[np.int16], reference: NDArray[np.int16], near: NDArray[np.intp]) -> Choice:
    """The cheapest description of symbols (C, H * W) that are given: what changed, and each cell's nearest mode."""
    changed = (values != reference).any(axis=0)
    cells = np.flatnonzero(changed)
    if not len(cells):
        return _unchanged(values, changed)
    offered = candidates(reference, near, cells)
    modes = np.abs(values[:, cells] - offered).sum(axis=1).argmin(axis=0).astype(np.int64)
    return Choice(values=values, changed=changed, modes=modes, expected=predicted(reference, near, cells, modes))


__all__ = ["DEFAULT_PRICE", "FRESH", "Choice", "Costs", "choose_symbols", "match"]
