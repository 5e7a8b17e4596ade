"""The picture of a report: accuracy over payload bytes, beside the image codecs, and encoder time beside theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from splitters.evaluation.bdrate import Curve, front, interval
from splitters.evaluation.report import Report

_COLOURS = {"jpeg": "#8c564b", "webp": "#7f7f7f", "avif": "#1f77b4"}
_NAMES = {"ap": "AP (COCO, IoU .50 to .95)"}


def plot(report: Report, path: Path) -> None:
    """Writes a PNG.

    Args:
        report: from ``evaluate``.
        path: the file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), width_ratios=(1.6, 1), layout="constrained")
    ours, *others = report.curves
    for curve in others:
        points = front(curve.points())
        left.plot(
            points[:, 0],
            points[:, 1],
            "-",
            marker="s",
            ms=3,
            lw=1,
            color=_COLOURS.get(curve.name),
            label=f"{curve.name.upper()}, best of quality and size",
        )
    kinds = dict.fromkeys(p.graphs for p in report.points)
    shades = plt.get_cmap("plasma")(np.linspace(0.8, 0.1, len(kinds)))
    measured = ours.points()
    for shade, graphs in zip(shades, kinds, strict=True):
        rows = [i for i, p in enumerate(report.points) if p.graphs == graphs]
        points = front(measured[rows])
        head_ms = report.work.heads_ms[graphs] if report.work else report.points[rows[0]].head_ms.p50
        label = f"{'+'.join(graphs) or 'head'} ({head_ms:.2f} ms)"
        left.plot(points[:, 0], points[:, 1], "-", marker="o", ms=4, color=shade, label=label)
        right.scatter([head_ms], [points[:, 1].max()], color=shade, s=60)
        right.annotate("+".join(graphs), (head_ms, points[:, 1].max()), textcoords="offset points", xytext=(6, -4), fontsize=8)
    if not np.isnan(report.whole):
        left.axhline(report.whole, ls="--", lw=0.8, color="black", label="whole model, no compression")
    _band(left, ours)
    _alone(right, report)
    for name, ms in report.encode_ms.items():
        right.axvline(ms, ls=":", color=_COLOURS.get(name))
        right.annotate(f"{name} encode", (ms, right.get_ylim()[0]), rotation=90, fontsize=8, va="bottom", ha="right")
    left.set(
        xscale="log",
        xlabel="payload, bytes a photo (log)",
        ylabel=_NAMES.get(report.metric, report.metric),
        title=f"{report.model}: {report.photos} photos",
    )
    title = "Accuracy against device work" if report.work else "Compute knob"
    right.set(xlabel="time on the device, ms, one thread (log)", ylabel=f"best {report.metric}", title=title, xscale="log")
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    left.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _alone(axis: Any, report: Report) -> None:
    """The whole model alone on the device at its input sizes, and the pictures that it could send instead."""
    if report.work is None:
        return
    alone = report.work.alone
    axis.plot([a.ms for a in alone], [a.accuracy for a in alone], "-", marker="s", ms=4, lw=1, color="black", label="alone")
    for a in alone:
        axis.annotate(f"{a.size_px} px", (a.ms, a.accuracy), textcoords="offset points", xytext=(6, -8), fontsize=8)
    axis.margins(x=0.15)
    sent = report.offloads
    if sent:
        times = [o.encode_ms.p50 for o in sent]
        axis.scatter(times, [o.accuracy for o in sent], marker="x", s=20, color="#7f7f7f", label="picture sent, all sizes")
    axis.legend(fontsize=8)


def _band(axis: Any, ours: Curve) -> None:
    """95 % bootstrap bars of the non-dominated points."""
    measured = ours.points()
    kept = {tuple(p) for p in front(measured)}
    for point, drawn in zip(measured, ours.drawn, strict=True):
        if tuple(point) in kept:
            axis.plot([point[0]] * 2, interval(drawn), color="black", lw=0.6, alpha=0.5)
