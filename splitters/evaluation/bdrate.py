"""Bjøntegaard delta of bytes at equal accuracy, between two measured curves, with bootstrap intervals over photos.

Bjøntegaard 2001 (VCEG-M33), with accuracy in the place of PSNR and monotone cubic interpolation (PCHIP) of log-bytes.

Shape legend: P points of a curve, M photos, D resampled sets of photos. A resampled set is a row of ``counts`` (D, M): how often
each photo was drawn. Curves measured on the same ``counts`` are paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError

Array = NDArray[np.float64]
Counts = NDArray[np.int32]


def resample(photos: int, draws: int, seed: int = 0) -> Counts:
    """Draws ``draws`` sets of as many photos with repeats, as counts (D, M)."""
    rng = np.random.default_rng(seed)
    drawn = [np.bincount(rng.integers(0, photos, photos), minlength=photos) for _ in range(draws)]
    return np.array(drawn, np.int32).reshape(draws, photos)


def interval(drawn: Array, level: float = 0.95) -> tuple[float, float]:
    """The central bootstrap interval of one figure's draws (D,); NaN draws are left out."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One codec's measured settings.

    Attributes:
        name: what the plot and the table call it.
        labels: one for each of the P settings.
        sizes: payload bytes of every photo at every setting, (P, M).
        accuracy: of every setting over all photos, (P,).
        drawn: the same over every resampled set, (P, D).
        counts: the resampled sets, (D, M).
    """

    name: str
    labels: tuple[str, ...]
    sizes: Array
    accuracy: Array
    drawn: Array
    counts: Counts

    def points(self) -> Array:
        """(P, 2): mean bytes and accuracy of every setting."""
        return np.stack([self.sizes.mean(axis=1), self.accuracy], axis=1)

    def drawn_points(self) -> Array:
        """(D, P, 2): the same over every resampled set."""
        sizes = self.counts @ self.sizes.T / self.counts.sum(axis=1, keepdims=True)
        return np.stack([sizes, self.drawn.T], axis=2)

    def only(self, rows: list[int]) -> Curve:
        """Some of the settings."""
        return Curve(
            name=self.name, labels=tuple(self.labels[r] for r in rows), sizes=self.sizes[rows], accuracy=self.accuracy[rows],
            drawn=self.drawn[rows], counts=self.counts,
        )  # fmt: skip


def front(points: Array) -> Array:
    """The non-dominated points (P', 2), bytes and accuracy both strictly rising."""
    best: list[tuple[float, float]] = []
    for size, accuracy in sorted(map(tuple, points), key=lambda p: (p[0], -p[1])):
        if not best or accuracy > best[-1][1] + 1e-12:
            best.append((size, accuracy))
    return np.array(best)


@dataclass(frozen=True, kw_only=True, slots=True)
class BdRate:
    """Change of bytes at equal accuracy.

    Attributes:
        percent: mean over the common accuracies; negative is fewer bytes.
        low, high: 95 % bootstrap interval over photos.
        accuracy_from, accuracy_to: the common interval it is averaged over.
    """

    percent: float
    low: float
    high: float
    accuracy_from: float
    accuracy_to: float


def bd_rate(anchor: Array, test: Array) -> tuple[float, float, float]:
    """Percent more bytes of ``test`` (P, 2) than of ``anchor`` (Q, 2), and the accuracy interval compared over.

    Raises:
        ConfigError: a curve has fewer than two non-dominated points, or they share no accuracy.
    """
    from scipy.interpolate import PchipInterpolator

    fronts = [front(anchor), front(test)]
    if min(len(f) for f in fronts) < 2:
        raise ConfigError("a curve with fewer than two non-dominated points cannot be compared")
    low, high = max(f[0, 1] for f in fronts), min(f[-1, 1] for f in fronts)
    if high - low < 1e-9:
        raise ConfigError("the curves share no accuracy, so bytes at equal accuracy cannot be compared")
    means = [PchipInterpolator(f[:, 1], np.log(f[:, 0])).integrate(low, high) / (high - low) for f in fronts]
    return float(np.expm1(means[1] - means[0]) * 100), float(low), float(high)


def compare(anchor: Curve, test: Curve) -> BdRate:
    """``bd_rate`` of ``test`` against ``anchor``, with the paired bootstrap interval over photos.

    Raises:
        ConfigError: as ``bd_rate``; or the curves were measured on different photos or resampled sets.
    """
    if anchor.counts.shape != test.counts.shape or (anchor.counts != test.counts).any():
        raise ConfigError("both curves must be measured on the same photos, resampled alike")
    percent, low, high = bd_rate(anchor.points(), test.points())
    figures = []
    for theirs, ours in zip(anchor.drawn_points(), test.drawn_points(), strict=True):
        try:
            figures.append(bd_rate(theirs, ours)[0])
        except ConfigError:
            continue  # this draw's curves do not overlap
    if len(figures) < 0.9 * len(anchor.counts):
        raise ConfigError("the curves hardly overlap: too few photos, or too different")
    bounds = interval(np.array(figures))
    return BdRate(percent=percent, low=bounds[0], high=bounds[1], accuracy_from=low, accuracy_to=high)
