"""Who used the processor: shares of a tree of processes, of all others and of the hypervisor, between two moments (Linux).

A share of 1.0 is one core. Timings on a machine that others use as well mean little without theirs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


def _machine_s() -> tuple[float, float]:
    """Seconds all cores together were busy, and stolen by the hypervisor."""
    fields = [int(x) * _TICK_S for x in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return user + nice + system + irq + softirq, steal


def _label(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    for word, name in (
        ("ray::ServeReplica", "replica"), ("ray::", "ray system"), ("site-packages/ray/", "ray system"), ("edge_server", "server"),
        ("server_load", "load"), ("http_load", "load"), ("http_tails", "server"), ("edge_client", "client"),
    ):  # fmt: skip
        if word in line:
            return name
    return "bench" if process.pid == os.getpid() else process.name()


class Pinned:
    """How long the threads pinned to one core, and to it alone, ran on it and waited for it since the last `lap`.

    Args:
        core: the core.
        root: of the tree of processes; None: this process's.
    """

    def __init__(self, core: int, root: int | None = None) -> None:
        self._core = core
        self._root = psutil.Process(root)
        self._before = self._times()

    def _times(self) -> dict[str, tuple[int, int]]:
        found = {}
        for process in [self._root, *self._root.children(recursive=True)]:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{process.pid}/task").iterdir():
                    with contextlib.suppress(OSError):
                        if os.sched_getaffinity(int(task.name)) == {self._core}:
                            run, wait, _ = (task / "schedstat").read_text(encoding="ascii").split()
                            found[task.name] = (int(run), int(wait))
        return found

    def lap(self) -> float:
        """(ran + waited) / ran: by how much the work would have been quicker had no one else used the core."""
        now = self._times()
        ran, waited = (sum(t[i] - self._before.get(name, (0, 0))[i] for name, t in now.items()) for i in (0, 1))
        self._before = now
        return (ran + waited) / ran if ran > 0 else 1.0


class CpuMeter:
    """Measures from its creation, or the last `lap`, to the next `lap`.

    Args:
        root: of the tree that counts as ours; None: this process.
        label: a process's name in the report.
    """

    def __init__(self, root: int | None = None, label: Callable[[psutil.Process], str] = _label) -> None:
        self._root = psutil.Process(root)
        self._label = label
        self._begin()

    def _begin(self) -> None:
        self._at_s = time.monotonic()
        self._machine = _machine_s()
        self._ours = self._snapshot()

    def _snapshot(self) -> dict[tuple[int, str], float]:
        found = {}
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                found[process.pid, self._label(process)] = times.user + times.system
            except psutil.Error:
                continue
        return found

    def lap(self) -> dict[str, float]:
        """Cores used by each of our processes (several of one name are numbered), by the others, and stolen."""
        wall_s = max(1e-6, time.monotonic() - self._at_s)
        busy_s, stolen_s = (now - before for now, before in zip(_machine_s(), self._machine, strict=True))
        used: dict[str, list[float]] = {}
        for key, seconds in self._snapshot().items():
            used.setdefault(key[1], []).append(max(0.0, seconds - self._ours.get(key, 0.0)) / wall_s)
        shares: dict[str, float] = {}
        for name, values in used.items():
            if name == "replica" and len(values) > 1:
                shares.update({f"replica {i + 1}": v for i, v in enumerate(sorted(values, reverse=True))})
            else:
                shares[name] = sum(values)
        shares = {name: share for name, share in shares.items() if share >= 0.005}
        shares["others"] = max(0.0, busy_s / wall_s - sum(sum(v) for v in used.values()))
        shares["stolen"] = stolen_s / wall_s
        self._begin()
        return {name: round(share, 2) for name, share in shares.items()}
