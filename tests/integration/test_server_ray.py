"""Tails on Ray Serve behind our own door: the same answers, and a replica's death that nobody notices."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator

import pytest

from protos.errors import OverloadedError
from splitters.bundle import Bundle
from splitters.tails import load_tail
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import Child, child

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.timeout(150)
REPLICA = "ray::ServeReplica"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    arguments = ("--backend", "ray", "--replicas", "2", "--cpus-per-replica", "0.5")
    with child(tmp_path_factory.mktemp("server"), bundle.path, arguments=arguments) as server:
        yield server
        assert server.stop(timeout_s=40) == 0


async def test_ray_answers_as_the_tail_does(server: Child, bundle: Bundle) -> None:
    device, tail = Device(bundle), load_tail(bundle)
    async with session(server.address, bundle.sha256) as stream:
        for i in range(8):
            symbols = device.codec.decode(device.payloads(picture(i)))
            (wanted,) = tail.run([x[None] for x in device.codec.dequantise(symbols)], [(48, 40)])
            result = await stream.frame(device.layers(picture(i), i))
            assert result.error is None
            assert [s.class_id for s in result.answer.top] == [s.class_id for s in wanted.top]
            assert result.timings.tail_ns > 0
        assert isinstance((await stream.frame(device.layers(picture(), 100, deadline_ns=1000))).error, OverloadedError)


def replicas(server: Child) -> list[int]:
    """Of this server's own cluster: Ray's processes are descendants of the process that started it."""
    return [p.pid for p in psutil.Process(server.process.pid).children(recursive=True) if p.name().startswith(REPLICA[:15])
            and REPLICA in " ".join(p.cmdline())]  # fmt: skip


async def test_a_killed_replica_costs_no_frame(server: Child, bundle: Bundle) -> None:
    device = Device(bundle)
    before = replicas(server)
    assert len(before) == 2

    async def camera(number: int, frames: int) -> list[float]:
        took = []
        async with session(server.address, bundle.sha256) as stream:
            for i in range(frames):
                begun = time.monotonic()
                result = await stream.frame(device.layers(picture(number), i, deadline_ns=10_000_000_000))
                assert result.error is None, result.error
                took.append(time.monotonic() - begun)
                await asyncio.sleep(0.02)
        return took

    cameras = [asyncio.create_task(camera(n, 60)) for n in range(4)]
    await asyncio.sleep(0.5)
    os.kill(before[0], signal.SIGKILL)
    took = [t for task in cameras for t in await task]
    assert len(took) == 240
    assert max(took) < 10
    until = time.monotonic() + 60
    while time.monotonic() < until and (len(now := replicas(server)) < 2 or before[0] in now):
        await asyncio.sleep(0.2)
    assert len(replicas(server)) == 2  # and Serve has put another one in its place
