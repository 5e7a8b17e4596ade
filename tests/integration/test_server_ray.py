"""Tails on Ray Serve behind our own door: the same answers, replicas' and ingresses' deaths that nobody notices, shelves."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.errors import OverloadedError
from splitters.bundle import Bundle
from splitters.runtime.tail import load_tail
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import TRANSPORTS
from tests.fakes.links import asking
from tests.fakes.server_client import Device, Stream, picture, session
from tests.fakes.server_running import Child, child, environment

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")
pytest.importorskip("psutil")

from tests.fakes.ray_cluster import Cluster, arguments, cluster


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [write_tiny_bundle(folder / f"tiny-{i}", name=f"tiny-{i}", seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def server(joined: Cluster, bundles: list[Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    extra = arguments(joined, "--replicas", "2", "--reuse-port")
    with child(tmp_path_factory.mktemp("server"), bundles[0].path, arguments=extra) as server:
        yield server
        assert server.stop(timeout_s=40) == 0


async def agrees(stream: Stream, device: Device, bundle: Bundle, seed: int, frame_id: int) -> None:
    """The served answer is the tail's."""
    symbols = device.codec.decode(device.payloads(picture(seed)))
    (wanted,) = load_tail(bundle).run([x[None] for x in device.codec.dequantise(symbols)], [(48, 40)])
    result = await stream.frame(device.layers(picture(seed), frame_id))
    assert result.error is None, result.error
    assert [s.class_id for s in result.answer.top] == [s.class_id for s in wanted.top]
    assert [s.score for s in result.answer.top] == pytest.approx([s.score for s in wanted.top], abs=1e-5)
    assert result.timings.tail_ns > 0


async def test_ray_answers_as_the_tail_does(server: Child, bundles: list[Bundle]) -> None:
    device = Device(bundles[0])
    async with session(server.address, bundles[0].sha256) as stream:
        for i in range(8):
            await agrees(stream, device, bundles[0], seed=i, frame_id=i)
        assert isinstance((await stream.frame(device.layers(picture(), 100, deadline_ns=1000))).error, OverloadedError)


async def camera(address: str, bundle: Bundle, number: int, frames: int, transport: str = "grpc") -> list[float]:
    """Seconds each frame took; every one is answered."""
    device, took = Device(bundle), []
    async with asking(address, bundle.sha256, transport) as ask:
        for i in range(frames):
            begun = time.monotonic()
            result = await ask(device.layers(picture(number), i, deadline_ns=20_000_000_000))
            assert result.error is None, result.error
            took.append(time.monotonic() - begun)
            await asyncio.sleep(0.02)
    return took


async def test_a_killed_replica_costs_no_frame(server: Child, bundles: list[Bundle], joined: Cluster) -> None:
    before = joined.replicas()
    assert len(before) == 2
    cameras = [asyncio.create_task(camera(server.address, bundles[0], n, 60, TRANSPORTS[n % 2])) for n in range(4)]
    await asyncio.sleep(0.5)
    os.kill(before[0], signal.SIGKILL)
    took = [t for task in cameras for t in await task]
    assert len(took) == 240
    assert max(took) < 20
    until = time.monotonic() + 90
    while time.monotonic() < until and (len(now := joined.replicas()) < 2 or before[0] in now):
        await asyncio.sleep(0.2)
    assert len(joined.replicas()) == 2  # and Serve has put another one in its place


async def test_a_second_ingress_shares_the_tails_and_the_address(
    server: Child, bundles: list[Bundle], joined: Cluster, tmp_path: Path
) -> None:
    tails = set(joined.replicas())
    extra = arguments(joined, "--replicas", "2", "--reuse-port")
    with child(tmp_path, bundles[0].path, arguments=extra, listen=server.address) as second:
        assert second.address == server.address
        assert set(joined.replicas()) == tails  # none of its own
        assert len(await camera(server.address, bundles[0], 0, 5)) == 5
        second.stop(signal.SIGKILL)
    for number in range(4):  # whoever connects now reaches the one that is left
        assert len(await camera(server.address, bundles[0], number, 3, TRANSPORTS[number % 2])) == 3
    assert set(joined.replicas()) == tails


async def test_a_site_that_deploys_the_tails_itself_has_them_used(joined: Cluster, bundles: list[Bundle], tmp_path: Path) -> None:
    """By name, as deploy/ray/rayservice.yaml does; the door starts none of its own."""
    before = set(joined.replicas())
    deployed = subprocess.run(
        [sys.executable, "-c", DEPLOY, joined.address, str(bundles[1].path), bundles[1].manifest.name],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert deployed.returncode == 0, deployed.stderr
    tails = set(joined.replicas())
    assert len(tails - before) == 1
    with child(tmp_path, bundles[1].path, arguments=arguments(joined)) as door:
        assert len(await camera(door.address, bundles[1], 0, 3)) == 3
        assert set(joined.replicas()) == tails


DEPLOY = """
import sys
from edge_server.backends.ray.imports import ray, serve
from edge_server.backends.ray.apps import tails
address, model, name = sys.argv[1:]
ray.init(address=address, namespace="headtail", log_to_driver=False)
serve.start(proxy_location="Disabled")
serve.run(tails({"model": model, "cpus": "0.5"}), name=f"headtail-{name}", route_prefix=None)
"""


async def test_three_bundles_on_a_shelf_for_two(joined: Cluster, bundles: list[Bundle], tmp_path: Path) -> None:
    before = set(joined.replicas())
    extra = arguments(joined, "--tails-per-replica", "2")
    with child(tmp_path, *(b.path for b in bundles), arguments=extra) as server:
        assert len(set(joined.replicas()) - before) == 1  # one replica for all three
        devices = [Device(bundle) for bundle in bundles]
        for turn in range(3):  # each turn drops a tail to load another
            for number, bundle in enumerate(bundles):
                async with session(server.address, bundle.sha256, model=bundle.manifest.name) as stream:
                    await agrees(stream, devices[number], bundle, seed=turn, frame_id=0)
        ends = [asyncio.create_task(_mixed(server.address, bundle)) for bundle in bundles]
        assert [await end for end in ends] == [20, 20, 20]
        assert server.stop(timeout_s=40) == 0


async def _mixed(address: str, bundle: Bundle) -> int:
    device, answered = Device(bundle), 0
    async with session(address, bundle.sha256, model=bundle.manifest.name) as stream:
        for i in range(20):
            result = await stream.frame(device.layers(picture(i), i))
            answered += result.error is None
    return answered


async def test_ingresses_that_start_together_on_an_empty_cluster_deploy_once(bundles: list[Bundle], tmp_path: Path) -> None:
    bundle, seen, done = bundles[0], set[int](), asyncio.Event()

    with cluster() as empty, contextlib.ExitStack() as stack:

        async def watch() -> None:
            while not done.is_set():
                seen.update(await asyncio.to_thread(empty.replicas))
                await asyncio.sleep(0.05)

        def begin(number: int) -> Child:
            (folder := tmp_path / str(number)).mkdir()
            return stack.enter_context(child(folder, bundle.path, arguments=arguments(empty)))

        watching = asyncio.create_task(watch())
        doors = await asyncio.gather(*(asyncio.to_thread(begin, n) for n in range(3)))
        for door in doors:
            assert len(await camera(door.address, bundle, 0, 3)) == 3
        await asyncio.sleep(1.0)
        done.set()
        await watching
    assert len(seen) == 1
