"""A replayed load, as a process of its own: N sessions, each with a window of pre-encoded frames in flight.

    python -m tests.fakes.server_load ADDRESS FRAMES.bin --sha256 ... --streams 16

``FRAMES.bin`` holds length-prefixed ``FrameLayer`` messages, one layer a frame. Every line on standard input is a number
of seconds to keep all windows full for; one JSON object is printed for each. The end of the input ends the process.
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

import grpc
import grpc.aio
import numpy as np

from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import PROTOCOL_VERSION

STREAMS_PER_CHANNEL = 64


def write_frames(path: Path, layers: list[pb.FrameLayer]) -> None:
    """For `read_frames`."""
    with path.open("wb") as file:
        for layer in layers:
            data = layer.SerializeToString()
            file.write(struct.pack("<I", len(data)) + data)


def read_frames(path: Path) -> list[pb.FrameLayer]:
    """What `write_frames` wrote."""
    data, at, layers = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        layers.append(pb.FrameLayer.FromString(data[at + 4 : at + 4 + size]))
        at += 4 + size
    return layers


class Load:
    """All streams together; `pulse` runs them for a while."""

    def __init__(self, layers: list[pb.FrameLayer], sha256: str, window: int) -> None:
        self._messages = [pb.ClientMessage(layer=layer) for layer in layers]
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
        answered = [row for row in rows if row[3] == "" and row[0] <= until_s]
        first_s = min((row[0] for row in answered), default=until_s)
        latency = np.array([row[1] for row in answered] or [0.0])
        counted = sum(row[0] > first_s for row in answered)
        return {
            "frames_per_s": counted / max(1e-9, until_s - first_s), "answered": len(answered),
            "latency_ms_p50": float(np.percentile(latency, 50)), "latency_ms_p99": float(np.percentile(latency, 99)),
            "tail_ms_p50": float(np.median([row[4] for row in answered] or [0.0])),
            "batches": dict(Counter(str(row[2]) for row in answered)),
            "errors": dict(Counter(row[3] for row in rows if row[3])),
        }  # fmt: skip

    async def _one(
        self, number: int, call: grpc.aio.StreamStreamCall, until_s: float
    ) -> list[tuple[float, float, int, str, float]]:
        """(answered at s, latency ms, batch, error, tail ms) of each frame."""
        sent: dict[int, float] = {}
        rows = []

        async def send() -> None:
            frame_id = self._next_id[number]
            self._next_id[number] += 1
            message = self._messages[(frame_id + number) % len(self._messages)]
            message.layer.frame_id = frame_id
            sent[frame_id] = time.perf_counter()
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
            rows.append((now, elapsed_ms, result.timings.batch_size, error, result.timings.tail_ns / 1e6))
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
