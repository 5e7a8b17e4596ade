"""What the server costs: a frame's round trip through `edge-server` beside a direct call of the same tail, in one run.

Both use the same bundle, the same pre-encoded frames and one thread, and take turns frame by frame, so whatever else the
machine does hits both alike. The round trip holds everything a device would see on a perfect link: gRPC both ways,
checks, decoding, the queue, the tail and the answer. The direct call is ``Tail.run`` on latents decoded beforehand; as a
second yardstick the payload is decoded as well.

    python -m tests.bench.overhead [--model efficientnet-lite0] [--frames 200] [--backend embedded]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from edge_server.memory import keep_freed_memory
from edge_server.models import locate
from protos.headtail.v1 import headtail_pb2 as pb
from splitters.bundle import open_bundle
from splitters.runtime.tail import load_tail
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child

WARM = 20


async def measure(model: str, frames: int, backend: str, tmp: Path) -> dict[str, object]:
    bundle = open_bundle(locate(model))
    device, tail = Device(bundle), load_tail(bundle)
    height, width = bundle.manifest.preprocess.size_px
    shots = [picture(seed, 640, 480) for seed in range(8)]
    payloads = [device.layers(shot, 0) for shot in shots]
    latents = [[x[None] for x in device.codec.dequantise(device.codec.decode([m.payload for m in layers]))] for layers in payloads]
    direct_ms, decoded_ms, round_ms, server_ms = [], [], [], []
    with child(tmp, bundle.path, arguments=("--backend", backend)) as server:
        async with session(server.address, bundle.sha256) as stream:
            for i in range(frames + WARM):
                at = i % len(shots)
                begun = time.perf_counter_ns()
                tail.run(latents[at], [(width, height)])
                direct = time.perf_counter_ns() - begun
                begun = time.perf_counter_ns()
                symbols = device.codec.decode([m.payload for m in payloads[at]])
                tail.run([x[None] for x in device.codec.dequantise(symbols)], [(width, height)])
                decoded = time.perf_counter_ns() - begun
                messages = []
                for layer in payloads[at]:
                    message = pb.FrameLayer()
                    message.CopyFrom(layer)
                    message.frame_id = i
                    messages.append(message)
                begun = time.perf_counter_ns()
                result = await stream.frame(messages)
                elapsed = time.perf_counter_ns() - begun
                assert result.error is None, result.error
                if i >= WARM:
                    direct_ms.append(direct / 1e6)
                    decoded_ms.append(decoded / 1e6)
                    round_ms.append(elapsed / 1e6)
                    server_ms.append(result.timings.total_ns / 1e6)
    direct, decoded, through, inside = (float(np.median(v)) for v in (direct_ms, decoded_ms, round_ms, server_ms))
    return {
        "bench": "overhead", "backend": backend, "model": bundle.manifest.name, "frames": frames,
        "payload_bytes_p50": int(np.median([sum(len(m.payload) for m in layers) for layers in payloads])),
        "direct_ms_p50": round(direct, 3), "decode_and_tail_ms_p50": round(decoded, 3), "server_ms_p50": round(inside, 3),
        "round_trip_ms_p50": round(through, 3), "round_trip_ms_p95": round(float(np.percentile(round_ms, 95)), 3),
        "added_ms_p50": round(through - direct, 3), "ratio": round(through / direct, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet-lite0", help="a default bundle's name or a bundle's directory")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--backend", default="embedded", choices=("embedded", "ray"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the server does: the call it is compared with gets the same allocator
    with tempfile.TemporaryDirectory() as tmp:
        figures = asyncio.run(measure(args.model, args.frames, args.backend, Path(tmp)))
    print(f"direct call of the tail      {figures['direct_ms_p50']:8.2f} ms")
    print(f"decoding and the tail        {figures['decode_and_tail_ms_p50']:8.2f} ms")
    print(f"inside the server            {figures['server_ms_p50']:8.2f} ms")
    print(f"round trip through it        {figures['round_trip_ms_p50']:8.2f} ms  = {figures['ratio']} x direct")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
