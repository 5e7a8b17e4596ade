"""Servers for tests: in this process on the test's event loop, or as a real child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from edge_server.config import ServerConfig, TailConfig
from edge_server.observe.tracing import Traces
from edge_server.server import Server

START_S = 120.0


@asynccontextmanager
async def running(*models: Path, tracing: Traces | None = None, **settings: Any) -> AsyncIterator[Server]:
    """A server on a free loopback port of this process."""
    fields = {"listen": "127.0.0.1:0", "tail": TailConfig(threads=1), **settings}
    server = Server(ServerConfig(models=tuple(str(m) for m in models), **fields))
    server.tracing = tracing or server.tracing
    try:
        await server.open()
        yield server
    finally:
        await server.close()


class Child:
    """A server as a child process."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60.0) -> int:
        """Signals it and waits; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def command(*arguments: str) -> list[str]:
    """The command line of ``edge-server``."""
    return [sys.executable, "-m", "edge_server.cli", *arguments]


def environment() -> dict[str, str]:
    """One thread a process: tests share few cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def child(
    tmp: Path, *models: Path, arguments: Sequence[str] = (), listen: str = "127.0.0.1:0", start_s: float = START_S
) -> Iterator[Child]:
    """A real ``edge-server``; killed at the end if it still runs."""
    port_file = tmp / f"port-{time.monotonic_ns()}.txt"
    chosen = [part for m in models for part in ("--model", str(m))]
    line = command("--listen", listen, "--port-file", str(port_file), "--tail-threads", "1", *chosen, *arguments)
    with (tmp / f"{port_file.stem}.log").open("w") as log:
        process = subprocess.Popen(line, stderr=log, stdout=log, text=True, env=environment())
    try:
        until = time.monotonic() + start_s
        while not port_file.exists():
            assert process.poll() is None, f"edge-server ended with {process.returncode}: {Path(log.name).read_text()}"
            assert time.monotonic() < until, "edge-server did not start"
            time.sleep(0.02)
        yield Child(process, port_file.read_text().strip())
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
