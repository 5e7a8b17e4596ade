"""Many sessions, each on a TCP connection of its own, as a process of its own.

    python -m tests.fakes.server_idle ADDRESS FRAMES.bin --sha256 ... --idle 250 --active 50 --interval-s 2

Says ``ready`` when all are greeted. A line of seconds on standard input makes the active ones send a frame every interval
for so long, prints a JSON object, and so on; the end of the input ends the process. Idle ones ping now and then, as a
device does whose picture does not change.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path

import grpc
import grpc.aio
import numpy as np

from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import PROTOCOL_VERSION
from tests.fakes.server_load import read_frames

PING_S = 20.0


class Camera:
    """One connection, one session."""

    def __init__(self, address: str, sha256: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._call = pb_grpc.HeadtailStub(self._channel).Session()
        self._sha256 = sha256
        self._next_id = 0

    async def greet(self) -> None:
        """Hello and welcome."""
        hello = pb.Hello(protocol_version=PROTOCOL_VERSION, bundle_sha256=self._sha256, max_in_flight=2, fps=0.5)
        await self._call.write(pb.ClientMessage(hello=hello))
        assert (await self._call.read()).WhichOneof("content") == "welcome"

    async def idle(self) -> None:
        """Pings for ever."""
        while True:
            await asyncio.sleep(PING_S)
            await self._call.write(pb.ClientMessage(ping=pb.Ping(sent_ns=1)))
            await self._call.read()

    async def active(
        self, frames: list[list[pb.FrameLayer]], interval_s: float, until_s: float, offset_s: float
    ) -> tuple[list[float], int]:
        """A whole frame every interval; latencies in ms and the number of errors, answers on a part of the frame included."""
        took, errors = [], 0
        await asyncio.sleep(offset_s)
        while (begun := time.perf_counter()) < until_s:
            layers = frames[self._next_id % len(frames)]
            for layer in layers:
                layer.frame_id, layer.sent_ns = self._next_id, time.monotonic_ns()
                await self._call.write(pb.ClientMessage(layer=layer))
            self._next_id += 1
            while (message := await self._call.read()).WhichOneof("content") != "result":
                pass
            errors += message.result.WhichOneof("outcome") == "error" or message.result.layers_decoded != len(layers)
            took.append((time.perf_counter() - begun) * 1e3)
            await asyncio.sleep(max(0.0, begun + interval_s - time.perf_counter()))
        return took, errors

    async def close(self) -> None:
        """Hangs up."""
        self._call.cancel()
        await self._channel.close()


async def run(args: argparse.Namespace) -> None:
    """The process's life."""
    frames = read_frames(args.frames)
    cameras = [Camera(args.address, args.sha256) for _ in range(args.idle + args.active)]
    gate = asyncio.Semaphore(20)

    async def greet(camera: Camera) -> None:
        async with gate:
            await camera.greet()

    await asyncio.gather(*(greet(camera) for camera in cameras))
    pings = [asyncio.create_task(camera.idle()) for camera in cameras[args.active :]]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        until_s = time.perf_counter() + float(line)
        spread = args.interval_s / max(1, args.active)
        rows = await asyncio.gather(
            *(c.active(frames, args.interval_s, until_s, i * spread) for i, c in enumerate(cameras[: args.active]))
        )
        took = np.array([t for row, _ in rows for t in row] or [0.0])
        dead = sum(task.done() for task in pings)
        figures = {"answered": int(took.size), "errors": sum(e for _, e in rows), "idle_lost": dead}
        figures |= {"latency_ms_p50": float(np.percentile(took, 50)), "latency_ms_p99": float(np.percentile(took, 99))}
        sys.stdout.write(json.dumps(figures) + "\n")
        sys.stdout.flush()
    for task in pings:
        task.cancel()
    with contextlib.suppress(grpc.aio.AioRpcError):
        await asyncio.gather(*(camera.close() for camera in cameras))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("address")
    p.add_argument("frames", type=Path)
    p.add_argument("--sha256", required=True)
    p.add_argument("--idle", type=int, default=0)
    p.add_argument("--active", type=int, default=0)
    p.add_argument("--interval-s", type=float, default=2.0)
    return p


if __name__ == "__main__":
    asyncio.run(run(parser().parse_args()))
