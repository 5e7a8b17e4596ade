"""Turns a training set's symbols into the learned codec's frozen tables.

    part = fit_tables([symbols_tier0, symbols_tier1, ...], layers=(8, 16, 32), pairs_by_tier=[(now, before), ...])
    spec = learned_spec(shape=..., gains=..., ungains=..., points=..., tables_path="device/codec.bin")
    codec = LearnedCodec(spec, part)        # or codec_from_spec(spec, read_part)

``symbols_tier`` is (N, C, H, W) integers: round(latent * gain[tier]) of N training photos, all C channels, 200 to 1000
photos are plenty. ``layers`` says at which channel each layer of a payload ends; the last is C. ``pairs_by_tier`` makes
temporal prediction possible: symbols of a frame and of an earlier frame of the same fixed camera, both (N, C, H, W)
(`pairs.camera_pair` makes such frames from single photos). Give symbols of the encoder that ships;
where several encoders write the same latent, mix their photos.

The fit is ordinary least squares for the mean, iteratively reweighted least squares of the absolute residual for the
scale (the maximum-likelihood fit of a Laplace scale that is linear in its features), and counts for the tables, smoothed
with a discretised Laplace. Deterministic: the same symbols give the same bytes on the same machine; it is run once, and
its result is what ships.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.codec.coder import TABLE_BITS
from splitters.codec.context import (
    FRACTIONS,
    PASSES,
    TABLES,
    UNIT,
    WEIGHT_NAMES,
    Exact,
    Geometry,
    Stage,
    State,
    Weights,
    choose,
    predict,
    scale_thresholds,
    weight_shapes,
)
from splitters.codec.stages import padded_planes
from splitters.codec.tables import pack_tables

Integers = NDArray[np.integer[Any]]

_RADIUS = 20
_ROUNDS = 5
_RIDGE = 1e-3
_FLOOR = 0.02  # of a scale, in symbols
_PRIOR = 8.0  # pseudo-counts of the smoothing Laplace
_MAX_ROWS = 60_000


def fit_tables(
    symbols_by_tier: Sequence[Integers],
    layers: Sequence[int],
    *,
    pairs_by_tier: Sequence[tuple[Integers, Integers]] | None = None,
    max_samples: int = 600,
    progress: Callable[[str], None] | None = None,
) -> bytes:
    """Fits weights per tier and tables shared by all tiers.

    Args:
        symbols_by_tier: for each gain tier (N, C, H, W) integers; N, H and W may differ between tiers.
        layers: where each layer of a payload ends, in channels, rising; the last is C. The first layer decodes alone.
        pairs_by_tier: for each tier (current, reference), both (M, C, H, W); None: no temporal prediction.
        max_samples: photos and pairs used of each tier, evenly spaced.
        progress: told in words how far the fit is.

    Returns:
        The bytes of the tables part (some 50 to 200 KB).

    Raises:
        ConfigError: shapes or layers that do not fit together.
    """
    channels = _check(symbols_by_tier, layers, pairs_by_tier)
    ends = tuple(int(n) for n in layers)
    sources: dict[str, list[tuple[Integers, Integers | None]]] = {"intra": [(s, None) for s in symbols_by_tier]}
    if pairs_by_tier is not None:
        sources["inter"] = [(now, before) for now, before in pairs_by_tier]
    arrays: dict[str, Integers] = {}
    for mode, tiers in sources.items():
        counts = np.zeros((TABLES, 2 * _RADIUS + 1))
        stacked: dict[str, list[Exact]] = {name: [] for name in WEIGHT_NAMES}
        for tier, (now, before) in enumerate(tiers):
            if progress is not None:
                progress(f"fitting {mode} tables, tier {tier + 1} of {len(tiers)}")
            chosen = np.unique(np.linspace(0, len(now) - 1, min(len(now), max_samples)).astype(int))
            fit = _ModeFit(now[chosen], None if before is None else before[chosen], ends)
            weights = fit.run(counts)
            for name in WEIGHT_NAMES:
                stacked[name].append(getattr(weights, name))
        arrays |= {f"{mode}/{name}": np.stack(values).astype(np.int16) for name, values in stacked.items()}
        arrays[f"{mode}/tables"] = _frequencies(counts)
    index = {"channels": channels, "layers": list(ends), "tiers": len(symbols_by_tier), "radius": _RADIUS}
    return pack_tables(index, arrays)


def _check(
    symbols_by_tier: Sequence[Integers], layers: Sequence[int], pairs_by_tier: Sequence[tuple[Integers, Integers]] | None
) -> int:
    if not symbols_by_tier or any(s.ndim != 4 or len(s) < 1 for s in symbols_by_tier):
        raise ConfigError("fitting needs (N, C, H, W) symbols for every gain tier")
    channels = int(symbols_by_tier[0].shape[1])
    if any(s.shape[1] != channels for s in symbols_by_tier):
        raise ConfigError("every tier has the same channels")
    rising = all(a < b for a, b in zip((0, *layers), layers, strict=False))
    if not layers or not rising or layers[-1] != channels:
        raise ConfigError(f"layers must rise and end at {channels}, got {list(layers)}")
    if pairs_by_tier is not None:
        if len(pairs_by_tier) != len(symbols_by_tier):
            raise ConfigError("fitting needs pairs for every tier, or for none")
        if any(a.shape != b.shape or a.ndim != 4 or a.shape[1] != channels or not len(a) for a, b in pairs_by_tier):
            raise ConfigError("the two halves of a pair have the same (N, C, H, W)")
    return channels


class _ModeFit:
    """The weights of one mode at one tier."""

    def __init__(self, now: Integers, before: Integers | None, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._channels = now.shape[1]
        self._geometry = Geometry(now.shape[2], now.shape[3])
        base = np.zeros_like(now, dtype=np.int64) if before is None else before.astype(np.int64)
        self._targets = (now - base).reshape(len(now), self._channels, -1)
        self._states = []
        for sample in range(len(now)):
            planes = padded_planes(self._geometry, now[sample] - base[sample])
            starts = (0, *layers[:-1])
            activity = np.concatenate([self._geometry.activity(planes[a:b]) for a, b in zip(starts, layers, strict=True)])
            own = None if before is None else padded_planes(self._geometry, base[sample])
            self._states.append(State(planes=planes, activity=activity, own=own))
        shapes = weight_shapes(self._channels, len(layers))
        self._weights = Weights(**{name: np.zeros(shapes[name]) for name in WEIGHT_NAMES})

    def run(self, counts: Exact) -> Weights:
        """Fits every stage and adds the residuals it leaves to `counts` (TABLES, 2 * radius + 1)."""
        for stage in self._stages():
            self._fit_stage(stage)
            where = self._geometry.passes[stage.number]
            # The states hold the future too, but `predict` looks only at what the decoder has by then.
            for sample, state in enumerate(self._states):
                mean, scale = predict(self._geometry, self._weights, state, stage)
                rounded, rows = choose(mean, scale)
                residual = self._targets[sample, stage.start : stage.stop, where.raster].T - rounded
                column = np.clip(residual, -_RADIUS, _RADIUS) + _RADIUS
                np.add.at(counts, (rows.ravel(), column.ravel()), 1)
        return self._weights

    def _stages(self) -> Iterator[Stage]:
        start = 0
        for layer, stop in enumerate(self._layers):
            for k in range(PASSES):
                if len(self._geometry.passes[k].cells):
                    yield Stage(layer=layer, start=start, stop=stop, number=k)
            start = stop

    def _fit_stage(self, stage: Stage) -> None:
        where = self._geometry.passes[stage.number]
        k, groups = stage.number, 2 * stage.layer
        step = max(1, len(self._states) * len(where.cells) // _MAX_ROWS)
        states = self._states[::step]
        shared_mean = _join([s.planes[: stage.start].take(where.cells, axis=1) for s in states])
        near = [s.planes[stage.start : stage.stop].take(where.near, axis=1) for s in states]
        signed = _join([n.sum(axis=1) for n in near])
        around = _join([np.abs(n).sum(axis=1) for n in near])
        activity = _join([s.activity[:groups].take(where.cells, axis=1) for s in states])
        target = _join([t[stage.start : stage.stop][:, where.raster] for t in self._targets[::step]])
        own = None
        if states[0].own is not None:
            own = _join([s.own[stage.start : stage.stop].take(where.cells, axis=1) for s in states if s.own is not None])
        one = np.ones((1, target.shape[1]))
        everything = around.sum(axis=0, keepdims=True)
        w = self._weights
        for row, channel in enumerate(range(stage.start, stage.stop)):
            mean_own = np.zeros_like(one) if own is None else own[row : row + 1]
            features = np.concatenate([one, signed[row : row + 1], mean_own, shared_mean])
            solution = np.rint(UNIT * _solve(features, target[row], np.ones(target.shape[1])))
            solution = np.clip(solution, -32767, 32767)
            w.mean_bias[k, channel], w.mean_near[k, channel], w.mean_own[k, channel] = solution[:3]
            w.mean_earlier[k, channel, : stage.start] = solution[3:]
            error = np.abs(target[row] - solution @ features / UNIT)
            features = np.concatenate([one, around[row : row + 1], everything, np.abs(mean_own), activity])
            solution = np.clip(np.rint(UNIT * _scale_fit(features, error)), -32767, 32767)
            w.scale_bias[k, channel], w.scale_near[k, channel] = solution[:2]
            w.scale_near_all[k, channel], w.scale_own[k, channel] = solution[2:4]
            w.scale_earlier[k, channel, :groups] = solution[4:]


def _join(parts: list[NDArray[Any]]) -> Exact:
    """Samples of (rows, P) side by side: (rows, samples * P)."""
    return np.concatenate(parts, axis=1).astype(np.float64)


def _solve(features: Exact, target: Exact, weight: Exact) -> Exact:
    """Weighted ridge regression; a feature that is always zero gets the weight zero."""
    scaled = features * weight
    gram = scaled @ features.T
    ridge = _RIDGE * np.diag(gram) + 1e-9 * max(1.0, float(np.trace(gram)))
    solution: Exact = np.linalg.solve(gram + np.diag(ridge), scaled @ target).astype(np.float64)
    solution[np.diag(gram) <= 0] = 0.0
    return solution


def _scale_fit(features: Exact, error: Exact) -> Exact:
    """Linear model of a Laplace scale: mean absolute error, weighted by 1 / scale^2 of the round before."""
    scale: Exact = np.full(len(error), max(float(error.mean()), _FLOOR))
    solution = np.zeros(len(features))
    for _ in range(_ROUNDS):
        solution = _solve(features, error, 1.0 / np.maximum(scale, _FLOOR) ** 2)
        scale = np.maximum(solution @ features, _FLOOR)
    return solution


def _frequencies(counts: Exact) -> NDArray[np.uint16]:
    """Counts to integer frequencies that are positive and sum to 2^16."""
    total = 2**TABLE_BITS
    edges = scale_thresholds() / UNIT
    centres = np.concatenate([[edges[0] / 2], np.sqrt(edges[1:] * edges[:-1]), [edges[-1] * 1.2]])
    symbols = np.arange(-_RADIUS, _RADIUS + 1)
    out = np.zeros(counts.shape, dtype=np.uint16)
    for row in range(TABLES):
        scale = max(float(centres[row // FRACTIONS]), 0.05)
        offset = (row % FRACTIONS + 0.5) / FRACTIONS - 0.5
        prior = np.exp(-np.abs(symbols - offset) / scale)
        blend = counts[row] + _PRIOR * prior / prior.sum()
        exact = blend / blend.sum() * (total - len(symbols))
        frequency = np.floor(exact).astype(np.int64) + 1
        rest = total - int(frequency.sum())
        frequency[np.argsort(-(exact - np.floor(exact)), kind="stable")[:rest]] += 1
        out[row] = frequency
    return out
