"""Ticks of logarithmic axes as people read them: 0.5, 1, 2, 5, 10 instead of powers, and never so close that they touch."""

from __future__ import annotations

from typing import Any

_NARROW = 0.5  # decades that hold too few round numbers


def plain_log_ticks(axis: Any, low: float, high: float) -> None:
    """Labels a logarithmic Matplotlib axis that shows ``low``..``high``, both positive, with plain numbers."""
    from math import log10

    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    decades = log10(high / low) if high > low > 0 else 1.0
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3.5 else (1.0,)
    narrow = decades < _NARROW
    axis.set_major_locator(MaxNLocator(nbins=6) if narrow else LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
