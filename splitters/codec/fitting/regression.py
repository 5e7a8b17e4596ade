"""What both fits of tables share: two regressions, and counts made into frequencies.

Shape legend: F features, N samples, T tables of 2 * `RADIUS` + 1 symbols.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splitters.codec.entropy.coder import TABLE_BITS
from splitters.codec.entropy.context import FRACTIONS, TABLES, UNIT, Exact, scale_thresholds

RADIUS = 20
_ROUNDS = 5
_RIDGE = 1e-3
_FLOOR = 0.02  # of a scale, in symbols
_PRIOR = 8.0  # pseudo-counts of the smoothing Laplace


def solve(features: Exact, target: Exact, weight: Exact) -> Exact:
    """Weighted ridge regression; a feature that is always zero gets the weight zero."""
    scaled = features * weight
    gram = scaled @ features.T
    ridge = _RIDGE * np.diag(gram) + 1e-9 * max(1.0, float(np.trace(gram)))
    solution: Exact = np.linalg.solve(gram + np.diag(ridge), scaled @ target).astype(np.float64)
    solution[np.diag(gram) <= 0] = 0.0
    return solution


def scale_fit(features: Exact, error: Exact) -> Exact:
    """Linear model of a Laplace scale: mean absolute error, weighted by 1 / scale^2 of the round before."""
    scale: Exact = np.full(len(error), max(float(error.mean()), _FLOOR))
    solution: Exact = np.zeros(len(features))
    for _ in range(_ROUNDS):
        solution = solve(features, error, 1.0 / np.maximum(scale, _FLOOR) ** 2)
        scale = np.maximum(solution @ features, _FLOOR)
    return solution


def frequencies(counts: Exact) -> NDArray[np.uint16]:
    """Counts to integer frequencies that are positive and sum to 2^16."""
    total = 2**TABLE_BITS
    edges = scale_thresholds() / UNIT
    centres = np.concatenate([[edges[0] / 2], np.sqrt(edges[1:] * edges[:-1]), [edges[-1] * 1.2]])
    symbols = np.arange(-RADIUS, RADIUS + 1)
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


def plain_frequencies(counts: Exact, prior: float = 0.5) -> NDArray[np.uint16]:
    """Counts (T, K) of a few kinds to integer frequencies, positive, of sum 2^16; a row never seen takes all rows' shares."""
    total = 2**TABLE_BITS
    common = (counts.sum(axis=0) + prior) / (counts.sum() + prior * counts.shape[1])
    blend = counts + 2 * prior * common
    exact = blend / blend.sum(axis=1, keepdims=True) * (total - counts.shape[1])
    out = np.floor(exact).astype(np.int64) + 1
    out[np.arange(len(out)), out.argmax(axis=1)] += total - out.sum(axis=1)
    whole: NDArray[np.uint16] = out.astype(np.uint16)
    return whole
