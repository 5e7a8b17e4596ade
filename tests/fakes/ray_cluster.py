"""A Ray cluster of this machine as a process of its own, for tests that share one.

    python -m tests.fakes.ray_cluster

prints the address to join, then runs each line of its standard input, a script as JSON, and prints what that printed. It ends with
its standard input.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import NamedTuple

import psutil

PATIENCE_S = 180.0


class Cluster(NamedTuple):
    """A running cluster."""

    address: str
    process: psutil.Process
    program: subprocess.Popen[str]

    def replicas(self) -> list[int]:
        """Process ids of the tails' replicas."""
        return replicas(self.process)

    def run(self, script: str) -> str:
        """What a script prints on the cluster; ``ray`` and ``serve`` are there."""
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.write(json.dumps(script) + "\n")
        self.program.stdin.flush()
        for line in self.program.stdout:
            if line.startswith("printed "):
                return str(json.loads(line.removeprefix("printed "))).strip()
        raise AssertionError(f"the cluster ended with {self.program.wait()}")


def replicas(node: psutil.Process) -> list[int]:
    """Process ids of the tails' replicas among what a process has started."""
    found = []
    for process in node.children(recursive=True):
        with suppress(psutil.Error):
            if process.name().startswith("ray::ServeRepl") or "ray::ServeReplica" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def end(started: psutil.Process) -> None:
    """A process with everything that it has started, at once."""
    with suppress(psutil.NoSuchProcess):
        for process in [started, *started.children(recursive=True)]:  # first whoever would start it again
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def arguments(ray: Cluster, *more: str) -> tuple[str, ...]:
    """Of a door that joins the cluster, with tails that leave half a core each."""
    return ("--backend", "ray", "--ray-address", ray.address, "--cpus-per-replica", "0.5", *more)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Started for the block; whoever joins needs its token, which children of this process inherit."""
    before = os.environ.get("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    process, address = _begun()
    until_s = time.monotonic() + PATIENCE_S
    while not address:  # Ray gives up a start after 30 s, which a busy machine may need
        assert time.monotonic() < until_s, f"Ray ended with {process.wait()}"
        process, address = _begun()
    assert process.stdin is not None
    try:
        yield Cluster(address, psutil.Process(process.pid), process)
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        del os.environ["RAY_AUTH_TOKEN"]
        if before is not None:
            os.environ["RAY_AUTH_TOKEN"] = before


def _begun() -> tuple[subprocess.Popen[str], str]:
    """A process that starts Ray, and the cluster's address; empty: it has ended without one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.ray_cluster"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("address "):
            return process, line.split()[1]
    return process, ""


def main() -> None:
    """Until the input ends."""
    from edge_server.backends.ray.imports import ray, serve

    context = ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False, num_cpus=4)
    sys.stdout.write(f"address {context.address_info['gcs_address']}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        with redirect_stdout(io.StringIO()) as printed:
            exec(json.loads(line), {"ray": ray, "serve": serve})
        sys.stdout.write(f"printed {json.dumps(printed.getvalue())}\n")
        sys.stdout.flush()
    ray.shutdown()


if __name__ == "__main__":
    main()
