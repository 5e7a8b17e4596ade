"""Fits what predicted frames are coded with, on clips, with the encoder's own choice in the loop.

What is coded depends on the choice (`splitters.codec.predicted.choice`), and the choice on rough costs. Both are found in turn,
from costs that fit any clip. References are one to four frames old, as they are on a real link.

Shape legend: T frames, C channels, H x W cells, K changed cells of all frames together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.codec.entropy.context import TABLES, Exact, Geometry
from splitters.codec.fitting.regression import RADIUS, frequencies, plain_frequencies, scale_fit, solve
from splitters.codec.predicted.change import (
    MAP_ROWS,
    MODE_ROWS,
    ChangeWalk,
    History,
    density,
    mode_rows,
    next_history,
    unknown_history,
)
from splitters.codec.predicted.choice import DEFAULT_PRICE, Costs, choose_symbols
from splitters.codec.predicted.motion import FRESH, MODES, neighbours
from splitters.codec.predicted.renewal import MEAN_UNIT, SCALE_UNIT, Cells, Renewal, expect, groups, renewal_shapes

Latents = NDArray[np.floating[Any]]

COST_UNIT = 64
_PRICES = (0.5, 1.0, 2.0)  # of the tier's own: a bundle's points may weigh bits otherwise than those that were fitted for
_AGES = (1, 1, 2, 1, 1, 3, 1, 4)  # of the reference, in turn
_FIRST = Costs(same=np.full((1, 1), 0.15, np.float32), other=np.full((1, 1), 5.0, np.float32))
_LIMIT = 2000
_MAX_CELLS = 30_000
_SPREAD_BITS = 1.0  # of the sign and the size of a symbol that differs


@dataclass(kw_only=True, slots=True)
class _Seen:
    """What the choice made of all clips at one tier."""

    flags: Exact = field(default_factory=lambda: np.zeros((MAP_ROWS, 2)))
    modes: Exact = field(default_factory=lambda: np.zeros((MODE_ROWS, MODES)))
    expected: list[NDArray[np.int32]] = field(default_factory=list)
    cell_modes: list[NDArray[np.int64]] = field(default_factory=list)
    values: list[NDArray[np.int64]] = field(default_factory=list)


def fit_predicted(
    clips: Sequence[Latents],
    gains: NDArray[np.floating[Any]],
    *,
    prices: Sequence[float] = (),
    known: Sequence[Costs] = (),
    progress: Callable[[str], None] | None = None,
) -> dict[str, NDArray[np.integer[Any]]]:
    """The arrays of `tables.Predicted`, by their names in the file.

    Args:
        clips: latents of successive frames of fixed cameras, (T, C, H, W) each; two frames are the least.
        gains: (tiers, C).
        prices: of a bit at each tier, as the codec's points have them; empty: the default.
        known: each tier's rough costs, which then stay as they are, and the encoder's choice with them; empty: fitted too.
        progress: told in words how far the fit is.

    Raises:
        ConfigError: clips of other shapes, or in which nothing ever moves.
    """
    channels = gains.shape[1]
    if any(c.ndim != 4 or c.shape[1] != channels or len(c) < 2 for c in clips):
        raise ConfigError(f"fitting prediction needs clips of two frames or more with {channels} channels")
    if prices and len(prices) != len(gains):
        raise ConfigError(f"{len(gains)} tiers have {len(gains)} prices, not {len(prices)}")
    flags, modes = np.zeros((MAP_ROWS, 2)), np.zeros((MODE_ROWS, MODES))
    counts = np.zeros((TABLES, 2 * RADIUS + 1))
    weights, costs = [], []
    for tier, (gain, price) in enumerate(zip(gains, prices or [DEFAULT_PRICE] * len(gains), strict=True)):
        if progress is not None:
            progress(f"fitting prediction, tier {tier + 1} of {len(gains)}")
        rough = known[tier] if known else _costs(_watch(clips, gain, _FIRST, price), channels)
        seen = _watch(clips, gain, rough, price)
        costs.append(rough if known else _costs(seen, channels))
        flags += seen.flags
        modes += seen.modes
        weights.append(_fit_cells(seen, channels, counts))
    stacked = {f"predicted/{n}": np.stack([w[n] for w in weights]).astype(np.int16) for n in renewal_shapes(channels)}
    told = np.stack([np.stack([c.same, c.other]) for c in costs])
    return stacked | {
        "predicted/tables": frequencies(counts), "predicted/flags": plain_frequencies(flags),
        "predicted/modes": plain_frequencies(modes, prior=4.0), "predicted/costs": np.rint(told * COST_UNIT).astype(np.int16),
    }  # fmt: skip


def _watch(clips: Sequence[Latents], gain: NDArray[np.floating[Any]], costs: Costs, price: float) -> _Seen:
    """Runs the choice over all clips, each frame predicted from one of the frames before it."""
    seen = _Seen()
    for number, clip in enumerate(clips):
        height, width = clip.shape[2:]
        geometry, near = Geometry(height, width), neighbours(height, width)
        wanted = (clip * gain[:, None, None]).astype(np.float32).reshape(len(clip), len(gain), -1)
        first = np.clip(np.rint(wanted[0]), -_LIMIT, _LIMIT).astype(np.int16)
        held: list[tuple[NDArray[np.int16], History]] = [(first, unknown_history(height, width))]
        for t in range(1, len(clip)):
            age = min(_AGES[(t + number) % len(_AGES)], len(held))
            values, history = held[-age]
            weighed = price * _PRICES[(t // 3 + number) % len(_PRICES)]
            choice = choose_symbols(wanted[t], values, near, costs, weighed, t, _LIMIT)
            _count_changes(seen, geometry, history, choice.changed, choice.modes)
            seen.expected.append(choice.expected)
            seen.cell_modes.append(choice.modes)
            seen.values.append(choice.values[:, choice.changed].astype(np.int64))
            held = [*held[-3:], (choice.values, next_history(history, choice.changed, choice.modes))]
    return seen


def _count_changes(seen: _Seen, geometry: Geometry, history: History, changed: NDArray[np.bool_], modes: NDArray[np.int64]) -> None:
    walk = ChangeWalk(geometry, history, density(changed))
    for number, where in enumerate(geometry.passes):
        now = changed[where.raster].astype(np.int32)
        np.add.at(seen.flags, (walk.rows(number), now), 1)
        walk.accept(number, now)
    np.add.at(seen.modes, (mode_rows(history, changed), modes), 1)


def _costs(seen: _Seen, channels: int) -> Costs:
    """Rough bits by channel, from how often a symbol of a changed cell differs from what is predicted."""
    values, expected = np.concatenate(seen.values, axis=1), np.concatenate(seen.expected, axis=1)
    differs = (values != np.rint(expected / 4)).sum(axis=1)
    share = ((differs + 1.0) / (values.shape[1] + 2.0 * channels**0.5)).clip(0.002, 0.9)
    same, other = -np.log2(1 - share), -np.log2(share) + _SPREAD_BITS
    return Costs(same=same[:, None].astype(np.float32), other=other[:, None].astype(np.float32))


def _fit_cells(seen: _Seen, channels: int, counts: Exact) -> dict[str, Exact]:
    """One tier's weights; what they leave is added to `counts` (TABLES, 2 * radius + 1)."""
    values, expected = np.concatenate(seen.values, axis=1), np.concatenate(seen.expected, axis=1)
    modes = np.concatenate(seen.cell_modes)
    weights = {name: np.zeros(shape) for name, shape in renewal_shapes(channels).items()}
    if values.shape[1] < channels:
        raise ConfigError(f"only {values.shape[1]} cells change in these clips: take some in which more moves")
    few = np.unique(np.linspace(0, values.shape[1] - 1, min(values.shape[1], _MAX_CELLS)).astype(int))
    values, modes = values[:, few], modes[few]
    cells = Cells.of(expected[:, few], modes)
    one, fresh = np.ones(len(few)), (modes == FRESH).astype(np.float64)
    for number, start, stop in groups(channels, channels):
        used = cells.features[: 4 + 2 * number]
        for channel in range(start, stop):
            base = cells.expected[channel] / 4
            off = values[channel] - base
            features = np.stack([one, fresh, base])
            solution = solve(features, off, np.ones_like(off))
            weights["mean_bias"][channel], weights["mean_fresh"][channel] = np.rint(MEAN_UNIT * solution[:2])
            weights["mean_own"][channel] = np.rint(256 * solution[2])
            error = np.abs(off - solution @ features)
            scale = scale_fit(np.concatenate([np.abs(cells.expected[channel])[None], used]), error)
            weights["scale_own"][channel] = np.rint(scale[0] * SCALE_UNIT / 64)
            weights["scale"][channel, : len(used)] = np.rint(scale[1:] * SCALE_UNIT)
        weights = {name: np.clip(w, -32767, 32767) for name, w in weights.items()}
        mean, rows = expect(Renewal(**weights), cells, start, stop)
        column = np.clip(values[start:stop] - mean, -RADIUS, RADIUS) + RADIUS
        np.add.at(counts, (rows.ravel(), column.ravel()), 1)
        cells.accept(number, start, values[start:stop])
    return weights
