"""A cluster of two nodes, one of which sees no bundle folder: as an operator starts it, by `ray start` and deploy/ray/cluster.env.

The second node is a mount namespace of its own, in which the bundle's folder is empty.
"""

from __future__ import annotations

import asyncio
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child, command, environment

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

import psutil

UNSHARE = ["unshare", "--map-root-user", "--mount"]
SETTINGS = Path(__file__).resolve().parents[2] / "deploy" / "ray" / "cluster.env"
PATIENCE_S = 120.0


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
    """One started node of one core. Ray gives up a start after 30 s, which a busy machine may need; then it is started again."""
    line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--disable-usage-stats", *arguments]
    script = f"until {shlex.join(line)}; do sleep 1; done"
    if hidden is None:
        line = ["sh", "-c", script]
    else:
        line = [*UNSHARE, "sh", "-c", f"mount -t tmpfs none {shlex.quote(str(hidden))} && {script}"]
    with log.open("w") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        yield psutil.Process(process.pid)
    finally:
        end(psutil.Process(process.pid))
        process.wait()


def end(started: psutil.Process) -> None:
    """The node with everything on it, at once."""
    with suppress(psutil.NoSuchProcess):
        for process in [started, *started.children(recursive=True)]:  # first whoever would start it again
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def tails(started: psutil.Process) -> list[int]:
    """Process ids of a node's replicas."""
    found = []
    for process in started.children(recursive=True):
        with suppress(psutil.Error):
            if "ray::ServeReplica" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def wait_for(met: Callable[[], bool], what: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < until, f"{what}\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cores(env: dict[str, str], address: str) -> float:
    """Of the cluster."""
    script = f"import ray; ray.init(address={address!r}, log_to_driver=False); print(ray.cluster_resources().get('CPU', 0))"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else 0.0


async def camera(address: str, bundle: Bundle, number: int, done: asyncio.Event) -> int:
    """Sends frame after frame until told to stop; every one is answered."""
    device, sent = Device(bundle), 0
    async with session(address, bundle.sha256) as stream:
        while not done.is_set():
            result = await stream.frame(device.layers(picture(number), sent, deadline_ns=60_000_000_000))
            assert result.error is None, result.error
            sent += 1
            await asyncio.sleep(0.05)
    return sent


async def test_a_node_without_the_bundle_has_its_tail_and_may_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_tiny_bundle(tmp_path / "kept", name="nodes", seed=1)
    folder = tmp_path / "bundles"
    shutil.copytree(bundle.path, folder / "nodes")
    token, port = secrets.token_hex(32), free_port()
    env = settings(token)
    address = f"127.0.0.1:{port}"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, env[name])
    broken = tmp_path / "no-folder"
    broken.write_text("a file where the cache should be")
    arguments = ("--backend", "ray", "--ray-address", address, "--replicas", "2", "--deploy-timeout-s", "60")
    second = ("--address", address)
    head_line = ("--head", "--port", str(port), "--node-ip-address", "127.0.0.1", "--include-dashboard", "false")

    # Ray's sockets lie in it, and their paths must be short; and what Ray writes down of this cluster is not for others to find.
    with TemporaryDirectory(prefix="ht-") as short, node(env, tmp_path / "head.log", *head_line, "--temp-dir", short) as head:
        wait_for(lambda: cores(env, address) == 1, "the head", tmp_path / "head.log")

        # A node that can keep no bundle: the door says why, in its log and at its end.
        with node(env | {"HEADTAIL_CACHE": str(broken)}, tmp_path / "broken.log", *second, hidden=folder):
            wait_for(lambda: cores(env, address) == 2, "the second node", tmp_path / "broken.log")
            line = command("--listen", "127.0.0.1:0", "--model", str(folder / "nodes"), *arguments)
            failed = await asyncio.to_thread(
                subprocess.run, line, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
            )
            assert failed.returncode == 11, failed.stderr
            assert f"cannot keep bundle {bundle.sha256[:12]} at {broken}" in failed.stderr.strip().splitlines()[-1]

        hidden_cache = tmp_path / "cache"
        with node(env | {"HEADTAIL_CACHE": str(hidden_cache)}, tmp_path / "second.log", *second, hidden=folder) as other:
            wait_for(lambda: cores(env, address) >= 2, "the second node", tmp_path / "second.log")
            with child(tmp_path, folder / "nodes", arguments=arguments) as door:
                door_log = next(tmp_path.glob("port-*.log"))
                wait_for(lambda: (len(tails(head)), len(tails(other))) == (1, 1), "a tail on each node", door_log)
                assert (hidden_cache / "tails" / bundle.sha256 / "manifest.json").is_file()
                done = asyncio.Event()
                cameras = [asyncio.create_task(camera(door.address, bundle, n, done)) for n in range(4)]
                await asyncio.sleep(1.0)
                await asyncio.to_thread(end, other)  # the node dies under load
                await asyncio.sleep(2.0)
                again = {"HEADTAIL_CACHE": str(tmp_path / "cache-2")}
                with node(env | again, tmp_path / "third.log", *second, hidden=folder) as third:
                    await asyncio.to_thread(wait_for, lambda: len(tails(third)) == 1, "a tail on the node that joined", door_log)
                    await asyncio.sleep(1.0)
                    done.set()
                    sent = [await task for task in cameras]
                    assert min(sent) > 20
                door.stop()
