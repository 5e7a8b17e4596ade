"""When splitting pays as one picture: a panel a deadline, uplink across, device slowdown up, a colour for each kind of way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protos.errors import MissingDependencyError
from splitters.profiling.paying import BITRATES_BPS, KINDS, SLOWDOWNS, Place, Way, best
from splitters.profiling.ticks import plain_log_ticks

_COLOURS = {"alone": "#d9d4c5", "split": "#a9cfe0", "offload": "#eec39a", None: "#ffffff"}
_INK, _FAINT, _MARK = "#222222", "#8a8f98", "#b3261e"
_GRID = 300
_LEAST_SHARE = 0.015  # of a panel: a smaller area has no room for its name


def plot_paying(
    ways: Sequence[Way],
    places: Sequence[Place],
    path: Path,
    *,
    title: str,
    marked: tuple[float, float] | None = None,
) -> None:
    """Draws a panel for each place to ``path``.

    Args:
        ways: of one model.
        places: one deadline each, at most four.
        path: a PNG, or what the suffix says.
        title: above all panels.
        marked: (bitrate_bps, slowdown) of a point to mark.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib is not installed; install the extra: pip install 'headtail[zoo]'") from error
    bps, slow = np.geomspace(*BITRATES_BPS, _GRID), np.geomspace(*SLOWDOWNS, _GRID)
    number = np.array([KINDS.index(w.kind) for w in ways] + [len(KINDS)])  # -1, none in time, is the last
    with mpl.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": _FAINT, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(1.2 + 3.1 * len(places), 3.9), dpi=160, layout="constrained")
        for column, (axes, place) in enumerate(
            zip(np.atleast_1d(figure.subplots(1, len(places), sharey=True)), places, strict=True)
        ):
            kinds = number[best(ways, place, slow[:, None], bps[None, :])]
            colours = ListedColormap([_COLOURS[k] for k in (*KINDS, None)])
            axes.pcolormesh(bps / 1e6, slow, kinds, cmap=colours, vmin=-0.5, vmax=len(KINDS) + 0.5, rasterized=True)
            for kind in range(len(KINDS) + 1):
                mask = (kinds == kind).astype(float)
                if 0 < mask.mean() < 1:
                    axes.contour(bps / 1e6, slow, mask, levels=[0.5], colors=[_INK], linewidths=0.9)
                _name(axes, bps, slow, mask, (*KINDS, "nothing\nin time")[kind])
            axes.set_xscale("log")
            axes.set_yscale("log")
            plain_log_ticks(axes.xaxis, BITRATES_BPS[0] / 1e6, BITRATES_BPS[1] / 1e6)
            plain_log_ticks(axes.yaxis, *SLOWDOWNS)
            axes.set_xlabel("uplink, Mbit/s")
            if not column:
                axes.set_ylabel("device, times slower than this machine")
            axes.set_title(f"{place.deadline_ms:g} ms to the answer", loc="left", fontsize=9, color=_INK)
            if marked:
                axes.plot([marked[0] / 1e6], [marked[1]], "o", color=_MARK, ms=5, mec="white", mew=0.8)
        figure.suptitle(f"{title} Round trip {places[0].rtt_ms:g} ms", x=0.01, ha="left", fontsize=10, color=_INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _name(axes: Any, bps: Any, slow: Any, mask: Any, name: str) -> None:
    """Writes an area's name where the area is thickest, where there is room for it."""
    import cv2

    if mask.mean() < _LEAST_SHARE:
        return
    inner = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(inner.argmax()), inner.shape)
    axes.text(bps[column] / 1e6, slow[row], name, ha="center", va="center", fontsize=8.5, color=_INK)
