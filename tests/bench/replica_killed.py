"""A replica is killed with SIGKILL under load: what the cameras see, and how soon all is as before.

    python -m tests.bench.replica_killed [--model efficientnet-lite0] [--cameras 8] [--fps 4] [--deadline-ms 1000]

A Ray cluster with two replicas, our own door in front, cameras that send at a fixed rate, each frame with a deadline. After
``--before`` seconds one replica is killed. Reported: frames by outcome (every frame sent has exactly one, or the bench
fails), latencies before and after, the longest latency after the kill, the time until the last frame that was slower than
any before the kill had its answer, and the time until Serve had two replicas again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge_server.models import locate
from protos.headtail.v1 import headtail_pb2 as pb
from splitters.bundle import open_bundle
from tests.fakes.cpu_meter import CpuMeter
from tests.fakes.ray_cluster import Cluster, cluster
from tests.fakes.server_client import Device, Stream, picture, session
from tests.fakes.server_running import child

SHOTS = 8


class Frame(NamedTuple):
    """One frame's fate."""

    sent_s: float
    latency_s: float
    outcome: str


async def camera(
    address: str, sha256: str, shots: list[list[pb.FrameLayer]], args: argparse.Namespace, end: asyncio.Event, phase: float
) -> tuple[int, list[Frame]]:
    """(frames sent, their fates) until the end."""
    sent: dict[int, float] = {}
    fates: list[Frame] = []
    async with session(address, sha256, max_in_flight=64) as stream:
        reader = asyncio.create_task(_read(stream, sent, fates))
        await asyncio.sleep(phase / args.fps)
        frame_id = 0
        while not end.is_set():
            begun = sent[frame_id] = time.monotonic()
            for layer in shots[frame_id % len(shots)]:
                layer.frame_id, layer.deadline_remaining_ns = frame_id, int(args.deadline_ms * 1e6)
                layer.sent_ns = time.monotonic_ns()
                await stream.send(layer=layer)
            frame_id += 1
            await asyncio.sleep(max(0.0, begun + 1 / args.fps - time.monotonic()))
        with contextlib.suppress(TimeoutError):  # what has no outcome by then has none
            await asyncio.wait_for(_all_answered(fates, frame_id, reader), args.deadline_ms / 1e3 + 10)
        reader.cancel()
    return frame_id, fates


async def _read(stream: Stream, sent: dict[int, float], fates: list[Frame]) -> None:
    while True:
        result = await stream.result()
        at = sent.pop(result.frame_id)
        fates.append(Frame(at, time.monotonic() - at, "result" if result.error is None else result.error.code))


async def _all_answered(fates: list[Frame], count: int, reader: asyncio.Task[None]) -> None:
    """Until every frame has its outcome, or none can come any more."""
    while len(fates) < count:
        if reader.done():
            reader.result()
        await asyncio.sleep(0.02)


async def whole_again(ray: Cluster, dead: int) -> float:
    """When two replicas are there again."""
    while len(now := ray.replicas()) < 2 or dead in now:
        await asyncio.sleep(0.2)
    return time.monotonic()


async def run(args: argparse.Namespace, address: str, sha256: str, device: Device, ray: Cluster) -> dict[str, object]:
    """The whole course."""
    end = asyncio.Event()
    shots = [[device.layers(picture(s, 640, 480), 0) for s in range(SHOTS)] for _ in range(args.cameras)]
    meter = CpuMeter()
    cameras = [asyncio.create_task(camera(address, sha256, shots[n], args, end, n / args.cameras)) for n in range(args.cameras)]
    await asyncio.sleep(args.before)
    dead = ray.replicas()[0]
    os.kill(dead, signal.SIGKILL)
    killed_s = time.monotonic()
    again = asyncio.create_task(whole_again(ray, dead))
    await asyncio.sleep(args.after)
    again_s = await asyncio.wait_for(again, 90) - killed_s
    end.set()
    done = [await task for task in cameras]
    frames = [frame for _, fates in done for frame in fates]
    sent = sum(count for count, _ in done)
    assert len(frames) == sent, f"{sent} frames were sent, {len(frames)} have an outcome"
    before = np.array([f.latency_s for f in frames if f.sent_s + f.latency_s < killed_s and f.sent_s > killed_s - args.before / 2])
    after = [f for f in frames if f.sent_s + f.latency_s >= killed_s]
    slow = [f.sent_s + f.latency_s - killed_s for f in after if f.latency_s > before.max() and f.sent_s < killed_s + args.after]
    soon = [f for f in after if f.sent_s < killed_s + 2]
    return {
        "bench": "replica_killed", "model": args.model, "cameras": args.cameras, "fps": args.fps, "deadline_ms": args.deadline_ms,
        "sent": sent, "outcomes": dict(Counter(f.outcome for f in frames)),
        "latency_ms_before": _quantiles(before), "latency_ms_first_2_s_after": _quantiles(np.array([f.latency_s for f in soon])),
        "last_slower_than_before_s": round(max(slow, default=0.0), 2), "two_replicas_again_s": round(again_s, 1),
        "cores": meter.lap(),
    }  # fmt: skip


def _quantiles(seconds: np.ndarray) -> dict[str, float]:
    return {name: round(float(np.percentile(seconds, q)) * 1e3, 1) for name, q in (("p50", 50), ("p99", 99), ("max", 100))}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--cameras", type=int, default=8)
    parser.add_argument("--fps", type=float, default=4.0, help="of each camera")
    parser.add_argument("--deadline-ms", type=float, default=1000.0)
    parser.add_argument("--before", type=float, default=6.0, help="seconds")
    parser.add_argument("--after", type=float, default=15.0, help="seconds, at least")
    args = parser.parse_args()
    bundle = open_bundle(locate(args.model))
    device = Device(bundle)
    with tempfile.TemporaryDirectory() as tmp, cluster() as ray:
        extra = ("--backend", "ray", "--ray-address", ray.address, "--replicas", "2", "--cpus-per-replica", "0.5")
        with child(Path(tmp), bundle.path, arguments=extra) as server:
            result = asyncio.run(run(args, server.address, bundle.sha256, device, ray))
            server.stop(timeout_s=60)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
