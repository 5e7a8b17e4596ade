"""Many servers: the cameras spread over them at random, and each server is simulated alone, with its own.

A camera keeps its server and shares no link with others, so servers do not touch each other, and a sample of them stands for all.
The sample is drawn by load: servers stand in the order of how many cameras fell to them, every n-th is taken, the most crowded one
always. Servers are simulated in processes beside each other.
"""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from deploy.testbed.scenario import Scenario
from deploy.testbed.simulate.report import Summary
from deploy.testbed.simulate.run import simulate
from deploy.testbed.workload import Workload
from protos.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One server of the fleet.

    Attributes:
        cameras: that fell to it.
        summary: of their frames.
        sent: frames that reached it.
        refused: of those, told no.
        door_busy, tail_busy: share of the time that the door worked, and a tail on the mean.
    """

    cameras: int
    summary: Summary
    sent: int
    refused: int
    door_busy: float
    tail_busy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """What the sampled servers came to.

    Attributes:
        servers, cameras: of the whole fleet.
        shares: the sampled servers, the least crowded first.
    """

    servers: int
    cameras: int
    shares: tuple[Share, ...]

    def summary(self) -> dict[str, Any]:
        """In numbers: means over frames, and the worst server beside them."""
        captured = sum(s.summary.captured for s in self.shares)

        def mean(name: str) -> float:
            return sum(float(getattr(s.summary, name)) * s.summary.captured for s in self.shares) / max(1, captured)

        sent = sum(s.sent for s in self.shares)
        outcomes: Counter[str] = Counter()
        for share in self.shares:
            outcomes.update(share.summary.outcomes)
        return {
            "servers": self.servers, "cameras": self.cameras, "sampled_servers": len(self.shares),
            "sampled_cameras": sum(s.cameras for s in self.shares), "captured": captured, "on_time": mean("on_time"),
            "score": mean("score"), "bytes_mean": mean("bytes_mean"),
            "refused": sum(s.refused for s in self.shares) / max(1, sent),
            "door_busy": sum(s.door_busy for s in self.shares) / len(self.shares),
            "tail_busy": sum(s.tail_busy for s in self.shares) / len(self.shares),
            "worst_on_time": min(s.summary.on_time for s in self.shares),
            "worst_p95_ms": max(s.summary.latency_ms_p95 for s in self.shares),
            "most_cameras": max(s.cameras for s in self.shares), "outcomes": dict(sorted(outcomes.items())),
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, server by server."""
        return {**self.summary(), "shares": [asdict(s) for s in self.shares]}


def spread(cameras: int, servers: int, seed: int) -> list[int]:
    """How many cameras fall to each server, in ascending order: as many balls into as many bins, none of them empty."""
    rng = random.Random(f"spread/{seed}")  # noqa: S311
    counts = [1] * servers
    for _ in range(cameras - servers):
        counts[rng.randrange(servers)] += 1
    return sorted(counts)


def sampled(counts: list[int], sample: int) -> list[int]:
    """``sample`` of the counts, evenly spread over their order, the largest among them; 0: all."""
    if not sample or sample >= len(counts):
        return counts
    if sample == 1:
        return [counts[-1]]
    return [counts[round(i * (len(counts) - 1) / (sample - 1))] for i in range(sample)]


def simulate_fleet(scenario: Scenario, workload: Workload, policy: str = "ours", *, sample: int = 0, processes: int = 1) -> Fleet:
    """Runs a scenario of several servers. The same arguments give the same result, whatever the processes.

    Args:
        scenario: what happens.
        workload: what the cameras can choose from.
        policy: who decides.
        sample: how many of the servers are simulated; 0: all.
        processes: at a time.

    Raises:
        ConfigError: ``sample`` or ``processes`` is out of range, or the workload lacks what the policy needs.
    """
    if sample < 0 or processes < 1:
        raise ConfigError(f"sample must not be negative and processes at least 1, got {sample} and {processes}")
    counts = sampled(spread(scenario.cameras, scenario.servers, scenario.seed), sample)
    jobs = [replace(scenario, cameras=n, servers=1, seed=scenario.seed + i) for i, n in enumerate(counts)]
    run = partial(_share, workload=workload, policy=policy)
    if processes == 1:
        shares = [run(job) for job in jobs]
    else:
        with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=multiprocessing.get_context("spawn")) as pool:
            shares = list(pool.map(run, jobs))
    return Fleet(servers=scenario.servers, cameras=scenario.cameras, shares=tuple(shares))


def _share(scenario: Scenario, *, workload: Workload, policy: str) -> Share:
    run = simulate(scenario, workload, policy)
    server, duration_ns = run.server, scenario.duration_s * 1e9
    return Share(
        cameras=scenario.cameras,
        summary=run.summary(),
        sent=server.served + server.refused,
        refused=server.refused,
        door_busy=server.door_busy_ns / duration_ns,
        tail_busy=server.tails_busy_ns / duration_ns / scenario.tails,
    )
