"""A cluster of two nodes, one of which sees no bundle folder: as an operator starts it, by `ray start` and deploy/ray/cluster.env.

The second node is a mount namespace of its own, in which the bundle's folder is empty. The first such node can keep no bundle.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child, environment

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

import psutil

from tests.fakes.ray_cluster import end, replicas

UNSHARE = ["unshare", "--map-root-user", "--mount"]
SETTINGS = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "cluster.env"
PATIENCE_S = 240.0


def hides() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    with suppress(OSError):
        return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False).returncode == 0
    return False


pytestmark = pytest.mark.skipif(not hides(), reason="no mount namespace can be made here, to hide the bundle's folder in")


def settings(token: str) -> dict[str, str]:
    lines = [line for line in SETTINGS.read_text().splitlines() if line and not line.startswith("#")]
    return {**environment(), **dict(line.split("=", 1) for line in lines), "RAY_AUTH_TOKEN": token}


@contextmanager
def node(env: dict[str, str], log: Path, *arguments: str, hidden: Path | None = None) -> Iterator[psutil.Process]:
    """One node of one core that runs. Ray gives up a start after 30 s, which a busy machine may need; then it is started again."""
    line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--disable-usage-stats", *arguments]
    script = f"until {shlex.join(line)}; do sleep 1; done"
    if hidden is None:
        line = ["sh", "-c", script]
    else:
        line = [*UNSHARE, "sh", "-c", f"mount -t tmpfs none {shlex.quote(str(hidden))} && {script}"]
    with log.open("w") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env={**env, "PYTHONUNBUFFERED": "1"}, start_new_session=True)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), "the node", log)
        yield psutil.Process(process.pid)
    finally:
        end(psutil.Process(process.pid))
        process.wait()


def wait_for(met: Callable[[], bool], what: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < until, f"{what}\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_of(folder: Path) -> str:
    """What the door has said."""
    return "".join(path.read_text() for path in folder.glob("port-*.log"))


async def camera(address: str, bundle: Bundle, number: int, sent: list[int], done: asyncio.Event) -> None:
    """Sends frame after frame until told to stop; every one is answered."""
    device = Device(bundle)
    async with session(address, bundle.sha256) as stream:
        while not done.is_set():
            result = await stream.frame(device.layers(picture(number), sent[number], deadline_ns=60_000_000_000))
            assert result.error is None, result.error
            sent[number] += 1
            await asyncio.sleep(0.02)


async def until(met: Callable[[], bool], what: str, cameras: list[asyncio.Task[None]]) -> None:
    """Waits while every camera goes on."""
    end_s = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(met):
        for task in cameras:
            if task.done():
                task.result()
        assert time.monotonic() < end_s, what
        await asyncio.sleep(0.1)


async def test_a_node_without_the_bundle_has_its_tail_and_may_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_tiny_bundle(tmp_path / "kept", name="nodes", seed=1)
    folder = tmp_path / "bundles"
    shutil.copytree(bundle.path, folder / "nodes")
    token, port = secrets.token_hex(32), free_port()
    env = settings(token)
    address = f"127.0.0.1:{port}"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, env[name])
    broken, cache = tmp_path / "no-folder", tmp_path / "cache"
    broken.write_text("a file where the cache should be")
    arguments = ("--backend", "ray", "--ray-address", address, "--replicas", "2", "--deploy-timeout-s", "600")
    second = ("--address", address)
    head_line = ("--head", "--port", str(port), "--node-ip-address", "127.0.0.1", "--include-dashboard", "false")

    # Ray's sockets lie in it, and their paths must be short; and what Ray writes down of this cluster is not for others to find.
    with (
        TemporaryDirectory(prefix="ht-") as short,
        node(env, tmp_path / "head.log", *head_line, "--temp-dir", short) as head,
        ExitStack() as running,
    ):
        door_line = child(tmp_path, folder / "nodes", arguments=arguments, start_s=600)
        starting = asyncio.create_task(asyncio.to_thread(running.enter_context, door_line))
        with node(env | {"HEADTAIL_CACHE": str(broken)}, tmp_path / "broken.log", *second, hidden=folder):
            reason = f"cannot keep bundle {bundle.sha256[:12]} at {broken}"
            await until(lambda: reason in log_of(tmp_path), "why the door waits", [])

        # The door has waited, and goes on as soon as there is a node that can keep the bundle.
        with node(env | {"HEADTAIL_CACHE": str(cache)}, tmp_path / "second.log", *second, hidden=folder) as other:
            door = await starting
            await until(lambda: (len(replicas(head)), len(replicas(other))) == (1, 1), "a tail on each node", [])
            assert (cache / "tails" / bundle.sha256 / "manifest.json").is_file()
            sent, done = [0] * 4, asyncio.Event()
            cameras = [asyncio.create_task(camera(door.address, bundle, n, sent, done)) for n in range(4)]
            await until(lambda: min(sent) >= 5, "frames", cameras)
            await asyncio.to_thread(end, other)  # the node dies under load
        again = {"HEADTAIL_CACHE": str(tmp_path / "cache-2")}
        joining = node(env | again, tmp_path / "third.log", *second, hidden=folder)
        third = await asyncio.to_thread(running.enter_context, joining)
        await until(lambda: len(replicas(third)) == 1, "a tail on the node that joined", cameras)
        before = sent.copy()
        await until(lambda: all(now >= then + 5 for now, then in zip(sent, before, strict=True)), "frames", cameras)
        done.set()
        await asyncio.gather(*cameras)
        door.stop()
