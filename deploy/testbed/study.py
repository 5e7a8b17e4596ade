"""Many runs: traces x conditions x policies, in parallel processes, and the tables that come of them."""

from __future__ import annotations

import multiprocessing
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

from deploy.testbed.scenario import Direction, Scenario
from deploy.testbed.simulate.oracle import oracle
from deploy.testbed.simulate.policies import POLICIES
from deploy.testbed.simulate.report import Summary
from deploy.testbed.simulate.run import simulate
from deploy.testbed.workload import Workload

ALL_POLICIES = (*POLICIES, "oracle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a trace is run under."""

    deadline_ms: float = 200.0
    fps: float = 10.0
    loss_percent: float = 0.0
    rtt_ms: float = 80.0
    slowdown: float = 10.0
    burst_packets: float = 1.0
    transport: str = "grpc"

    def __str__(self) -> str:
        said = f"{self.deadline_ms:g} ms, {self.fps:g} fps, {self.loss_percent:g} % loss"
        if self.burst_packets > 1:
            said += f" in bursts of {self.burst_packets:g}"
        said += f", RTT {self.rtt_ms:g} ms, x{self.slowdown:g}"
        return said if self.transport == "grpc" else f"{said}, {self.transport}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One trace under one condition with one policy."""

    family: str
    trace: str
    condition: Condition
    policy: str
    workload: Workload
    duration_s: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Its outcome."""

    family: str
    trace: str
    condition: Condition
    policy: str
    summary: Summary


def pairwise_conditions(seed: int = 0, count: int = 16) -> list[Condition]:
    """``count`` conditions in which every pair of levels of any two factors occurs at least once."""
    levels: list[Sequence[float]] = [(100, 200, 400), (10, 30), (0, 2, 5, 10), (20, 80, 200), (3, 10, 30)]
    open_ = {((i, a), (j, b)) for i, j in combinations(range(len(levels)), 2) for a in levels[i] for b in levels[j]}
    rng = random.Random(seed)  # noqa: S311
    rows: list[tuple[float, ...]] = []
    everything = list(product(*levels))
    while len(rows) < count:
        rng.shuffle(everything)
        best = max(everything, key=lambda row: len(open_ & _pairs(row)))
        open_ -= _pairs(best)
        rows.append(best)
    if open_:
        raise AssertionError(f"{len(open_)} pairs of levels are not covered by {count} conditions")
    return [Condition(deadline_ms=d, fps=f, loss_percent=p, rtt_ms=r, slowdown=s) for d, f, p, r, s in rows]


def _pairs(row: Sequence[float]) -> set[tuple[tuple[int, float], tuple[int, float]]]:
    return set(combinations(enumerate(row), 2))


def scenario_of(job: Job) -> Scenario:
    """The job as a scenario; loss and delay are the same in both directions."""
    c = job.condition
    link = {"delay_ms": c.rtt_ms / 2, "loss_percent": c.loss_percent, "burst_packets": c.burst_packets}
    return Scenario(
        name=f"{job.family}/{Path(job.trace).stem}",
        duration_s=job.duration_s,
        seed=job.seed,
        fps=c.fps,
        deadline_ms=c.deadline_ms,
        device_slowdown=c.slowdown,
        grants=False,
        transport=c.transport,
        uplink=Direction(trace=job.trace, **link),  # type: ignore[arg-type]
        downlink=Direction(mbps=20.0, **link),  # type: ignore[arg-type]
        folder=Path("/"),
    )


def run_job(job: Job) -> Row:
    """Runs one."""
    scenario = scenario_of(job)
    found = oracle(scenario, job.workload) if job.policy == "oracle" else simulate(scenario, job.workload, job.policy).summary()
    return Row(family=job.family, trace=job.trace, condition=job.condition, policy=job.policy, summary=found)


def run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[Row]:
    """Runs them all, in any order of completion."""
    if processes <= 1:
        yield from map(run_job, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(run_job, jobs, chunksize=8)


def pool_rows(rows: Iterable[Row]) -> Summary:
    """The mean of several runs, each run counting the same."""
    found = [r.summary for r in rows]
    n = len(found)
    outcomes: dict[str, int] = defaultdict(int)
    for s in found:
        for name, count in s.outcomes.items():
            outcomes[name] += count
    on_time, score = sum(s.on_time for s in found) / n, sum(s.score for s in found) / n
    return replace(
        found[0],
        captured=sum(s.captured for s in found),
        on_time=on_time,
        accuracy=score / on_time if on_time > 0 else 0.0,
        score=score,
        bytes_mean=sum(s.bytes_mean for s in found) / n,
        latency_ms_p50=sum(s.latency_ms_p50 for s in found) / n,
        latency_ms_p95=sum(s.latency_ms_p95 for s in found) / n,
        outcomes=dict(outcomes),
    )


def sample_traces(folder: Path | None, per_family: int, seed: int = 0) -> dict[str, list[str]]:
    """Trace names by family: 3G by vehicle, Oboe (both from ``folder``) and the project's own.

    The 3G sample takes the vehicles in turn, so that none is missing; ``per_family`` 0 takes everything. Synthetic traces are
    made from other seeds for each ``seed``.
    """
    from deploy.testbed.link.synthetic import KINDS

    rng = random.Random(seed)  # noqa: S311
    families: dict[str, list[str]] = {}
    if folder is not None:
        by_vehicle: dict[str, list[str]] = defaultdict(list)
        for path in sorted((folder / "traces_3gp").glob("*.log")):
            by_vehicle[path.name.split("_")[1]].append(str(path.resolve()))
        for paths in by_vehicle.values():
            rng.shuffle(paths)
        turns = [
            paths[i]
            for i in range(max(map(len, by_vehicle.values()), default=0))
            for _, paths in sorted(by_vehicle.items())
            if i < len(paths)
        ]
        families["3g"] = turns[:per_family] if per_family else turns
        oboe = sorted(str(p.resolve()) for p in (folder / "traces_oboe").glob("*.txt"))
        rng.shuffle(oboe)
        families["oboe"] = oboe[:per_family] if per_family else oboe
    synthetic = [f"synthetic:{kind}:{i}" for i in range(4 * seed, 4 * seed + 4) for kind in KINDS]
    families["synthetic"] = synthetic[:per_family] if per_family else synthetic
    return {k: v for k, v in families.items() if v}
