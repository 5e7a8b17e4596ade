"""A fuzz campaign: decoders and readers in process, servers and clients over sockets. No crash, no hang, only mapped errors.

    python -m tests.bench.fuzz [--inputs 1000000] [--socket-inputs 20000] [--reader-inputs 200000] [--client-inputs 10000]
                               [--open-inference-inputs 20000] [--datagrams 200000] [--seed 1] [--jobs 2]

A part of 0 inputs is left out. Readers are what a device reads from outside: a bundle's files, caches, TOML and options,
messages, bundles that arrive. Around the cache lies a tree that must be the same afterwards, and the cache has a quota.

An input that ends otherwise than it may stops the campaign with its seed and number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from splitters.bundle import Bundle, open_bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.datagram_fuzz import attack
from tests.fakes.hostile_server import run_clients
from tests.fakes.open_inference_fuzz import run_open_inference
from tests.fakes.peer_fuzz import run_readers
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_fuzz import Tally, run_decoders, run_socket, summary
from tests.fakes.server_running import child

MAX_GROWTH_BYTES = 256 << 20
GROWTH = "growth_bytes"


def decode_job(path: str, inputs: int, seed: int) -> tuple[Tally, int]:
    """One process's share, and how much its memory grew."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg comments on damage on standard error
    bundle = open_bundle(Path(path))
    run_decoders(bundle, 2000, seed + 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = run_decoders(bundle, inputs, seed)
    return tally, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def reader_job(path: str, tmp: str, inputs: int, seed: int) -> Tally:
    """One process's share of hostile files, settings and messages."""
    with tempfile.TemporaryDirectory(dir=tmp) as root:
        return run_readers(open_bundle(Path(path)), Path(root), inputs, seed)


async def client_campaign(path: Path, tmp: Path, inputs: int, seed: int) -> Tally:
    """Clients against a hostile server."""
    logging.disable()
    root = tmp / "clients"
    root.mkdir()
    return await run_clients(open_bundle(path), root, inputs, seed)


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


def fuzz_decoders(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    """In process, on every core."""
    share = -(-args.inputs // args.jobs)
    with ProcessPoolExecutor(args.jobs) as pool:
        done = [pool.submit(decode_job, str(bundle.path), share, args.seed + n) for n in range(args.jobs)]
        found = [job.result() for job in done]
    return {**summary(merged([tally for tally, _ in found])), GROWTH: max(growth for _, growth in found)}


def fuzz_socket(args: argparse.Namespace, bundle: Bundle, tmp: Path) -> dict[str, Any]:
    """A server as a child, and what its memory grew by."""
    with child(tmp, bundle.path, arguments=("--log-level", "error")) as server:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        tally = asyncio.run(socket_campaign(server.address, bundle.path, args.socket_inputs, args.seed))
        growth = process.memory_info().rss - before
        assert server.stop() == 0
    return {**summary(tally), GROWTH: growth}


def fuzz_readers(args: argparse.Namespace, bundle: Bundle, tmp: Path) -> dict[str, Any]:
    """In process, on every core."""
    share = -(-args.reader_inputs // args.jobs)
    with ProcessPoolExecutor(args.jobs) as pool:
        reading = [pool.submit(reader_job, str(bundle.path), str(tmp), share, args.seed + n) for n in range(args.jobs)]
        return summary(merged([job.result() for job in reading]))


def fuzz_clients(args: argparse.Namespace, bundle: Bundle, tmp: Path) -> dict[str, Any]:
    """Against a hostile server."""
    return summary(asyncio.run(client_campaign(bundle.path, tmp, args.client_inputs, args.seed)))


def fuzz_open_inference(args: argparse.Namespace, bundle: Bundle, tmp: Path) -> dict[str, Any]:
    """A server as a child."""
    with child(tmp, bundle.path, arguments=("--log-level", "error")) as server:
        tally = asyncio.run(run_open_inference(server.address, args.open_inference_inputs, args.seed))
        assert server.stop() == 0
    return summary(tally)


def fuzz_datagrams(args: argparse.Namespace) -> dict[str, Any]:
    """Into the UDP door and the gatherer of pieces, in this process."""
    before = psutil.Process().memory_info().rss
    found = asyncio.run(attack(args.datagrams, seed=args.seed))
    assert found["wrong_frames"] == 0
    return {**found, GROWTH: psutil.Process().memory_info().rss - before}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--socket-inputs", type=int, default=20_000)
    parser.add_argument("--reader-inputs", type=int, default=200_000)
    parser.add_argument("--client-inputs", type=int, default=10_000)
    parser.add_argument("--open-inference-inputs", type=int, default=20_000)
    parser.add_argument("--datagrams", type=int, default=200_000, help="from strangers and from a client that was let in")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        bundle = open_bundle(write_tiny_bundle(tmp / "tiny").path)
        parts: list[tuple[str, int, Callable[[], dict[str, Any]]]] = [
            ("decoders", args.inputs, lambda: fuzz_decoders(args, bundle)),
            ("socket", args.socket_inputs, lambda: fuzz_socket(args, bundle, tmp)),
            ("readers", args.reader_inputs, lambda: fuzz_readers(args, bundle, tmp)),
            ("clients", args.client_inputs, lambda: fuzz_clients(args, bundle, tmp)),
            ("open_inference", args.open_inference_inputs, lambda: fuzz_open_inference(args, bundle, tmp)),
            ("datagrams", args.datagrams, lambda: fuzz_datagrams(args)),
        ]
        for part, inputs, run in parts:
            if inputs:
                begun = time.perf_counter()
                figures[part] = run()
                print(part, figures[part], f"{time.perf_counter() - begun:.0f} s", flush=True)
                assert figures[part].get(GROWTH, 0) < MAX_GROWTH_BYTES
    print(json.dumps({"bench": "fuzz", "seed": args.seed, **figures, "crashes": 0}))


if __name__ == "__main__":
    main()
