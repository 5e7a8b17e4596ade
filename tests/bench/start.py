"""How long until the first answer: the server from its start, and the client with a warm cache from its own.

    python -m tests.bench.start --model efficientnet-lite0 --turns 3

The bundle is exported, the client's cache warm and Python's bytecode written before anything is timed. Wall time says how long a
person waits. Processor time, of the server until its first answer and of the whole client, says what of that is work; the server's
memory is taken at the end. Ends with one JSON line: medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import psutil

from splitters.bundle import open_bundle
from splitters.runtime.pictures import shipped_pictures
from splitters.zoo.defaults import ensure_exported
from tests.fakes.server_client import Device, picture, session

_PATIENCE_S = 300.0


def main() -> int:
    """Runs the turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    device = Device(open_bundle(ensure_exported(args.model)))
    with tempfile.TemporaryDirectory(prefix="headtail-start-") as name:
        tmp = Path(name)
        cv2.imwrite(str(tmp / "photo.png"), shipped_pictures()[0])
        one_turn(tmp, args.model, device)  # fills the client's cache
        turns = [one_turn(tmp, args.model, device) for _ in range(args.turns)]
    medians = {key: round(statistics.median(turn[key] for turn in turns), 2) for key in turns[0]}
    print(json.dumps({"bench": "start", "model": args.model, "turns": args.turns, "load": round(os.getloadavg()[0], 1), **medians}))
    return 0


def one_turn(tmp: Path, model: str, device: Device) -> dict[str, float]:
    """Starts a server, then a client that answers one photograph; seconds."""
    port_file, results = tmp / "port", tmp / "results.jsonl"
    for file in (port_file, results):
        file.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPYCACHEPREFIX": str(tmp / "bytecode")}
    began = time.monotonic()
    with (tmp / "server.log").open("w") as log:
        command = [sys.executable, "-m", "edge_server", "--model", model, "--listen", "127.0.0.1:0", "--port-file", str(port_file)]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        _until(port_file.exists, server, tmp / "server.log")
        listens_s = time.monotonic() - began
        address, spent = port_file.read_text().strip(), psutil.Process(server.pid)
        asyncio.run(_answered(address, device))
        first_answer_s, times = time.monotonic() - began, spent.cpu_times()
        asked = time.monotonic()
        client = subprocess.Popen(
            [
                sys.executable, "-m", "edge_client.cli", "--camera", str(tmp / "photo.png"), "--server", address,
                "--output", str(results), "--json",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**env, "HEADTAIL_CACHE": str(tmp / "cache")},
        )  # fmt: skip
        _until(lambda: results.exists() and results.stat().st_size > 0, client, tmp / "server.log")
        first_s = time.monotonic() - asked
        _, status, usage = os.wait4(client.pid, 0)
        client.returncode = os.waitstatus_to_exitcode(status)
        if client.returncode:
            raise SystemExit(f"the client ended with {client.returncode}")
        memory_mib = spent.memory_info().rss / (1 << 20)
        outcome = json.loads(results.read_text().splitlines()[0])["outcome"]
        if outcome != "result":
            raise SystemExit(f"the first frame's outcome is {outcome!r}, not an answer of the server")
    finally:
        server.terminate()
        server.wait(60)
    return {
        "server_listens_s": listens_s, "server_first_answer_s": first_answer_s, "server_cpu_s": times.user + times.system,
        "server_memory_mib": memory_mib, "client_first_result_s": first_s,
        "client_cpu_s": usage.ru_utime + usage.ru_stime,
    }  # fmt: skip


async def _answered(address: str, device: Device) -> None:
    """One frame, as a client that was waiting for the server would send it."""
    async with session(address, device.bundle.sha256) as stream:
        await stream.frame(device.layers(picture(), 0))


def _until(done: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for ``done()``, as long as the process lives."""
    until = time.monotonic() + _PATIENCE_S
    while not done():
        if process.poll() not in (None, 0) or time.monotonic() > until:
            raise SystemExit(f"it did not start: {log.read_text()[-2000:]}")
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main())
