"""What makes the codec fast changes nothing: windows of tables, single precision, and a choice that skips what cannot pay."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Literal

import numpy as np
import pytest

from splitters.codec.entropy import coder as coders
from splitters.codec.entropy.coder import CoderFactory, TableSet
from splitters.codec.entropy.context import (
    MAX_FEATURE,
    PASSES,
    Geometry,
    Stage,
    State,
    Weights,
    exact_dtype,
    predict,
    weight_shapes,
)
from splitters.codec.predicted.choice import _MORE_BITS, Costs, _coded

K = 41


def laplace_tables(scales: list[float]) -> TableSet:
    """Symmetric tables that fall off by so much."""
    shape = np.exp(-np.abs(np.arange(K) - K // 2) / np.array(scales)[:, None])
    rows = 1 + np.floor(shape / shape.sum(axis=1, keepdims=True) * (2**16 - K)).astype(np.int64)
    rows[:, K // 2] += 2**16 - rows.sum(axis=1)
    return TableSet(rows)


@pytest.mark.parametrize("body", ["inside", "one outside", "first outside", "wide"])
def test_symbols_come_back_whether_or_not_they_lie_in_their_windows(body: str) -> None:
    pytest.importorskip("constriction")
    rng = np.random.default_rng(2)
    count = 2 * coders._CHUNK + 7
    tables = laplace_tables([0.3, 0.5, 30.0])
    index = rng.integers(0, 2, count)
    symbols = (K // 2 + rng.integers(-3, 4, count)).astype(np.int32)
    if body == "one outside":
        symbols[coders._CHUNK + 5] = K - 1
    elif body == "first outside":
        symbols[[0, coders._CHUNK]] = 0
    elif body == "wide":
        index, symbols = np.full(count, 2), rng.integers(0, K, count).astype(np.int32)
    window = tables.window
    assert window is not None
    assert (window.missed.take(index[: coders._CHUNK]).sum() > coders._MISSES) == (body == "wide")
    encoder = CoderFactory("pure").encoder()
    encoder.put(symbols, tables, index)
    encoder.put(np.array([5], np.int32), tables, np.array([0]))
    written = encoder.finish()
    for name in ("constriction", "pure"):
        decoder = CoderFactory(name).decoder(written)
        assert np.array_equal(decoder.get(tables, index), symbols)
        assert decoder.get(tables, np.array([0])) == [5]


def drawn_weights(rng: np.random.Generator, channels: int, layers: tuple[int, ...], largest: int) -> Weights:
    shapes = weight_shapes(channels, len(layers))
    return Weights(**{name: rng.integers(-largest, largest + 1, shape).astype(np.float64) for name, shape in shapes.items()})


def test_single_precision_is_exact_wherever_it_is_chosen() -> None:
    rng, layers, geometry = np.random.default_rng(4), (3, 9), Geometry(7, 9)
    singles = 0
    for largest in (10, 300, 1000, 3000, 32767):
        wide = drawn_weights(rng, 9, layers, largest)
        dtype = exact_dtype(wide, layers)
        singles += dtype is np.float32
        weights = replace(wide, **{f.name: getattr(wide, f.name).astype(dtype) for f in fields(wide)})
        planes = geometry.pad(rng.choice([-MAX_FEATURE, MAX_FEATURE], (9, 7, 9)))
        activity = np.concatenate([geometry.activity(planes[a:b]) for a, b in ((0, 3), (3, 9))])
        for number in range(PASSES):
            stage = Stage(layer=1, start=3, stop=9, number=number)
            exact = predict(geometry, wide, State(planes=planes, activity=activity), stage)
            found = predict(geometry, weights, State(planes=planes.astype(dtype), activity=activity.astype(dtype)), stage)
            assert all(np.array_equal(a, b) for a, b in zip(found, exact, strict=True))
    assert 0 < singles < 5


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_choice_is_that_of_looking_at_every_symbol(order: Literal["C", "F"]) -> None:
    rng = np.random.default_rng(6)
    target = (rng.laplace(size=(12, 400)) * 2).astype(np.float32)
    base = (rng.integers(-8, 9, target.shape) / 4).astype(np.float32)
    costs = Costs(same=rng.uniform(0, 3, (12, 1)).astype(np.float32), other=rng.uniform(0, 9, (12, 1)).astype(np.float32))
    prices = rng.choice([0.0, 0.1, 0.4, 2.0], 400).astype(np.float32)
    same = np.rint(base)
    off = target - same
    size = np.abs(off)
    low = size.astype(np.int32)
    best, chosen = np.square(off) + prices * costs.same, np.zeros_like(low)
    for step in (low, low + 1):
        move = np.square(size - step) + prices * (costs.other + _MORE_BITS.take(step, mode="clip"))
        better = (move < best) & (step > 0)
        best, chosen = np.where(better, move, best).astype(np.float32), np.where(better, step, chosen)
    symbols, spent = _coded(np.asarray(target, order=order), np.asarray(base, order=order), costs, prices)
    assert np.array_equal(symbols, same + np.copysign(chosen, off))
    np.testing.assert_allclose(spent, best.sum(axis=0), rtol=1e-5)
    assert 0.1 < (chosen > 0).mean() < 0.9
