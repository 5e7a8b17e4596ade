"""Operating points: read and written unchanged, and the frontier holds exactly the non-dominated ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import BundleError
from splitters.bundle.operating_point import OperatingPoint, Quantiles, best_point, dump_points, load_points, mark_pareto


def point(i: int, size: float, ms: float, accuracy: float) -> OperatingPoint:
    cost, time = Quantiles(p50=size, p95=size), Quantiles(p50=ms, p95=ms)
    return OperatingPoint(id=i, channels=1, bits=1, payload_bytes=cost, head_ms=time, accuracy=accuracy, accuracy_metric="top1")


triples = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(triples)
def test_the_frontier_is_the_set_of_non_dominated_points(rows: list[tuple[int, int, int]]) -> None:
    points = [point(i, b, ms, a / 10) for i, (b, ms, a) in enumerate(rows)]
    kept = {p.id for p in mark_pareto(points) if p.pareto}
    for i, mine in enumerate(rows):
        beaten = any(o[0] <= mine[0] and o[1] <= mine[1] and o[2] >= mine[2] and o != mine for o in rows)
        assert (i in kept) == (not beaten)


@given(triples)
def test_round_trip(rows: list[tuple[int, int, int]]) -> None:
    points = tuple(point(i, b, ms, a / 10) for i, (b, ms, a) in enumerate(rows))
    assert load_points(dump_points(points)) == points


def test_the_best_point_is_the_cheapest_of_the_most_accurate() -> None:
    assert best_point([point(0, 1, 1, 0.2), point(1, 9, 9, 0.3)]).id == 1
    table = [point(0, 13_200, 5, 0.9), point(1, 2_300, 5, 0.9), point(2, 2_300, 4, 0.9), point(3, 900, 1, 0.8)]
    assert best_point(table).id == 2
    assert best_point(table[::-1]).id == 2
    assert next(p for p in mark_pareto(table) if p.id == 2).pareto


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "[1]", '[{"id": 1}]', '[{"id": -1, "channels": 1, "bits": 1}]',
        '[{"id": 1, "channels": 1, "bits": 1, "colour": 2}]', '[{"id": 1, "channels": 1, "bits": 1, "accuracy": 70}]',
        '[{"id": 1, "channels": 1, "bits": 1}, {"id": 1, "channels": 1, "bits": 1}]',
        '[{"id": 1, "channels": 1, "bits": 1, "head_ms": {"p50": NaN, "p95": 1}}]',
    ],
)  # fmt: skip
def test_a_wrong_table_is_one_clear_error(text: str) -> None:
    with pytest.raises(BundleError):
        load_points(text)
