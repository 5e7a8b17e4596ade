"""Pictures of a run and of a comparison, made for papers: vector-friendly, colour-blind safe, readable at column width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.errors import MissingDependencyError
from splitters.profiling.ticks import plain_log_ticks

# Okabe and Ito's palette.
COLOURS = {"result": "#0072B2", "offload": "#56B4E9", "local": "#E69F00", "expired": "#D55E00", "dropped": "#999999"}
POLICY_COLOURS = ("#0072B2", "#999999", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#000000")
_STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "legend.frameon": False, "figure.dpi": 200, "savefig.bbox": "tight",
}  # fmt: skip
_BIN_S = 0.5
_FAR_APART = 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One frame, as the picture needs it.

    Attributes:
        at_s: capture.
        choice: what the policy chose; empty: superseded before it could.
        outcome: result, local, expired or dropped.
        latency_ms: capture to answer; 0 without one.
        sent_s, payload_bytes: when how much entered the network; 0 bytes: nothing.
    """

    at_s: float
    choice: str
    outcome: str
    latency_ms: float
    sent_s: float
    payload_bytes: int

    @property
    def kind(self) -> str:
        """Key into ``COLOURS``."""
        return "offload" if self.outcome == "result" and not self.choice.startswith("split") else self.outcome


def plot_run(
    dots: Sequence[Dot],
    capacity: Sequence[tuple[float, float]],
    choices: Sequence[str],
    *,
    title: str,
    deadline_ms: float,
    duration_s: float,
    out: Path,
) -> None:
    """Capacity and bitrate sent, choices, latencies under the deadline, outcomes, all over one time axis; outages shaded.

    Args:
        dots: frames of one camera.
        capacity: (second, Mbit/s) steps.
        choices: names of what could be chosen, least accurate first.
        title: one line.
        deadline_ms: drawn as a line.
        duration_s: of the time axis.
        out: PNG, PDF or SVG, by its suffix.
    """
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        rows = max(2, len({d.choice for d in dots if d.choice}))
        heights = (1.25, 0.3 + 0.16 * rows, 1.25, 0.6)
        figure, axes = plt.subplots(4, 1, sharex=True, figsize=(7.0, 1.5 * sum(heights)), height_ratios=heights)
        _bitrates(axes[0], dots, capacity, duration_s)
        _choices(axes[1], dots, choices)
        _latencies(axes[2], dots, deadline_ms)
        _outcomes(axes[3], dots, duration_s)
        axes[3].set_xlabel("time (s)")
        axes[3].set_xlim(0, duration_s)
        axes[0].set_title(title, loc="left")
        for begin, end in _outages(capacity, duration_s):
            for ax in axes[:3]:
                ax.axvspan(begin, end, color="#f1efe9", lw=0, zorder=-1)
        for letter, ax in zip("abcd", axes, strict=True):
            ax.annotate(f"({letter})", (0, 1), xycoords="axes fraction", xytext=(-56, 1), textcoords="offset points", weight="bold")
        figure.align_ylabels(axes)
        figure.subplots_adjust(hspace=0.16)
        figure.savefig(out)
        plt.close(figure)


def _outages(capacity: Sequence[tuple[float, float]], duration_s: float) -> list[tuple[float, float]]:
    ends = [t for t, _ in capacity[1:]] + [duration_s]
    return [(begin, end) for (begin, rate), end in zip(capacity, ends, strict=True) if rate <= 0 < end - begin]


def _bitrates(ax: Any, dots: Sequence[Dot], capacity: Sequence[tuple[float, float]], duration_s: float) -> None:
    times = [t for t, _ in capacity] + [duration_s]
    rates = [r for _, r in capacity] + [capacity[-1][1]]
    n = int(duration_s / _BIN_S)
    sent = [0.0] * (n + 1)
    for d in dots:
        if d.payload_bytes and d.sent_s < duration_s:
            sent[int(d.sent_s / _BIN_S)] += d.payload_bytes * 8e-6 / _BIN_S
    high, most = sorted(rates)[int(0.9 * (len(rates) - 1))], max(sent)
    low = 0.0
    if most and high > _FAR_APART * most:  # on a linear axis the one would lie on the ground
        ax.set_yscale("log", nonpositive="clip")
        low = 0.5 * min(s for s in sent if s)
        ax.set_ylim(low, 8 * max(rates))
        plain_log_ticks(ax.yaxis, low, 8 * max(rates))
    else:
        ax.set_ylim(0, max(1.35 * most, 1.35 * high, 0.1))
    ax.fill_between(times, rates, low, step="post", color="#dddddd", lw=0, label="link capacity")
    ax.step([i * _BIN_S for i in range(n + 1)], sent, where="post", color=COLOURS["result"], lw=1.0, label="payload sent")
    ax.set_ylabel("Mbit/s")
    ax.legend(loc="upper right", ncols=2, borderaxespad=0.1)


def _choices(ax: Any, dots: Sequence[Dot], choices: Sequence[str]) -> None:
    used = {d.choice for d in dots}
    names = [c for c in choices if c in used] or list(choices)
    row = {name: i for i, name in enumerate(names)}
    for kind, colour in COLOURS.items():
        some = [d for d in dots if d.kind == kind and d.choice in row]
        ax.scatter([d.at_s for d in some], [row[d.choice] for d in some], s=5, color=colour, lw=0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.grid(axis="y", lw=0.3, color="#eeeeee")
    ax.set_axisbelow(True)
    ax.set_ylabel("choice")


def _latencies(ax: Any, dots: Sequence[Dot], deadline_ms: float) -> None:
    top = deadline_ms * 1.28
    for kind in ("result", "offload", "local"):
        some = [d for d in dots if d.kind == kind]
        ax.scatter([d.at_s for d in some], [d.latency_ms for d in some], s=5, color=COLOURS[kind], lw=0)
    missed = [d for d in dots if d.outcome == "expired"]
    ax.scatter([d.at_s for d in missed], [deadline_ms * 1.15] * len(missed), s=9, marker="x", color=COLOURS["expired"], lw=0.8)
    ax.axhline(deadline_ms, color="black", lw=0.8, ls="--")
    ax.annotate(
        "deadline", (1.0, deadline_ms), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points", va="center"
    )
    ax.set_ylim(0, top)
    ax.set_ylabel("latency (ms)")


def _outcomes(ax: Any, dots: Sequence[Dot], duration_s: float) -> None:
    n = max(1, int(duration_s))
    counts = {kind: [0] * n for kind in COLOURS}
    for d in dots:
        counts[d.kind][min(n - 1, int(d.at_s))] += 1
    totals = [max(1, sum(counts[k][i] for k in COLOURS)) for i in range(n)]
    floor = [0.0] * n
    labels = {"result": "split", "offload": "offload", "local": "local", "expired": "expired", "dropped": "dropped"}
    for kind, colour in COLOURS.items():
        share = [counts[kind][i] / totals[i] for i in range(n)]
        if any(share):
            ax.bar([i + 0.5 for i in range(n)], share, 1.0, bottom=floor, color=colour, label=labels[kind], lw=0)
        floor = [a + b for a, b in zip(floor, share, strict=True)]
    ax.set_ylim(0, 1)
    ax.set_yticks((0, 0.5, 1), ("0", ".5", "1"))
    ax.set_ylabel("outcomes\n(share)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5), ncols=5, handlelength=1.0)


def plot_policies(table: Mapping[str, Mapping[str, float]], *, title: str, metric: str, out: Path) -> None:
    """On-time share against delivered accuracy, a mark a policy; lines of equal accuracy x on-time behind."""
    plt = _pyplot()
    with plt.rc_context(_STYLE):
        figure, ax = plt.subplots(figsize=(3.5, 2.9))
        top = max(t["accuracy"] for t in table.values()) * 1.06
        low = min((t["accuracy"] for t in table.values() if t["accuracy"] > 0), default=0.0) * 0.92
        for level in range(1, 10):
            xs = [0.02 + i * 0.0098 for i in range(101)]
            ax.plot(xs, [level / 10 * top / x for x in xs], color="#e5e5e5", lw=0.5, zorder=0)
        for (name, t), colour in zip(table.items(), POLICY_COLOURS, strict=False):
            marker = "*" if name == "oracle" else ("o" if name == "ours" else "s")
            ax.scatter(
                t["on_time"], t["accuracy"], s=60 if marker == "*" else 26, marker=marker, color=colour, label=name, zorder=3
            )
        ax.set_xlim(0, 1.02)
        ax.set_ylim(low, top)
        ax.set_xlabel("answered before the deadline (share of captured frames)")
        ax.set_ylabel(f"accuracy of those ({metric})")
        ax.set_title(title, loc="left")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(out)
        plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependencyError("pictures need matplotlib; run: pip install matplotlib") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
