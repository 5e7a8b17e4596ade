"""A Ray cluster of this machine as a process of its own, for tests that share one.

    python -m tests.fakes.ray_cluster

prints the address to join and ends with its standard input.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil

PATIENCE_S = 180.0


class Cluster(NamedTuple):
    """A running cluster."""

    address: str
    process: psutil.Process

    def replicas(self) -> list[int]:
        """Process ids of the tails' replicas."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                if process.name().startswith("ray::ServeRepl") or "ray::ServeReplica" in " ".join(process.cmdline()):
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found


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
        yield Cluster(address, psutil.Process(process.pid))
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
    from edge_server.backends.ray.imports import ray

    context = ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False, num_cpus=4)
    sys.stdout.write(f"address {context.address_info['gcs_address']}\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main()
