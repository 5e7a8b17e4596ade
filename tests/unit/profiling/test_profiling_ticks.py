"""Labels of logarithmic axes: plain numbers, some of them, and not so many that they touch."""

from __future__ import annotations

import pytest

from splitters.profiling.ticks import plain_log_ticks


@pytest.mark.parametrize(("low", "high"), [(0.02, 3000.0), (3.0, 40.0), (90.0, 130.0), (1.0, 500.0), (2.1, 2.9)])
def test_log_ticks_are_plain_and_few(low: float, high: float) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(figsize=(4, 4))
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_log_ticks(axes.yaxis, low, high)
    inside = [t for t in axes.yaxis.get_majorticklocs() if low <= t <= high]
    labels = [axes.yaxis.get_major_formatter()(t, 0) for t in inside]
    assert 3 <= len(labels) <= 12
    assert all("$" not in label and float(label) for label in labels)
    assert all(not axes.yaxis.get_minor_formatter()(t, 0) for t in axes.yaxis.get_minorticklocs())
