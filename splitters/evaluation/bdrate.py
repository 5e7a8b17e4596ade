"""Bjøntegaard delta of bytes at equal accuracy, between two measured curves, with bootstrap intervals over photos.

Bjøntegaard 2001 (VCEG-M33), with accuracy in the place of PSNR and monotone cubic interpolation (PCHIP) of log-bytes.

Shape legend: P points of a curve, M photos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError

Array = NDArray[np.float64]
Photos = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One codec's measured settings.

    Attributes:
        name: what the plot and the table call it.
        labels: one for each of the P settings.
        sizes: payload bytes of every photo at every setting, (P, M).
        accuracy: accuracy of setting p over the given photos (indices with repeats; None: all).
    """

    name: str
    labels: tuple[str, ...]
    sizes: Array
    accuracy: Callable[[int, Photos | None], float]

    def points(self, photos: Photos | None = None) -> Array:
        """(P, 2): mean bytes and accuracy of every setting."""
        sizes = self.sizes if photos is None else self.sizes[:, photos]
        return np.array([(row.mean(), self.accuracy(p, photos)) for p, row in enumerate(sizes)])


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


def compare(anchor: Curve, test: Curve, *, draws: int = 1000, seed: int = 0) -> BdRate:
    """``bd_rate`` of ``test`` against ``anchor``, with a paired bootstrap over photos.

    Raises:
        ConfigError: as ``bd_rate``; or the curves were measured on different numbers of photos.
    """
    photos = anchor.sizes.shape[1]
    if test.sizes.shape[1] != photos:
        raise ConfigError("both curves must be measured on the same photos")
    percent, low, high = bd_rate(anchor.points(), test.points())
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(draws):
        drawn: Photos = rng.integers(0, photos, size=(photos,))
        try:
            figures.append(bd_rate(anchor.points(drawn), test.points(drawn))[0])
        except ConfigError:
            continue  # this draw's curves do not overlap
    if len(figures) < 0.9 * draws:
        raise ConfigError("the curves hardly overlap: too few photos, or too different")
    bounds = np.percentile(figures, [2.5, 97.5])
    return BdRate(percent=percent, low=float(bounds[0]), high=float(bounds[1]), accuracy_from=low, accuracy_to=high)


def concat(curves: Sequence[Curve], name: str) -> Curve:
    """All settings of several curves as one: the envelope is taken by ``front``."""
    owners = [(c, p) for c in curves for p in range(len(c.labels))]

    def accuracy(p: int, photos: Photos | None) -> float:
        curve, index = owners[p]
        return curve.accuracy(index, photos)

    return Curve(
        name=name, labels=tuple(c.labels[p] for c, p in owners), sizes=np.concatenate([c.sizes for c in curves]), accuracy=accuracy
    )
