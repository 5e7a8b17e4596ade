"""The profile as one picture: bytes that cross and work done so far, along the network, the good cuts marked."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from protos.errors import MissingDependencyError
from splitters.profiling.table import CutCost, Profile
from splitters.profiling.ticks import plain_log_ticks

_INK, _FAINT, _BYTES, _PALE, _WORK, _MARK = "#222222", "#8a8f98", "#0b6e99", "#a9cfe0", "#c2661c", "#0b3d52"
_LABELS = 7


def plot(profile: Profile, path: Path) -> None:
    """Draws the picture to ``path`` (PNG, or what the suffix says).

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib is not installed; install the extra: pip install 'headtail[zoo]'") from error
    with mpl.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": _FAINT, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(9.0, 4.6), dpi=160, layout="constrained")
        axes = figure.subplots()
        rows, x = profile.rows, range(len(profile.rows))
        axes.set_yscale("log")
        axes.plot(x, [r.float_bytes / 1e3 for r in rows], color=_PALE, lw=1.0, label="32-bit float")
        axes.plot(x, [r.int8_bytes / 1e3 for r in rows], color=_BYTES, lw=0.9, ls=(0, (2, 1.5)), label="8 bits")
        axes.plot(x, [r.zstd_bytes / 1e3 for r in rows], color=_BYTES, lw=1.6, label="8 bits, zstandard")
        axes.axhline(profile.picture_bytes / 1e3, color=_INK, lw=0.9, ls=":")
        axes.annotate(f"the picture itself (JPEG): {profile.picture_bytes / 1e3:.0f} kB", (0, profile.picture_bytes / 1e3),
                      xytext=(0, -3), textcoords="offset points", ha="left", va="top", fontsize=8, color=_INK)  # fmt: skip
        good = [i for i, r in enumerate(rows) if r.good]
        axes.plot(good, [rows[i].zstd_bytes / 1e3 for i in good], "o", color=_MARK, ms=5, mec="white", mew=0.8, zorder=5,
                  label="good cut: fewer bytes than any with less work")  # fmt: skip
        _label(axes, rows, good)
        _stages(axes, rows)
        axes.set_xlim(-0.5, len(rows) - 0.5)
        lowest = min([r.zstd_bytes for r in rows if r.zstd_bytes], default=1) / 1e3
        low, high = max(lowest / 4, 0.02), max(r.float_bytes for r in rows) / 1e3 * 1.8
        axes.set_ylim(low, high)
        plain_log_ticks(axes.yaxis, low, high)
        axes.set_ylabel("crossing the cut, kB per image", color=_BYTES)
        axes.tick_params(axis="y", colors=_BYTES, which="both")
        work = axes.twinx()
        share = [100 * r.head_macs / max(1, profile.total_macs) for r in rows]
        work.fill_between(x, share, color=_WORK, alpha=0.10, lw=0)
        work.plot(x, share, color=_WORK, lw=1.4, label="MACs on the device")
        work.set_ylim(0, 103)
        work.set_ylabel("multiply-accumulates on the device, %", color=_WORK)
        work.tick_params(axis="y", colors=_WORK)
        for side in (axes, work):
            side.spines["top"].set_visible(False)
        axes.set_zorder(work.get_zorder() + 1)
        axes.patch.set_visible(False)
        handles = [h for a in (axes, work) for h in a.get_legend_handles_labels()[0]]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8, handlelength=1.8, columnspacing=1.4
        )
        axes.set_title(
            f"{profile.model}: {len(rows)} places to cut, {profile.total_macs / 1e6:,.0f} M MACs",
            loc="left",
            fontsize=10,
            color=_INK,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _label(axes: Any, rows: tuple[CutCost, ...], good: list[int]) -> None:
    """Names the good cuts that save most; the others keep their dots."""
    chosen = good if len(good) <= _LABELS else [good[i * (len(good) - 1) // (_LABELS - 1)] for i in range(_LABELS)]
    for i in chosen:
        at = i / len(rows)
        axes.annotate(
            f"{rows[i].name}\n{rows[i].zstd_bytes / 1e3:.1f} kB", (i, rows[i].zstd_bytes / 1e3), xytext=(0, -9),
            textcoords="offset points", ha="left" if at <= 0.04 else "center" if at < 0.94 else "right",
            va="top", fontsize=7, color=_MARK, linespacing=1.15,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75}, zorder=6,
        )  # fmt: skip


def _stage(name: str) -> str:
    """The first two levels of a dotted name where the second is a number (``blocks.3``), else the first."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def _stages(axes: Any, rows: tuple[CutCost, ...]) -> None:
    """Bands and names along the x axis for the network's stages."""
    ticks, names, start = [], [], 0
    for number, (stage, members) in enumerate(groupby(rows, key=lambda r: _stage(r.name))):
        size = len(list(members))
        if number % 2:
            axes.axvspan(start - 0.5, start + size - 0.5, color="#000000", alpha=0.03, lw=0)
        if size >= max(2, len(rows) // 40):
            ticks.append(start + (size - 1) / 2)
            names.append(stage)
        start += size
    axes.set_xticks(ticks, names, rotation=0 if len(ticks) <= 10 else 45, ha="center" if len(ticks) <= 10 else "right", fontsize=8)
    axes.tick_params(axis="x", length=0, colors=_INK)
