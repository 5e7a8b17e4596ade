"""Tails on Ray Serve behind our own door: the same answers, replicas' and ingresses' deaths that nobody notices, shelves."""

import asyncio
import os
import signal
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
from tests.fakes.server_running import Child, child

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")
pytest.importorskip("psutil")

from tests.fakes.ray_cluster import Cluster, arguments


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [write_tiny_bundle(folder / f"tiny-{i}", name=f"tiny-{i}", seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def others(joined: Cluster) -> set[int]:
    """The tails of other files' doors."""
    return set(joined.replicas())


@pytest.fixture(scope="module")
def server(joined: Cluster, others: set[int], bundles: list[Bundle], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
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


async def test_a_killed_replica_costs_no_frame(server: Child, bundles: list[Bundle], joined: Cluster, others: set[int]) -> None:
    before = set(joined.replicas()) - others
    assert len(before) == 2
    killed = before.pop()
    cameras = [asyncio.create_task(camera(server.address, bundles[0], n, 60, TRANSPORTS[n % 2])) for n in range(4)]
    await asyncio.sleep(0.5)
    os.kill(killed, signal.SIGKILL)
    took = [t for task in cameras for t in await task]
    assert len(took) == 240
    assert max(took) < 20
    until = time.monotonic() + 90
    while time.monotonic() < until and (len(now := set(joined.replicas()) - others) < 2 or killed in now):
        await asyncio.sleep(0.2)
    now = set(joined.replicas()) - others
    assert len(now) == 2  # and Serve has put another one in its place
    assert killed not in now


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
    joined.run(DEPLOY.format(model=str(bundles[1].path), name=bundles[1].manifest.name))
    tails = set(joined.replicas())
    assert len(tails - before) == 1
    with child(tmp_path, bundles[1].path, arguments=arguments(joined)) as door:
        assert len(await camera(door.address, bundles[1], 0, 3)) == 3
        assert set(joined.replicas()) == tails


DEPLOY = """
from edge_server.backends.ray.apps import tails
serve.start(proxy_location="Disabled")
serve.run(tails({{"model": {model!r}, "cpus": "0.5"}}), name="headtail-{name}", route_prefix=None)
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
