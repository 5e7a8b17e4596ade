"""The servers that `tests.bench.serving` compares: ours on both backends, LitServe, and plain Ray Serve over HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from splitters.bundle import Bundle
from tests.fakes.server_running import child, environment

NEEDS = {"embedded": (), "ray": ("ray.serve",), "litserve": ("litserve",), "serve-http": ("ray.serve",)}
START_S = 180.0


def missing(system: str) -> str:
    """The package a system needs that is not installed; empty: it can run."""
    for name in NEEDS[system]:
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return name
    return ""


class Replay:
    """The load, a process of its own on its cores (as `taskset` takes them)."""

    def __init__(self, line: list[str], cores: str) -> None:
        whole = ["taskset", "-c", cores, sys.executable, "-m", *line]
        self._process = subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())

    def pulse(self, seconds: float) -> dict[str, Any]:
        """Full windows for that long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class System:
    """A running server.

    Args:
        name: one of `NEEDS`.
        address: host:port.
        stopped: its process, if it has to be stopped while others are measured (LitServe's worker spins when idle).
    """

    def __init__(self, name: str, address: str, stopped: psutil.Process | None = None) -> None:
        self.name = name
        self._address = address
        self._stopped = stopped

    def load(self, frames: Path, bundle: Bundle, streams: int, window: int, core: int) -> Replay:
        """A load for it."""
        counts = ["--streams", str(streams), "--window", str(window)]
        if self.name in ("embedded", "ray"):
            return Replay(["tests.fakes.server_load", self._address, str(frames), "--sha256", bundle.sha256, *counts], str(core))
        form = "json" if self.name == "litserve" else "bytes"
        return Replay(["tests.fakes.http_load", self._address, str(frames), "--format", form, *counts], str(core))

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Around its own measurement."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        if self._stopped is not None:
            for process in [self._stopped, *self._stopped.children(recursive=True)]:
                process.send_signal(number)


@contextmanager
def started(name: str, tmp: Path, bundle: Bundle, *, tail_core: int, load_core: int, max_batch: int) -> Iterator[System]:
    """A server of that kind, ready to answer: its tail on one core, everything else on the other."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {load_core})  # inherited; what runs the tail pins itself
    try:
        if name in ("embedded", "ray"):
            extra = ["--backend", name, "--tail-cpus", str(tail_core), "--max-batch", str(max_batch), "--log-level", "warning"]
            with child(tmp, bundle.path, arguments=extra) as server:
                os.sched_setaffinity(0, before)
                yield System(name, server.address)
                server.stop(timeout_s=60)
            return
        with _other(name, bundle, tail_core, max_batch, tmp) as system:
            os.sched_setaffinity(0, before)
            yield system
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _other(name: str, bundle: Bundle, core: int, max_batch: int, tmp: Path) -> Iterator[System]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "tests.fakes.http_tails", name, "--bundle", str(bundle.path), "--port", str(port)]
    with (tmp / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*line, "--core", str(core), "--max-batch", str(max_batch)], stdout=log, stderr=log, env=environment()
        )
    try:
        _wait(process, port, Path(log.name))
        yield System(name, f"127.0.0.1:{port}", psutil.Process(process.pid) if name == "litserve" else None)
    finally:
        if process.poll() is None:
            for pid in [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]:
                kill_if_alive(pid)
        process.wait(30)


def kill_if_alive(pid: int) -> None:
    """SIGKILL to a process of ours that may be gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
                connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                status = connection.recv(64).split(b" ")
                if len(status) > 1 and status[1] not in (b"404", b"503"):
                    return  # it reached the tail, which refused an empty frame
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
