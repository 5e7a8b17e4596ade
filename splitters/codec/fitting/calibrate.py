"""Calibration of the plain codec: per-channel clipping intervals from sample latents.

Shapes: samples are (N, *latent shape), one array per latent tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.codec.base import SPEC_VERSION, Spec
from splitters.codec.plain import MAX_BITS

_MARGIN = 0.01
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
_MAX_VALUES_PER_CHANNEL = 50_000


def calibrate_plain(
    samples: Sequence[NDArray[np.floating]],
    bits: Sequence[int] = (8, 6, 4, 3, 2),
    *,
    channel_axes: Sequence[int] | None = None,
    point_ids: Sequence[str] | None = None,
) -> Spec:
    """Chooses scales from the latents of some 50 to 500 typical images.

    From 8 bits on the interval is the observed one plus 1 % on either side. Below, clipping outliers
    pays: the interval that minimises the mean squared error on the samples is taken, per channel.

    Args:
        samples: one array per latent tensor, batch axis first.
        bits: one codec point each, 1..14.
        channel_axes: the channel axis of each latent, batch axis *not* counted; default 0.
        point_ids: names of the points; default ``b8``, ``b6``, ...

    Returns:
        The spec `codec_from_spec` reads; plain JSON types.

    Raises:
        ConfigError: no samples, NaN or infinity in them, or bits out of range.
    """
    axes = list(channel_axes) if channel_axes is not None else [0] * len(samples)
    names = list(point_ids) if point_ids is not None else [f"b{n}" for n in bits]
    if not samples or any(sample.size == 0 for sample in samples):
        raise ConfigError("calibration needs at least one sample of each latent")
    if len(axes) != len(samples) or len(names) != len(bits) or len(set(names)) != len(names):
        raise ConfigError("calibration needs one channel axis per latent and one distinct id per point")
    if not bits or any(not 1 <= n <= MAX_BITS for n in bits):
        raise ConfigError(f"bits must lie in 1..{MAX_BITS}, got {list(bits)}")
    columns = [_per_channel(np.asarray(s), axis) for s, axis in zip(samples, axes, strict=True)]
    points = []
    for name, width in zip(names, bits, strict=True):
        tensors = []
        for values in columns:
            low, high = _interval(values, width)
            step = np.maximum((high - low) / (2**width - 1), np.float32(1e-12))
            tensors.append({"low": _floats(low), "step": _floats(step)})
        points.append({"id": name, "bits": int(width), "tensors": tensors})
    return {
        "kind": "plain",
        "version": SPEC_VERSION,
        "tensors": [{"shape": [int(n) for n in s.shape[1:]], "channel_axis": int(a)} for s, a in zip(samples, axes, strict=True)],
        "points": points,
    }


def _floats(values: NDArray[np.float32]) -> list[float]:
    return [float(v) for v in values]


def _per_channel(sample: NDArray[np.floating], axis: int) -> NDArray[np.float32]:
    """(N, *shape) → (C, values)."""
    if not np.isfinite(sample).all():
        raise ConfigError("calibration samples hold NaN or infinity")
    if sample.ndim == 1:  # scalars: one channel
        return sample.astype(np.float32).reshape(1, -1)
    if not 0 <= axis < sample.ndim - 1:
        raise ConfigError(f"channel axis {axis} does not exist in a latent of shape {sample.shape[1:]}")
    moved = np.moveaxis(sample, axis + 1, 0)
    return np.ascontiguousarray(moved.reshape(moved.shape[0], -1), dtype=np.float32)


def _interval(values: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns low and high, (C,) each, for values (C, n)."""
    low, high = values.min(axis=1), values.max(axis=1)
    if bits >= 8:
        margin = (high - low) * np.float32(_MARGIN)
        return low - margin, high + margin
    stride = max(1, values.shape[1] // _MAX_VALUES_PER_CHANNEL)
    some = values[:, ::stride]
    centre = np.median(some, axis=1).astype(np.float32)
    levels = np.float32(2**bits - 1)
    best = np.full(len(values), np.inf)
    best_low, best_high = low.copy(), high.copy()
    for down in _SHRINKS:
        for up in _SHRINKS:
            lo = centre + np.float32(down) * (low - centre)
            hi = centre + np.float32(up) * (high - centre)
            step = np.maximum((hi - lo) / levels, np.float32(1e-12))[:, None]
            coded = np.clip(np.rint((some - lo[:, None]) / step), 0, levels) * step + lo[:, None]
            error = np.square(coded - some).mean(axis=1, dtype=np.float64)
            better = error < best
            best = np.where(better, error, best)
            best_low, best_high = np.where(better, lo, best_low), np.where(better, hi, best_high)
    return best_low, best_high
