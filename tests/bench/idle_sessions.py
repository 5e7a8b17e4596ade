"""A thousand idle sessions on a thousand TCP connections, then 200 active ones at 0.5 frames/s beside them, on one ingress.

python -m tests.bench.idle_sessions [--idle 1000] [--active 200] [--processes 4] [--seconds 20] [--model efficientnet-lite0]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from edge_server.models import locate
from splitters.bundle import open_bundle
from tests.fakes.server_client import Device, picture
from tests.fakes.server_load import write_frames
from tests.fakes.server_running import child

LIMIT_BYTES = 200_000  # a session


def clients(address: str, frames: Path, sha256: str, count: int, **each: int) -> list[subprocess.Popen[str]]:
    """Client processes, all greeted."""
    line = [sys.executable, "-m", "tests.fakes.server_idle", address, str(frames), "--sha256", sha256]
    line += [part for name, value in each.items() for part in (f"--{name}", str(value))]
    started = [subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
    return started


def pulse(processes: list[subprocess.Popen[str]], seconds: float) -> list[dict[str, float]]:
    """Every process's figures after so many seconds of activity."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]


def connections(pid: int) -> int:
    """TCP connections of a process."""
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process(pid).net_connections("tcp"))


def measure(args: argparse.Namespace, tmp: Path) -> dict[str, object]:
    """The whole bench."""
    bundle = open_bundle(locate(args.model))
    device = Device(bundle)
    frames = tmp / "frames.bin"
    shots = [device.layers(picture(s, 640, 480), 0) for s in range(4)]
    layers = len(shots[0])
    write_frames(frames, shots)
    with child(tmp, bundle.path, arguments=("--log-level", "warning")) as server:
        process = psutil.Process(server.process.pid)
        # One process of a few cameras first: what the server takes once and for all is not a session's.
        first = clients(server.address, frames, bundle.sha256, 1, idle=4, active=4)
        pulse(first, 3.0)
        before = process.memory_info().rss
        idle = clients(server.address, frames, bundle.sha256, args.processes, idle=-(-args.idle // args.processes))
        time.sleep(3.0)
        open_tcp = connections(server.process.pid)
        grown = process.memory_info().rss - before
        active = clients(server.address, frames, bundle.sha256, args.processes, active=-(-args.active // args.processes))
        cpu = process.cpu_times()
        rows = pulse(active, args.seconds)
        used = process.cpu_times()
        with_active = process.memory_info().rss - before
        lost = sum(row["idle_lost"] for row in pulse(idle, 0.0))
        for each in [*first, *idle, *active]:
            assert each.stdin is not None
            each.stdin.close()
        for each in [*first, *idle, *active]:
            each.wait(30)
    return {
        "bench": "idle_sessions", "idle": args.idle, "tcp_connections": open_tcp, "client_processes": args.processes,
        "bytes_per_idle_session": round(grown / args.idle), "active": args.active, "layers_per_frame": layers,
        "answered": sum(r["answered"] for r in rows),
        "errors": sum(r["errors"] for r in rows), "idle_lost": lost,
        "active_latency_ms_p50": max(r["latency_ms_p50"] for r in rows),
        "active_latency_ms_p99": max(r["latency_ms_p99"] for r in rows), "grown_with_active_bytes": with_active,
        "server_cpu_share": round((used.user + used.system - cpu.user - cpu.system) / args.seconds, 3),
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--active", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--model", default="efficientnet-lite0")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        figures = measure(args, Path(tmp))
    print(json.dumps(figures))
    assert figures["bytes_per_idle_session"] <= LIMIT_BYTES
    assert figures["errors"] == figures["idle_lost"] == 0


if __name__ == "__main__":
    main()
