"""``edge-testbed compare``: every policy over a folder of traces, on one device or on several."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.testbed.arguments import number, numbers
from deploy.testbed.link.datagrams import TRANSPORTS
from deploy.testbed.link.trace import load_trace
from deploy.testbed.plots import plot_policies
from deploy.testbed.simulate.report import Summary
from deploy.testbed.study import ALL_POLICIES, Condition, Job, Row, pool_rows, run_jobs, sample_traces
from deploy.testbed.workload import Workload
from edge_client import extensions
from protos.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own options."""
    parser.add_argument(
        "--traces",
        type=Path,
        help="folder searched to the bottom: every file in it that reads as a trace (seconds and Mbit/s, or Mahimahi) is one;"
        " default: synthetic ones",
    )
    parser.add_argument("--deadline-ms", type=number, default=200.0)
    parser.add_argument("--fps", type=number, default=10.0)
    parser.add_argument("--loss-percent", type=number, default=0.0)
    parser.add_argument("--burst-packets", type=number, default=1.0, help="mean run of lost packets; 1: independent (the default)")
    parser.add_argument("--rtt-ms", type=number, default=80.0)
    parser.add_argument(
        "--transport", choices=TRANSPORTS, default="grpc",
        help="what carries frames: TCP, datagrams with parity, or those where packets are lost (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device-slowdown",
        type=numbers,
        default=(10.0,),
        metavar="FACTOR[,FACTOR...]",
        help="how many times slower the device is than the machine that measured; several: a table for each as well (default 10)",
    )
    parser.add_argument(
        "--policies",
        default=",".join(p for p in ALL_POLICIES if p != "ours_table"),
        help="comma separated; also a registered one, or module:Class (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, default=12, help="traces, drawn with --seed; 0: all (default %(default)s)")
    parser.add_argument("--duration-s", type=number, default=30.0, help="virtual time a trace (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")


def compare(args: argparse.Namespace, workload: Workload) -> None:
    """Runs every policy on every trace and prints the tables.

    Raises:
        ConfigError: an unknown policy, or no trace.
        StorageError: the picture cannot be written.
    """
    policies = _policies(args.policies.split(","), workload)
    traces = _traces(args)
    conditions = [
        Condition(
            deadline_ms=args.deadline_ms,
            fps=args.fps,
            loss_percent=args.loss_percent,
            rtt_ms=args.rtt_ms,
            slowdown=slowdown,
            burst_packets=args.burst_packets,
            transport=args.transport,
        )
        for slowdown in args.device_slowdown
    ]
    jobs = [
        Job(family="", trace=t, condition=c, policy=p, workload=workload, duration_s=args.duration_s, seed=args.seed)
        for c in conditions
        for t in traces
        for p in policies
    ]
    rows = list(run_jobs(jobs, args.jobs))
    report: dict[str, object] = {"workload": workload.name, "traces": len(traces)}
    if len(conditions) > 1:
        by_slowdown = {c.slowdown: [r for r in rows if r.condition == c] for c in conditions}
        tables = {f"{slowdown:g}": _table(some, policies, f"{len(traces)} traces, device x{slowdown:g}")
                  for slowdown, some in by_slowdown.items()}  # fmt: skip
        report["slowdowns"] = {slowdown: {"policies": table} for slowdown, table in tables.items()}
    what = str(conditions[0]) if len(conditions) == 1 else f"all {len(conditions)} devices"
    report["policies"] = table = _table(rows, policies, f"{len(traces)} traces, {what}, {workload.name}")
    if args.plot:
        metric = workload.points[0].accuracy_metric
        plot_policies(table, title=f"{len(traces)} traces, {args.deadline_ms:g} ms", metric=metric, out=args.plot)
    if args.json:
        print(json.dumps(report))


def _policies(asked: Sequence[str], workload: Workload) -> list[str]:
    """Those asked for, less what the workload has nothing for."""
    unknown = sorted(p for p in set(asked) - set(ALL_POLICIES) if ":" not in p and p not in extensions.POLICIES)
    if unknown:
        raise ConfigError(f"no policy {', '.join(unknown)}; there are {', '.join(ALL_POLICIES)}")
    lacking = {"local"} if workload.local is None else set()
    lacking |= {"oracle"} if workload.clip is not None else set()  # it reads the table's sizes
    lacking |= {p for p in asked if p.startswith("offload")} if not workload.offloads else set()
    for p in sorted(lacking & set(asked)):
        print(f"{p}: left out, {workload.name} has nothing measured for it", file=sys.stderr)
    return [p for p in dict.fromkeys(asked) if p not in lacking]


def _table(rows: Sequence[Row], policies: Sequence[str], title: str) -> Mapping[str, Mapping[str, float]]:
    """Prints how the policies did, the best first, and returns it by policy."""
    by: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by[row.policy].append(row)
    pooled: dict[str, Summary] = {p: pool_rows(by[p]) for p in policies}
    print(f"{title}\n{'policy':<18}{'on time':>9}{'accuracy':>10}{'acc x on':>10}{'bytes':>9}{'p95 ms':>8}")
    for p, s in sorted(pooled.items(), key=lambda item: -item[1].score):
        print(f"{p:<18}{s.on_time:>9.1%}{s.accuracy:>10.4f}{s.score:>10.4f}{s.bytes_mean:>9.0f}{s.latency_ms_p95:>8.0f}")
    return {
        p: {
            "on_time": round(s.on_time, 4), "accuracy": round(s.accuracy, 4), "bytes_mean": round(s.bytes_mean, 1),
            "score": round(s.score, 4),
        }
        for p, s in pooled.items()
    }  # fmt: skip


def _traces(args: argparse.Namespace) -> list[str]:
    """As many of the folder's traces as asked for."""
    if args.traces is None:
        return sample_traces(None, args.limit, args.seed)["synthetic"]
    return find_traces(args.traces, limit=args.limit, seed=args.seed)


def find_traces(folder: Path, *, limit: int, seed: int) -> list[str]:
    """``limit`` of a folder's traces, drawn with ``seed``; 0: all of them.

    Raises:
        ConfigError: it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise ConfigError(f"--traces must be a folder, {folder} is none")
    found = sorted(str(p.resolve()) for p in folder.rglob("*") if p.is_file() and _is_trace(p))
    if not found:
        raise ConfigError(f"{folder} holds no traces: no file in it reads as seconds and Mbit/s, or as Mahimahi's milliseconds")
    random.Random(seed).shuffle(found)  # noqa: S311
    return found[:limit] if limit else found


def _is_trace(path: Path) -> bool:
    try:
        load_trace(path)
    except ConfigError:
        return False
    return True
