"""A replayed load, as a process of its own: N sessions, each with a window of pre-encoded frames in flight.

    python -m tests.fakes.server_load ADDRESS FRAMES.bin --sha256 ... --streams 16

``FRAMES.bin`` holds length-prefixed ``FrameLayer`` messages, all layers of all frames. Every line on standard input is a
number of seconds to keep all windows full for; one JSON object is printed for each. The end of the input ends the process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import grpc
import grpc.aio
import numpy as np

from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import PROTOCOL_VERSION

STREAMS_PER_CHANNEL = 64


def write_frames(path: Path, frames: list[list[pb.FrameLayer]]) -> None:
    """For `read_frames`."""
    with path.open("wb") as file:
        for layer in (layer for layers in frames for layer in layers):
            data = layer.SerializeToString()
            file.write(struct.pack("<I", len(data)) + data)


def read_frames(path: Path) -> list[list[pb.FrameLayer]]:
    """What `write_frames` wrote: the layers of each frame."""
    data, at, frames = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        layer = pb.FrameLayer.FromString(data[at + 4 : at + 4 + size])
        if layer.layer == 0:
            frames.append([])
        frames[-1].append(layer)
        at += 4 + size
    return frames


class Row(NamedTuple):
    """One answered frame: when (perf_counter), after how long, in a batch of how many, its error, the tail's time."""

    at_s: float
    latency_ms: float
    batch_size: int
    error: str
    tail_ms: float


def summary(rows: list[Row], until_s: float) -> dict[str, object]:
    """Throughput and latencies of what was answered by then."""
    answered = [row for row in rows if not row.error and row.at_s <= until_s]
    first_s = min((row.at_s for row in answered), default=until_s)
    latency = np.array([row.latency_ms for row in answered] or [0.0])
    over = np.array([row.latency_ms - row.tail_ms for row in answered] or [0.0])
    return {
        "frames_per_s": sum(row.at_s > first_s for row in answered) / max(1e-9, until_s - first_s), "answered": len(answered),
        "latency_ms_p50": float(np.percentile(latency, 50)), "latency_ms_p99": float(np.percentile(latency, 99)),
        "tail_ms_p50": float(np.median([row.tail_ms for row in answered] or [0.0])), "over_tail_ms_p50": float(np.median(over)),
        "batches": dict(Counter(str(row.batch_size) for row in answered)),
        "errors": dict(Counter(row.error for row in rows if row.error)),
    }  # fmt: skip


class Load:
    """All streams together; `pulse` runs them for a while."""

    def __init__(self, frames: list[list[pb.FrameLayer]], sha256: str, window: int) -> None:
        self._frames = [[pb.ClientMessage(layer=layer) for layer in layers] for layers in frames]
        self._sha256 = sha256
        self._window = window
        self._streams: list[tuple[int, grpc.aio.StreamStreamCall]] = []
        self._next_id: list[int] = []

    async def open(self, stubs: list[pb_grpc.HeadtailStub], count: int) -> None:
        """Greets on every stream."""
        for number in range(count):
            call = stubs[number % len(stubs)].Session()
            hello = pb.Hello(protocol_version=PROTOCOL_VERSION, bundle_sha256=self._sha256, max_in_flight=self._window)
            await call.write(pb.ClientMessage(hello=hello))
            await call.read()
            self._streams.append((number, call))
            self._next_id.append(0)

    async def pulse(self, seconds: float) -> dict[str, object]:
        """Keeps every stream's window full for that long, waits for what is owed, and counts."""
        until_s = time.perf_counter() + seconds
        rows = [row for rows in await asyncio.gather(*(self._one(n, call, until_s) for n, call in self._streams)) for row in rows]
        return summary(rows, until_s)

    async def _one(self, number: int, call: grpc.aio.StreamStreamCall, until_s: float) -> list[Row]:
        sent: dict[int, float] = {}
        rows: list[Row] = []

        async def send() -> None:
            frame_id = self._next_id[number]
            self._next_id[number] += 1
            sent[frame_id] = time.perf_counter()
            for message in self._frames[(frame_id + number) % len(self._frames)]:
                message.layer.frame_id, message.layer.sent_ns = frame_id, time.monotonic_ns()
                await call.write(message)

        for _ in range(self._window):
            await send()
        while sent:
            message = await call.read()
            if message is grpc.aio.EOF:
                raise RuntimeError("the server ended the stream")
            if message.WhichOneof("content") != "result":
                continue
            now, result = time.perf_counter(), message.result
            elapsed_ms = (now - sent.pop(result.frame_id)) * 1e3
            error = result.error.code if result.WhichOneof("outcome") == "error" else ""
            rows.append(Row(now, elapsed_ms, result.timings.batch_size, error, result.timings.tail_ns / 1e6))
            if now < until_s:
                await send()
        return rows


async def run(args: argparse.Namespace) -> None:
    """Pulses until the input ends."""
    count = max(1, args.streams // STREAMS_PER_CHANNEL)
    channels = [grpc.aio.insecure_channel(args.address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(count)]
    load = Load(read_frames(args.frames), args.sha256, args.window)
    await load.open([pb_grpc.HeadtailStub(channel) for channel in channels], args.streams)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        sys.stdout.write(json.dumps(await load.pulse(float(line))) + "\n")
        sys.stdout.flush()
    for channel in channels:
        await channel.close()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("address")
    p.add_argument("frames", type=Path)
    p.add_argument("--sha256", required=True)
    p.add_argument("--streams", type=int, default=1)
    p.add_argument("--window", type=int, default=2)
    return p


if __name__ == "__main__":
    asyncio.run(run(parser().parse_args()))
