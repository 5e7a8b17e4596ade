"""Ray as an operator meets it: doors that share tails, clusters that are full, and doors that end while they still start."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from splitters.bundle import Bundle, open_bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import Child, child, command, environment

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

import psutil

from edge_server.backends.ray.replica import SHELF_APP
from tests.fakes.ray_cluster import Cluster, arguments

PATIENCE_S = 120.0


async def until(met: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not await asyncio.to_thread(met):
        assert time.monotonic() < end, what
        await asyncio.sleep(0.2)


async def answered(address: str, bundle: Bundle, frames: int = 3) -> None:
    device = Device(bundle)
    async with session(address, bundle.sha256) as stream:
        for i in range(frames):
            result = await stream.frame(device.layers(picture(i), i, deadline_ns=60_000_000_000))
            assert result.error is None, result.error


class Doors(NamedTuple):
    """Doors that started together on an empty cluster, each with the bundle in a folder of its own."""

    bundle: Bundle
    folders: list[Path]
    doors: list[Child]
    tails: set[int]  # all that were ever seen meanwhile


@pytest.fixture(scope="module")
def three(joined: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """Three of them; nothing else has used the cluster before."""
    home, seen, done = tmp_path_factory.mktemp("doors"), set[int](), threading.Event()
    bundle = write_tiny_bundle(home / "kept", name="shared", seed=1)

    def watch() -> None:
        while not done.wait(0.05):
            seen.update(joined.replicas())

    assert not joined.replicas()
    with ExitStack() as stack, ThreadPoolExecutor(4) as pool:
        watching = pool.submit(watch)
        stack.callback(done.set)
        folders = [home / f"door-{n}" for n in range(3)]
        for folder in folders:
            shutil.copytree(bundle.path, folder / "shared")

        def begin(folder: Path) -> Child:
            return stack.enter_context(child(folder, folder / "shared", arguments=arguments(joined)))

        doors = list(pool.map(begin, folders))
        done.wait(1.0)
        done.set()
        watching.result()
        yield Doors(bundle, folders, doors, seen)


async def test_doors_that_start_together_on_an_empty_cluster_deploy_once(three: Doors) -> None:
    for door in three.doors:
        await answered(door.address, three.bundle)
    assert len(three.tails) == 1


async def test_a_door_that_takes_another_bundle_leaves_the_other_doors_their_tail(joined: Cluster, three: Doors) -> None:
    (tail,) = joined.replicas()  # which all use
    one, *others = three.doors
    shutil.rmtree(three.folders[0] / "shared")
    new = write_tiny_bundle(three.folders[0] / "shared", name="shared", seed=2)
    one.process.send_signal(signal.SIGHUP)
    log = next(three.folders[0].glob("port-*.log"))
    replaced = f"bundle {new.sha256[:12]} replaces {three.bundle.sha256[:12]}"
    await until(lambda: replaced in log.read_text(), "the new bundle")
    await asyncio.sleep(2.0)  # the first door leaves the old one within a second
    for other in others:
        await answered(other.address, three.bundle, frames=20)
    await answered(one.address, new)
    assert len(joined.replicas()) == 2
    assert tail in joined.replicas()
    for other, folder in zip(others, three.folders[1:], strict=True):
        shutil.rmtree(folder / "shared")
        shutil.copytree(new.path, folder / "shared")
        other.process.send_signal(signal.SIGHUP)
    await until(lambda: tail not in joined.replicas(), "the old tail stays although nobody uses it")
    for other in others:
        await answered(other.address, new)
    assert len(joined.replicas()) == 1


async def test_an_application_that_somebody_deletes_is_deployed_again(joined: Cluster, three: Doors) -> None:
    bundle = open_bundle(three.folders[0] / "shared")
    (tail,) = joined.replicas()
    # Not waited for: it might see the application that a door deploys at once.
    joined.run(f"serve.delete('headtail-shared-{bundle.sha256[:12]}', _blocking=False)")
    await until(lambda: tail not in joined.replicas(), "the tail that was deleted")
    for door in three.doors:
        await answered(door.address, bundle, frames=5)
    logs = [next(folder.glob("port-*.log")).read_text() for folder in three.folders]
    assert any("is gone from the cluster; it is deployed again" in log for log in logs)  # says whoever saw it first
    assert len(joined.replicas()) == 1


async def test_a_start_without_a_spare_core_says_so_and_ends(joined: Cluster, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name="large", seed=4)
    line = command(
        "--listen", "127.0.0.1:0", "--model", str(bundle.path), *arguments(joined, "--cpus-per-replica", "64"),
        "--deploy-timeout-s", "6",
    )  # fmt: skip
    done = await asyncio.to_thread(
        subprocess.run, line, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 11, done.stderr
    assert "is not ready after" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "did not start within 6 s: 0 of 1 replicas run; each needs 64 CPU" in last
    assert "--tails-per-replica 2" in last
    left = f"print([a.status.value for n, a in serve.status().applications.items() if n == 'headtail-large-{bundle.sha256[:12]}'])"
    assert joined.run(left) in ("[]", "['DELETING']")  # and does not start later, for nobody


async def test_a_full_cluster_takes_a_new_bundle_into_the_replicas_there_are(joined: Cluster, tmp_path: Path) -> None:
    old = write_tiny_bundle(tmp_path / "bundle", name="rolled", seed=5)
    before = set(joined.replicas())
    free = float(joined.run("print(ray.available_resources().get('CPU', 0))"))
    extra = arguments(joined, "--cpus-per-replica", str(free), "--tails-per-replica", "2", "--deploy-timeout-s", "60")
    with child(tmp_path, old.path, arguments=extra) as door:
        tails = set(joined.replicas()) - before
        assert float(joined.run("print(ray.available_resources().get('CPU', 0))")) == 0.0
        shutil.rmtree(old.path)
        new = write_tiny_bundle(old.path, name="rolled", seed=6)
        door.process.send_signal(signal.SIGHUP)
        log = next(tmp_path.glob("port-*.log"))
        await until(lambda: f"bundle {new.sha256[:12]} replaces" in log.read_text(), "the new bundle")
        await answered(door.address, new)
        assert set(joined.replicas()) - before == tails
    joined.run(f"serve.delete({SHELF_APP!r})")  # others want the cores


def test_serves_own_file_is_refused_where_a_door_has_started_serve(joined: Cluster, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", name="alone", seed=7)
    said = joined.run(
        "serve.start(proxy_location='Disabled')\n"
        "from edge_server.backends.ray.apps import unary\n"
        "from protos.errors import ConfigError\n"
        f"try:\n    unary({{'model': {str(bundle.path)!r}}})\nexcept ConfigError as error:\n    print(error)"
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
