"""What serving costs in throughput: many streams through `edge-server` beside the same tail called in a loop.

The tail is pinned to core 0 on one thread; the ingress and the replayed, pre-encoded load (a process of its own) share
core 1. "Direct" is the same tail on core 0, called in a loop with the same batch sizes in the same proportions; pulses of
load and direct loops take turns.

    python -m tests.bench.serving [--streams 1 16 64 256] [--backends embedded] [--model efficientnet-lite0] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_server.memory import keep_freed_memory
from edge_server.models import locate
from splitters.bundle import Bundle, open_bundle
from splitters.tails import Tail, load_tail
from tests.fakes.server_client import Device, picture
from tests.fakes.server_load import write_frames
from tests.fakes.server_running import child

TAIL_CORE, LOAD_CORE = 0, 1
SHOTS = 8


class Direct:
    """The tail in this process, on the tail's core."""

    def __init__(self, bundle: Bundle, tail: Tail, device: Device) -> None:
        self._tail = tail
        self._warm: set[int] = set()
        height, width = bundle.manifest.preprocess.size_px
        self._size = (width, height)
        decoded = [device.codec.dequantise(device.codec.decode(device.payloads(picture(s, 640, 480)))) for s in range(SHOTS)]
        self._latents = [[frame[i] for frame in decoded] for i in range(len(decoded[0]))]

    def _run(self, size: int) -> None:
        # Stacked anew each time, as a server has to.
        batch = [np.stack([tensors[i % SHOTS] for i in range(size)]) for tensors in self._latents]
        self._tail.run(batch, [self._size] * size)

    def frames_per_s(self, frames_by_batch: dict[int, int], seconds: float) -> float:
        """Throughput with these batch sizes in these proportions (frames answered in a batch of that size)."""
        plan = [size for size, frames in frames_by_batch.items() for _ in range(max(1, round(frames / size)))]
        order = np.random.default_rng(0).permutation(len(plan))
        for size in set(plan) - self._warm:
            self._run(size)
            self._run(size)
            self._warm.add(size)
        done, at = 0, 0
        begun = time.perf_counter()
        while (elapsed := time.perf_counter() - begun) < seconds:
            size = plan[order[at % len(plan)]]
            self._run(size)
            done, at = done + size, at + 1
        return done / elapsed


class Replay:
    """The load's process, on its core."""

    def __init__(self, address: str, frames: Path, sha256: str, streams: int, window: int) -> None:
        line = ["taskset", "-c", str(LOAD_CORE), sys.executable, "-m", "tests.fakes.server_load", address, str(frames)]
        line += ["--sha256", sha256, "--streams", str(streams), "--window", str(window)]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def pulse(self, seconds: float) -> dict[str, Any]:
        """Full windows for that long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def compare(direct: Direct, replay: Replay, seconds: float, rounds: int) -> dict[str, Any]:
    """Load and direct calls in turns: what the machine does meanwhile hits both alike; the medians over the rounds."""
    replay.pulse(2.0)  # every batch size has been run once
    rows, alone = [], []
    for _ in range(rounds):
        rows.append(replay.pulse(seconds))
        sizes = {int(k): v for k, v in rows[-1]["batches"].items()}
        alone.append(direct.frames_per_s(sizes, seconds))
    middle = {
        k: float(np.median([row[k] for row in rows])) for k in ("frames_per_s", "latency_ms_p50", "latency_ms_p99", "tail_ms_p50")
    }
    total: Counter[int] = Counter()
    errors: Counter[str] = Counter()
    for row in rows:
        total.update({int(k): v for k, v in row["batches"].items()})
        errors.update(row["errors"])
    return {
        **{k: round(v, 2) for k, v in middle.items()}, "direct_frames_per_s": round(float(np.median(alone)), 1),
        "ratio": round(float(np.median([row["frames_per_s"] / d for row, d in zip(rows, alone, strict=True)])), 3),
        "mean_batch": round(sum(total.values()) / sum(n / s for s, n in total.items()), 2), "errors": dict(errors),
    }  # fmt: skip


def measure(args: argparse.Namespace, tmp: Path) -> list[dict[str, Any]]:
    """One row per backend and number of streams."""
    bundle = open_bundle(locate(args.model))
    device = Device(bundle)
    frames = tmp / "frames.bin"
    write_frames(frames, [device.layers(picture(s, 640, 480), 0)[0] for s in range(SHOTS)])
    os.sched_setaffinity(0, {TAIL_CORE})
    torch.set_num_threads(1)
    keep_freed_memory()  # as the server does: the loop it is compared with gets the same allocator
    direct = Direct(bundle, load_tail(bundle), device)
    rows = []
    for backend in args.backends:
        extra = ["--backend", backend, "--tail-cpus", str(TAIL_CORE), "--max-batch", str(args.max_batch), "--log-level", "warning"]
        os.sched_setaffinity(0, {LOAD_CORE})  # the child inherits it; its tail's thread pins itself to the other core
        with child(tmp, bundle.path, arguments=extra) as server:
            os.sched_setaffinity(0, {TAIL_CORE})
            for streams in args.streams:
                replay = Replay(server.address, frames, bundle.sha256, streams, args.window if streams < 64 else 1)
                row = {"backend": backend, "streams": streams, **compare(direct, replay, args.seconds, args.rounds)}
                replay.close()
                rows.append(row)
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--backends", nargs="+", default=["embedded"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each pulse of load and of each direct loop")
    parser.add_argument("--rounds", type=int, default=5, help="turns of load and direct calls")
    parser.add_argument("--window", type=int, default=2, help="frames in flight of each stream; 1 from 64 streams on")
    parser.add_argument("--max-batch", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        rows = measure(args, Path(tmp))
    print(json.dumps({"bench": "serving", "model": args.model, "rows": rows}))


if __name__ == "__main__":
    main()
