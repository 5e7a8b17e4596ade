"""What serving costs: many streams through `edge-server` beside the same tail called in a loop, and behind other servers.

The tail is pinned to core 0 on one thread; the ingress and the replayed, pre-encoded load (a process of its own) share
core 1. "Direct" is the same tail on core 0, called in a loop with the same batch sizes in the same proportions. The
embedded server stays up throughout; each other system is started in turn and measured in pulses that alternate with the
embedded server's and the direct loop's, so that whatever else the machine does hits all alike. What other processes took
of the processor meanwhile is reported as ``others_cores``: above 0.2 the latencies are not worth much. ``ratio_undisturbed``
is the ratio to direct with each side's throughput raised by what the tail's thread waited for its core while others had it.

    python -m tests.bench.serving [--against ray litserve serve-http] [--loads 1x1 1x2 16x2 64x1 256x1] [--rounds 3]

A load of ``16x2`` is 16 streams with two frames in flight each. Ray and LitServe are measured where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_server.memory import keep_freed_memory
from edge_server.models import locate
from splitters.bundle import Bundle, open_bundle
from splitters.runtime.tail import Tail, load_tail
from tests.bench.serving_systems import System, missing, started
from tests.fakes.cpu_meter import CpuMeter, Pinned
from tests.fakes.server_client import Device, picture
from tests.fakes.server_load import write_frames

TAIL_CORE, LOAD_CORE = 0, 1
SHOTS = 8
OTHERS = ("ray", "litserve", "serve-http")
_FIGURES = ("frames_per_s", "latency_ms_p50", "latency_ms_p99", "tail_ms_p50", "over_tail_ms_p50")


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


class Measured:
    """One system's pulses under one load, each with the direct loop that follows it."""

    def __init__(self, system: System, direct: Direct) -> None:
        self.system = system
        self._direct = direct
        self._pulses: list[dict[str, Any]] = []
        self._alone: list[float] = []
        self._undisturbed: list[float] = []

    def turn(self, replay: Any, seconds: float, direct_s: float) -> None:
        """A pulse, then the direct loop with the batches it made."""
        with self.system.awake():
            core = Pinned(TAIL_CORE)
            pulse = replay.pulse(seconds)
            served = pulse["frames_per_s"] * core.lap()
        self._pulses.append(pulse)
        batches = {int(size): frames for size, frames in pulse["batches"].items()}
        core.lap()
        self._alone.append(self._direct.frames_per_s(batches, direct_s) if batches else float("nan"))
        self._undisturbed.append(served / (self._alone[-1] * core.lap()))

    def series(self, figure: str) -> np.ndarray[Any, Any]:
        """A figure of every pulse."""
        return np.array([pulse[figure] for pulse in self._pulses])

    def row(self) -> dict[str, Any]:
        """Medians over the pulses."""
        sizes: Counter[int] = Counter()
        errors: Counter[str] = Counter()
        for pulse in self._pulses:
            sizes.update({int(size): frames for size, frames in pulse["batches"].items()})
            errors.update(pulse["errors"])
        return {
            "system": self.system.name, **{f: round(float(np.median(self.series(f))), 2) for f in _FIGURES},
            "direct_frames_per_s": round(float(np.median(self._alone)), 1),
            "ratio_to_direct": round(float(np.median(self.series("frames_per_s") / np.array(self._alone))), 3),
            "ratio_undisturbed": round(float(np.median(self._undisturbed)), 3),
            "mean_batch": round(sum(sizes.values()) / max(1e-9, sum(n / s for s, n in sizes.items())), 2), "errors": dict(errors),
        }  # fmt: skip


def compared(ours: Measured, other: Measured | None, others_cores: float) -> list[dict[str, Any]]:
    """The rows of one load: ours, and the other's with what it adds to ours."""
    rows = [ours.row()]
    if other is not None:
        fps = other.series("frames_per_s") / ours.series("frames_per_s")
        added = other.series("latency_ms_p50") - ours.series("latency_ms_p50")
        over = other.series("over_tail_ms_p50") - ours.series("over_tail_ms_p50")
        rows.append(
            {
                **other.row(),
                "ratio_to_embedded": round(float(np.median(fps)), 3),
                "added_ms_p50": round(float(np.median(added)), 2),
                "added_over_tail_ms_p50": round(float(np.median(over)), 2),
            }
        )
    return [{**row, "others_cores": round(others_cores, 2)} for row in rows]


def measure(args: argparse.Namespace, tmp: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of every load under every pair of systems, and which systems were skipped for want of what."""
    bundle = open_bundle(locate(args.model))
    device = Device(bundle)
    frames = tmp / "frames.bin"
    write_frames(frames, [device.layers(picture(s, 640, 480), 0) for s in range(SHOTS)])
    os.sched_setaffinity(0, {TAIL_CORE})
    torch.set_num_threads(1)
    keep_freed_memory()  # as the server does: the loop it is compared with gets the same allocator
    direct = Direct(bundle, load_tail(bundle), device)
    skipped = {name: lack for name in args.against if (lack := missing(name))}
    rows = []
    cores = {"tail_core": TAIL_CORE, "load_core": LOAD_CORE, "max_batch": args.max_batch}
    with started("embedded", tmp, bundle, **cores) as ours:
        for name in [n for n in args.against if n not in skipped] or [""]:
            with ExitStack() as stack:
                other = stack.enter_context(started(name, tmp, bundle, **cores)) if name else None
                for load in args.loads:
                    streams, _, window = load.partition("x")
                    found = one_load(args, (ours, other), direct, bundle, frames, int(streams), int(window or 1))
                    rows += [{"load": load, **row} for row in found]
                    for row in rows[-len(found) :]:
                        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows, skipped


def one_load(
    args: argparse.Namespace, systems: tuple[System, System | None], direct: Direct, bundle: Bundle, frames: Path,
    streams: int, window: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Both systems in turns under one load. Where more frames are in flight a pulse has to be longer to be steady."""
    seconds = args.seconds * (1 if streams * window <= 32 else 2 if streams * window <= 64 else 4)
    pairs = []
    for system in systems:
        if system is not None:
            with system.awake():
                replay = system.load(frames, bundle, streams, window, LOAD_CORE)
                replay.pulse(seconds)  # every batch size has been run once
            pairs.append((Measured(system, direct), replay))
    meter = CpuMeter()
    for _ in range(args.rounds):
        for measured, replay in pairs:
            measured.turn(replay, seconds, args.seconds)
    others = meter.lap()["others"]
    for measured, replay in pairs:
        with measured.system.awake():
            replay.close()
    return compared(pairs[0][0], pairs[1][0] if len(pairs) > 1 else None, others)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--against", nargs="*", choices=OTHERS, default=list(OTHERS), help="beside the embedded server")
    parser.add_argument("--loads", nargs="+", default=["1x1", "1x2", "16x2", "64x1", "256x1"], metavar="STREAMSxWINDOW")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each pulse of load and of each direct loop")
    parser.add_argument("--rounds", type=int, default=3, help="turns of load and direct calls")
    parser.add_argument("--max-batch", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        rows, skipped = measure(args, Path(tmp))
    for name, lack in skipped.items():
        print(f"{name} was skipped: {lack} is not installed")
    print(json.dumps({"bench": "serving", "model": args.model, "rows": rows, "skipped": skipped}))


if __name__ == "__main__":
    main()
