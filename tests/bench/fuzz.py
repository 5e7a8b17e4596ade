"""A fuzz campaign: every decoder in process, and a real server over a socket. No crash, no hang, no growth, only mapped errors.

    python -m tests.bench.fuzz [--inputs 1000000] [--socket-inputs 20000] [--seed 1] [--jobs 2]

An input that ends otherwise than it may stops the campaign with its seed and number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil

from splitters.bundle import open_bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_fuzz import Tally, run_decoders, run_socket, summary
from tests.fakes.server_running import child

MAX_GROWTH_BYTES = 256 << 20


def decode_job(path: str, inputs: int, seed: int) -> tuple[Tally, int]:
    """One process's share, and how much its memory grew."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg comments on damage on standard error
    bundle = open_bundle(Path(path))
    run_decoders(bundle, 2000, seed + 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = run_decoders(bundle, inputs, seed)
    return tally, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def merged(tallies: list[Tally]) -> Tally:
    """All shares together."""
    worst = max(tallies, key=lambda t: t.slowest_s)
    return Tally(
        inputs=sum(t.inputs for t in tallies), sealed=sum(t.sealed for t in tallies), accepted=sum(t.accepted for t in tallies),
        errors=sum((t.errors for t in tallies), Counter()), slowest_s=worst.slowest_s, slowest=worst.slowest,
    )  # fmt: skip


async def socket_campaign(address: str, path: Path, inputs: int, seed: int) -> Tally:
    """Hostile clients, then a good one."""
    bundle = open_bundle(path)
    tally = await run_socket(address, bundle, inputs, seed)
    async with session(address, bundle.sha256) as stream:
        assert (await stream.frame(Device(bundle).layers(picture(), 0))).error is None
    return tally


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--socket-inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        bundle = write_tiny_bundle(Path(tmp) / "tiny")
        begun = time.perf_counter()
        with ProcessPoolExecutor(args.jobs) as pool:
            share = -(-args.inputs // args.jobs)
            jobs = [pool.submit(decode_job, str(bundle.path), share, args.seed + n) for n in range(args.jobs)]
            done = [job.result() for job in jobs]
        decoders, growth = merged([t for t, _ in done]), max(g for _, g in done)
        decoders_s = time.perf_counter() - begun
        print("decoders", summary(decoders), f"{decoders_s:.0f} s, memory grew by {growth >> 20} MiB", flush=True)
        begun = time.perf_counter()
        with child(Path(tmp), bundle.path, arguments=("--log-level", "error")) as server:
            process = psutil.Process(server.process.pid)
            before = process.memory_info().rss
            over_socket = asyncio.run(socket_campaign(server.address, bundle.path, args.socket_inputs, args.seed))
            server_growth = process.memory_info().rss - before
            assert server.stop() == 0
        print(
            "socket",
            summary(over_socket),
            f"{time.perf_counter() - begun:.0f} s, the server grew by {server_growth >> 20} MiB",
            flush=True,
        )
    assert growth < MAX_GROWTH_BYTES
    assert server_growth < MAX_GROWTH_BYTES
    figures = {"decoders": summary(decoders), "decoders_growth_bytes": growth, "socket": summary(over_socket)}
    print(json.dumps({"bench": "fuzz", "seed": args.seed, **figures, "server_growth_bytes": server_growth, "crashes": 0}))


if __name__ == "__main__":
    main()
