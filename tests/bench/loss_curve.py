"""On-time share and accuracy against packet loss, over a stream and over datagrams: one picture and one JSON line.

    python -m tests.bench.loss_curve --traces $HEADTAIL_DATA/traces/traces_oboe --out docs/figures/loss.png

Frames that a server answered are counted apart from local ones, which no packet loss can stop.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

from deploy.testbed.comparison import find_traces
from deploy.testbed.study import Condition, Job, pool_rows, run_jobs
from deploy.testbed.workload import load_workload

LOSSES = (0, 2, 5, 10, 20, 30, 45, 60)
TRANSPORTS = {"grpc": "#D55E00", "quic": "#0072B2"}
WORKLOAD = Path(__file__).parent / "workloads" / "efficientnet-lite0.json"


def main() -> None:
    """Runs, draws, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--duration-s", type=float, default=30.0)
    parser.add_argument("--deadline-ms", type=float, default=200.0)
    parser.add_argument("--slowdown", type=float, default=3.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    workload = load_workload(WORKLOAD)
    jobs = [
        Job(
            family="", trace=trace, policy="ours", workload=workload, duration_s=args.duration_s, seed=0,
            condition=Condition(deadline_ms=args.deadline_ms, slowdown=args.slowdown, loss_percent=loss, transport=transport),
        )
        for trace in find_traces(args.traces, limit=args.limit, seed=0)
        for transport in TRANSPORTS
        for loss in LOSSES
    ]  # fmt: skip
    by = defaultdict(list)
    for row in run_jobs(jobs, args.jobs):
        by[row.condition.transport, row.condition.loss_percent].append(row)
    found: dict[str, dict[str, list[float]]] = {t: {"on_time": [], "by_server": [], "accuracy": []} for t in TRANSPORTS}
    for transport, curves in found.items():
        for loss in LOSSES:
            pooled = pool_rows(by[transport, loss])
            curves["on_time"].append(round(pooled.on_time, 4))
            curves["by_server"].append(round(pooled.outcomes.get("result", 0) / pooled.captured, 4))
            curves["accuracy"].append(round(pooled.accuracy, 4))
    draw(found, args.out)
    print(json.dumps({"loss_percent": LOSSES, "transports": found}))


def draw(found: dict[str, dict[str, list[float]]], out: Path) -> None:
    """Two panels over one axis of loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.6), dpi=160)
    for transport, curves in found.items():
        left.plot(LOSSES, curves["on_time"], color=TRANSPORTS[transport], label=f"{transport}, any answer")
        left.plot(LOSSES, curves["by_server"], color=TRANSPORTS[transport], linestyle="--", label=f"{transport}, the server's")
        right.plot(LOSSES, curves["accuracy"], color=TRANSPORTS[transport], label=transport)
    left.set(xlabel="packets lost, %", ylabel="frames on time", ylim=(-0.02, 1.02))
    right.set(xlabel="packets lost, %", ylabel="accuracy of the answers")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    main()
