"""Turns a training set's symbols into the learned codec's frozen tables.

    part = fit_tables([symbols_tier0, symbols_tier1, ...], layers=(8, 16, 32), clips=clips, gains=gains)
    spec = learned_spec(shape=..., gains=..., ungains=..., points=..., tables_path="device/codec.bin")
    codec = LearnedCodec(spec, part)        # or codec_from_spec(spec, read_part)

``symbols_tier`` is (N, C, H, W) integers: round(latent * gain[tier]) of N training photos, all C channels, 200 to 1000
photos are plenty. ``layers`` says at which channel each layer of a payload ends; the last is C. ``clips`` make
temporal prediction possible: latents of successive frames of a fixed camera (see `splitters.codec.fitting.fit_predicted`). Give
symbols of the encoder that ships; where several encoders write the same latent, mix their photos.

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
from splitters.codec.entropy.context import (
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
    weight_shapes,
)
from splitters.codec.fitting.fit_predicted import fit_predicted
from splitters.codec.fitting.regression import RADIUS, frequencies, scale_fit, solve
from splitters.codec.stages import MAX_SYMBOL, padded_planes
from splitters.codec.tables import SCENE, SCENE_UNIT, TABLES_VERSION, finest_tier, pack_tables, read_tables, unpack_tables

Integers = NDArray[np.integer[Any]]
Latents = NDArray[np.floating[Any]]

_MAX_ROWS = 60_000


def fit_tables(
    symbols_by_tier: Sequence[Integers],
    layers: Sequence[int],
    *,
    clips: Sequence[Latents] = (),
    gains: NDArray[np.floating[Any]] | None = None,
    max_samples: int = 600,
    progress: Callable[[str], None] | None = None,
) -> bytes:
    """Fits weights per tier and tables shared by all tiers.

    Args:
        symbols_by_tier: for each gain tier (N, C, H, W) integers; N, H and W may differ between tiers.
        layers: where each layer of a payload ends, in channels, rising; the last is C. The first layer decodes alone.
        clips: latents of successive frames, (T, C, H, W) each; none: no temporal prediction.
        gains: (tiers, C) of the codec, needed with clips.
        max_samples: photos used of each tier, evenly spaced.
        progress: told in words how far the fit is.

    Returns:
        The bytes of the tables part (some 50 to 200 KB).

    Raises:
        ConfigError: shapes or layers that do not fit together.
    """
    channels = _check(symbols_by_tier, layers)
    ends = tuple(int(n) for n in layers)
    arrays: dict[str, Integers] = {}
    counts = np.zeros((TABLES, 2 * RADIUS + 1))
    stacked: dict[str, list[Exact]] = {name: [] for name in WEIGHT_NAMES}
    for tier, symbols in enumerate(symbols_by_tier):
        if progress is not None:
            progress(f"fitting key frames' tables, tier {tier + 1} of {len(symbols_by_tier)}")
        chosen = np.unique(np.linspace(0, len(symbols) - 1, min(len(symbols), max_samples)).astype(int))
        weights = _TierFit(symbols[chosen], ends).run(counts)
        for name in WEIGHT_NAMES:
            stacked[name].append(getattr(weights, name))
    arrays |= {f"intra/{name}": np.stack(values).astype(np.int16) for name, values in stacked.items()}
    arrays["intra/tables"] = frequencies(counts)
    if clips:
        if gains is None or gains.shape != (len(symbols_by_tier), channels):
            raise ConfigError(f"clips need the codec's gains, {len(symbols_by_tier)} x {channels}")
        arrays |= fit_predicted(clips, gains, progress=progress)
    index = {"channels": channels, "layers": list(ends), "tiers": len(symbols_by_tier), "radius": RADIUS}
    return pack_tables(index, arrays)


def refit_predicted(
    part: bytes,
    clips: Sequence[Latents],
    gains: NDArray[np.floating[Any]],
    *,
    prices: Sequence[float] = (),
    progress: Callable[[str], None] | None = None,
) -> bytes:
    """The same tables with those of predicted frames fitted to these clips; everything else stays.

    The rough costs that the encoder chooses by stay too, where the part has some: the same symbols are told in fewer bytes.

    Args:
        part: bytes from `fit_tables`, of any release.
        clips: latents of successive frames, (T, C, H, W) each.
        gains: (tiers, C) of the codec.
        prices: of a bit at each tier (see `fit_predicted`).
        progress: told in words how far the fit is.

    Raises:
        BundleError: the part cannot be read.
        ConfigError: clips that do not fit the tables, or in which nothing moves.
    """
    tables = read_tables(part)
    if gains.shape != (tables.tiers, tables.channels):
        raise ConfigError(f"clips need the codec's gains, {tables.tiers} x {tables.channels}")
    known = tables.predicted.costs if tables.predicted is not None else ()
    return _with_arrays(part, fit_predicted(clips, gains, prices=prices, known=known, progress=progress))


def with_scene(part: bytes, scene: Latents, gains: NDArray[np.floating[Any]]) -> bytes:
    """The same tables and what one site's camera sees when nothing happens.

    Args:
        part: bytes with tables of predicted frames.
        scene: latent (C, H, W).
        gains: (tiers, C) of the codec.

    Raises:
        BundleError: the part cannot be read.
    """
    steps = SCENE_UNIT * gains[finest_tier(gains)][:, None, None]
    most = SCENE_UNIT * MAX_SYMBOL
    return _with_arrays(part, {SCENE: np.clip(np.rint(scene * steps), -most, most).astype(np.int16)})


def _with_arrays(part: bytes, arrays: dict[str, Integers]) -> bytes:
    """The part with these arrays in place of those of the same names; those of predicted frames of an earlier form go."""
    index, own = unpack_tables(part)
    told = {"channels": index.channels, "layers": list(index.layers), "tiers": index.tiers, "radius": index.radius}
    kept = own if index.version == TABLES_VERSION else {name: a for name, a in own.items() if name.startswith("intra/")}
    return pack_tables(told, kept | arrays)


def _check(symbols_by_tier: Sequence[Integers], layers: Sequence[int]) -> int:
    if not symbols_by_tier or any(s.ndim != 4 or len(s) < 1 for s in symbols_by_tier):
        raise ConfigError("fitting needs (N, C, H, W) symbols for every gain tier")
    channels = int(symbols_by_tier[0].shape[1])
    if any(s.shape[1] != channels for s in symbols_by_tier):
        raise ConfigError("every tier has the same channels")
    rising = all(a < b for a, b in zip((0, *layers), layers, strict=False))
    if not layers or not rising or layers[-1] != channels:
        raise ConfigError(f"layers must rise and end at {channels}, got {list(layers)}")
    return channels


class _TierFit:
    """The weights of one tier."""

    def __init__(self, now: Integers, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._channels = now.shape[1]
        self._geometry = Geometry(now.shape[2], now.shape[3])
        self._targets = now.astype(np.int64).reshape(len(now), self._channels, -1)
        self._states = []
        for sample in now:
            planes = padded_planes(self._geometry, sample)
            starts = (0, *layers[:-1])
            activity = np.concatenate([self._geometry.activity(planes[a:b]) for a, b in zip(starts, layers, strict=True)])
            self._states.append(State(planes=planes, activity=activity))
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
                column = np.clip(residual, -RADIUS, RADIUS) + RADIUS
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
        one = np.ones((1, target.shape[1]))
        everything = around.sum(axis=0, keepdims=True)
        w = self._weights
        for row, channel in enumerate(range(stage.start, stage.stop)):
            features = np.concatenate([one, signed[row : row + 1], shared_mean])
            solution = np.rint(UNIT * solve(features, target[row], np.ones(target.shape[1])))
            solution = np.clip(solution, -32767, 32767)
            w.mean_bias[k, channel], w.mean_near[k, channel] = solution[:2]
            w.mean_earlier[k, channel, : stage.start] = solution[2:]
            error = np.abs(target[row] - solution @ features / UNIT)
            features = np.concatenate([one, around[row : row + 1], everything, activity])
            solution = np.clip(np.rint(UNIT * scale_fit(features, error)), -32767, 32767)
            w.scale_bias[k, channel], w.scale_near[k, channel], w.scale_near_all[k, channel] = solution[:3]
            w.scale_earlier[k, channel, :groups] = solution[3:]


def _join(parts: list[NDArray[Any]]) -> Exact:
    """Samples of (rows, P) side by side: (rows, samples * P)."""
    return np.concatenate(parts, axis=1).astype(np.float64)
