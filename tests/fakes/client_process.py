"""A real ``edge-client`` as a child process, and a server that stands by with its imports done."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.fakes.server_running import environment

# What a service manager does in seconds imports on a busy test machine do not: the standby has them behind it.
_STANDBY = """
import sys
import edge_server.cli, edge_server.server, splitters.runtime.tail, onnxruntime
print("ready", flush=True)
sys.stdin.readline()
sys.exit(edge_server.cli.main(sys.argv[1:]))
"""


TRANSPORTS = ("grpc", "quic")
ON_BOTH_TRANSPORTS = pytest.mark.parametrize("transport", TRANSPORTS)


def over(transport: str) -> tuple[str, ...]:
    """A client's arguments for frames over ``transport``, and for a log that says so."""
    return ("--transport", transport, "--log-level", "info")


def counted(outcome: str, least: int, *, after: int = -1) -> Callable[[list[dict[str, Any]]], bool]:
    """Whether at least so many frames past ``after`` ended so, for ``ClientProcess.wait_for``."""
    return lambda lines: sum(line["outcome"] == outcome and line["frame"] > after for line in lines) >= least


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a client left."""

    code: int
    out: str
    err: str
    lines: list[dict[str, Any]]

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``--json``."""
        found: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return found

    def went_over(self, transport: str) -> bool:
        """Whether the second path stood where it was asked for, and only there."""
        return ("datagrams to" in self.err) == (transport == "quic")

    def outcomes(self, first: int = 0, last: int = 10**9) -> dict[str, int]:
        """Counts by outcome over a range of frames."""
        counts: dict[str, int] = {}
        for line in self.lines:
            if first <= line["frame"] <= last:
                counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
        return counts


class ClientProcess:
    """A running client, its results read while it runs."""

    def __init__(self, cache: Path, results: Path, *arguments: str) -> None:
        self.results = results
        self._lines: list[dict[str, Any]] = []
        self._read_bytes = 0
        line = [sys.executable, "-m", "edge_client.cli", "--output", str(results), *arguments]
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**environment(), "HEADTAIL_CACHE": str(cache)}
        )

    def lines(self) -> list[dict[str, Any]]:
        """The complete lines so far."""
        if self.results.exists():
            with self.results.open("rb") as file:
                file.seek(self._read_bytes)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read_bytes += len(whole)
            self._lines += [json.loads(text) for text in whole.splitlines()]
        return self._lines

    def wait_frame(self, index: int, *, timeout_s: float = 180.0) -> None:
        """Until frame ``index`` has its outcome."""
        until = time.monotonic() + timeout_s
        while not self.lines() or self._lines[-1]["frame"] < index:
            assert self.process.poll() is None, f"the client ended early: {self.process.communicate()}"
            assert time.monotonic() < until, f"frame {index} did not come"
            time.sleep(0.005)

    def wait_for(self, seen: Callable[[list[dict[str, Any]]], bool], what: str, *, timeout_s: float = 180.0) -> None:
        """Until what its results say so far is ``seen``: on a busy machine no number of frames says when that is."""
        until = time.monotonic() + timeout_s
        while not seen(self.lines()):
            assert self.process.poll() is None, f"the client ended early: {self.process.communicate()}"
            assert time.monotonic() < until, f"{what}: not within {timeout_s:.0f} s"
            time.sleep(0.01)

    def interrupt(self) -> Finished:
        """Ends a camera that would go on for ever, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return self.finish()

    def finish(self, *, timeout_s: float = 300.0) -> Finished:
        """Waits for the end."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"the client hangs; so far: {out[-2000:]}\n{err[-2000:]}") from None
        return Finished(code=self.process.returncode, out=out, err=err, lines=self.lines())

    def kill(self) -> None:
        """Ends it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@contextmanager
def client(tmp: Path, *arguments: str, cache: Path | None = None) -> Iterator[ClientProcess]:
    """A client with a cache of its own."""
    running = ClientProcess(cache or tmp / "cache", tmp / f"results-{time.monotonic_ns()}.jsonl", *arguments)
    try:
        yield running
    finally:
        running.kill()


def run_client(tmp: Path, *arguments: str, cache: Path | None = None, timeout_s: float = 300.0) -> Finished:
    """Runs a client to its end."""
    with client(tmp, *arguments, cache=cache) as running:
        return running.finish(timeout_s=timeout_s)


class Standby:
    """A server whose imports are done and which serves when told."""

    def __init__(self, tmp: Path, *models: Path, listen: str) -> None:
        self._port_file = tmp / f"standby-{time.monotonic_ns()}"
        arguments = ["--listen", listen, "--port-file", str(self._port_file), "--tail-threads", "1"]
        arguments += [part for m in models for part in ("--model", str(m))]
        with (tmp / f"{self._port_file.name}.log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _STANDBY, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment(),
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Until it could serve at once."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "ready"

    def serve(self) -> str:
        """Lets it serve; its address."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        until = time.monotonic() + 180
        while not self._port_file.exists():
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
            assert time.monotonic() < until
            time.sleep(0.01)
        return self._port_file.read_text().strip()

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait(10)


def kept_address() -> str:
    """A free loopback address that the kernel gives nobody else, so that a server can come back to it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(max(1024, first - 10_000), first), 100):
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, contextlib.suppress(OSError):
            tcp.bind(("127.0.0.1", port))
            udp.bind(("127.0.0.1", port))
            return f"127.0.0.1:{port}"
    raise AssertionError(f"no free port below {first}")


@contextmanager
def standby(tmp: Path, *models: Path, listen: str = "") -> Iterator[Standby]:
    """A server that stands by, at an address that another can have after it; killed at the end."""
    server = Standby(tmp, *models, listen=listen or kept_address())
    try:
        yield server
    finally:
        server.kill()


def write_clip(path: Path, *, frames: int = 60, fps: float = 30.0, size: tuple[int, int] = (160, 120)) -> Path:
    """A clip with something moving in it."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    assert writer.isOpened()
    for i in range(frames):
        image = np.full((size[1], size[0], 3), 40, np.uint8)
        cv2.circle(image, (10 + i * 2 % (size[0] - 20), size[1] // 2), 12, (60, 200, 250), -1)
        writer.write(image)
    writer.release()
    return path


def write_photos(directory: Path, *, count: int = 5) -> Path:
    """Pictures of noise and stripes, of different sizes."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        image = rng.integers(0, 256, (60 + 7 * i, 90 - 5 * i, 3), np.uint8)
        image[:: i + 2] = 255
        cv2.imwrite(str(directory / f"photo-{i}.jpg"), image)
    return directory
