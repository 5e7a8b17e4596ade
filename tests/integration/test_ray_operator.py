"""Ray as an operator meets it: doors that share tails, clusters that are full, and doors that end while they still start."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child, command, environment

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

import psutil

from tests.fakes.ray_cluster import Cluster, arguments

PATIENCE_S = 120.0


async def until(met: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(met):
        assert time.monotonic() < end, what
        await asyncio.sleep(0.2)


def on_cluster(ray: Cluster, script: str) -> str:
    """What a program that joins the cluster prints."""
    begin = f"from edge_server.backends.ray.imports import ray, serve\nray.init(address={ray.address!r}, log_to_driver=False)\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + script], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def answered(address: str, bundle: Bundle, frames: int = 3) -> None:
    device = Device(bundle)
    async with session(address, bundle.sha256) as stream:
        for i in range(frames):
            result = await stream.frame(device.layers(picture(i), i, deadline_ns=60_000_000_000))
            assert result.error is None, result.error


async def test_a_door_that_takes_another_bundle_leaves_the_other_door_its_tail(joined: Cluster, tmp_path: Path) -> None:
    old = write_tiny_bundle(tmp_path / "kept", name="shared", seed=1)
    for door in ("one/shared", "other"):
        shutil.copytree(old.path, tmp_path / door)
    with (
        child(tmp_path / "one", tmp_path / "one" / "shared", arguments=arguments(joined)) as one,
        child(tmp_path, tmp_path / "other", arguments=arguments(joined)) as other,
    ):
        (tail,) = joined.replicas()  # which both use
        shutil.rmtree(tmp_path / "one" / "shared")
        new = write_tiny_bundle(tmp_path / "one" / "shared", name="shared", seed=2)
        one.process.send_signal(signal.SIGHUP)
        await until(lambda: len(joined.replicas()) == 2, "the new bundle's tail")
        log = next((tmp_path / "one").glob("port-*.log"))
        await until(lambda: f"bundle {new.sha256[:12]} replaces {old.sha256[:12]}" in log.read_text(), log.read_text())
        await asyncio.sleep(2.0)  # the first door leaves the old one within a second
        await answered(other.address, old, frames=20)
        await answered(one.address, new)
        assert tail in joined.replicas()
        shutil.rmtree(tmp_path / "other")
        shutil.copytree(new.path, tmp_path / "other")
        other.process.send_signal(signal.SIGHUP)
        await until(lambda: tail not in joined.replicas(), "the old tail stays although nobody uses it")
        await answered(other.address, new)
        assert len(joined.replicas()) == 1


async def test_an_application_that_somebody_deletes_is_deployed_again(joined: Cluster, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name="deleted", seed=3)
    before = set(joined.replicas())
    with child(tmp_path, bundle.path, arguments=arguments(joined)) as door:
        (tail,) = set(joined.replicas()) - before
        # Not waited for: it might see the application that the door deploys at once.
        on_cluster(joined, f"serve.delete('headtail-deleted-{bundle.sha256[:12]}', _blocking=False)")
        await until(lambda: tail not in joined.replicas(), "the tail that was deleted")
        await answered(door.address, bundle, frames=5)
        log = next(tmp_path.glob("port-*.log")).read_text()
        assert "is gone from the cluster; it is deployed again" in log


async def test_a_start_without_a_spare_core_says_so_and_ends(joined: Cluster, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name="large", seed=4)
    line = command(
        "--listen", "127.0.0.1:0", "--model", str(bundle.path), *arguments(joined, "--cpus-per-replica", "64"),
        "--deploy-timeout-s", "8",
    )  # fmt: skip
    done = await asyncio.to_thread(
        subprocess.run, line, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 11, done.stderr
    assert "is not ready after" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "did not start within 8 s: 0 of 1 replicas run; each needs 64 CPU" in last
    assert "--tails-per-replica 2" in last
    left = f"print([a.status.value for n, a in serve.status().applications.items() if n == 'headtail-large-{bundle.sha256[:12]}'])"
    assert on_cluster(joined, left) in ("[]", "['DELETING']")  # and does not start later, for nobody


async def test_a_full_cluster_takes_a_new_bundle_into_the_replicas_there_are(joined: Cluster, tmp_path: Path) -> None:
    old = write_tiny_bundle(tmp_path / "bundle", name="rolled", seed=5)
    before = set(joined.replicas())
    free = float(on_cluster(joined, "print(ray.available_resources().get('CPU', 0))"))
    extra = arguments(joined, "--cpus-per-replica", str(free), "--tails-per-replica", "2", "--deploy-timeout-s", "60")
    with child(tmp_path, old.path, arguments=extra) as door:
        tails = set(joined.replicas()) - before
        assert float(on_cluster(joined, "print(ray.available_resources().get('CPU', 0))")) == 0.0
        shutil.rmtree(old.path)
        new = write_tiny_bundle(old.path, name="rolled", seed=6)
        door.process.send_signal(signal.SIGHUP)
        log = next(tmp_path.glob("port-*.log"))
        await until(lambda: f"bundle {new.sha256[:12]} replaces" in log.read_text(), "the new bundle")
        await answered(door.address, new)
        assert set(joined.replicas()) - before == tails


def test_serves_own_file_is_refused_where_a_door_has_started_serve(joined: Cluster, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name="alone", seed=7)
    said = on_cluster(
        joined,
        "serve.start(proxy_location='Disabled')\n"
        "from edge_server.backends.ray.apps import unary\n"
        "from protos.errors import ConfigError\n"
        f"try:\n    unary({{'model': {str(bundle.path)!r}}})\nexcept ConfigError as error:\n    print(error)",
    )
    assert "nothing would listen" in said


async def test_an_interrupt_from_the_terminal_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name="waiting", seed=8)
    line = command("--listen", "127.0.0.1:0", "--model", str(bundle.path), "--backend", "ray", "--cpus-per-replica", "64")
    with (tmp_path / "log").open("w") as log:
        door = subprocess.Popen(line, env=environment(), stdout=log, stderr=log, start_new_session=True)
        of_the_door = set[int]()
        try:
            await until(lambda: "is not ready after" in (tmp_path / "log").read_text(), (tmp_path / "log").read_text())
            of_the_door = {p.pid for p in psutil.Process(door.pid).children(recursive=True)}
            assert of_the_door
            os.killpg(door.pid, signal.SIGINT)  # as a terminal does
            assert await asyncio.to_thread(door.wait, PATIENCE_S) == 0
            await until(lambda: not of_session(door.pid) and not alive(of_the_door), f"left: {of_session(door.pid)}")
        finally:
            for pid in {door.pid, *of_the_door, *of_session(door.pid)}:
                if psutil.pid_exists(pid):
                    psutil.Process(pid).kill()
            door.wait()


async def test_a_door_whose_node_dies_ends_and_says_how_it_died(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name="node", seed=9)
    with child(tmp_path, bundle.path, arguments=("--backend", "ray", "--cpus-per-replica", "0.5")) as door:
        (node,) = [p for p in psutil.Process(door.process.pid).children() if p.name() == "raylet"]
        on_it = {p.pid for p in node.children(recursive=True)}
        node.kill()
        assert await asyncio.to_thread(door.process.wait, PATIENCE_S) == 1
        for pid in on_it & set(psutil.pids()):
            psutil.Process(pid).kill()
    log = next(tmp_path.glob("port-*.log")).read_text()
    assert f"(raylet, process {node.pid}) has ended with -9" in log, log


def alive(pids: set[int]) -> list[str]:
    return [psutil.Process(p).name() for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def of_session(leader: int) -> list[int]:
    """Processes of a session that its leader has left behind."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != leader and os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    return found
