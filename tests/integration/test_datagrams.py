"""Frames as datagrams between a real server and a client's link, through paths that lose, mix up, double and alter them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.testbed.link.model import Link
from edge_client.transport.quic import AutoLink, QuicLink
from edge_client.transport.rpc import Endpoint
from edge_server.config import SecurityConfig
from edge_server.server import Server
from splitters.bundle import Bundle
from tests.fakes.links import linked, path, until
from tests.fakes.server_client import Device, picture
from tests.fakes.server_running import running

pytest.importorskip("aioquic")


@pytest.fixture(scope="module")
def device(bundle: Bundle) -> Device:
    return Device(bundle)


@pytest.fixture(scope="module")
async def server(bundle: Bundle) -> AsyncIterator[Server]:
    async with running(bundle.path) as server:
        yield server


async def test_frames_and_answers_go_as_datagrams(server: Server, bundle: Bundle, device: Device) -> None:
    async with linked(server.address, bundle.sha256) as it:
        await it.opened()
        by_stream, layers = it.shaper.up_bytes, device.layers(picture(), 0)
        for _ in range(20):
            result = await it.answered(await it.send(layers))
            assert result.error is None
            assert result.layers_decoded == len(layers)
        one_frame = sum(len(layer.payload) for layer in layers)
        assert it.shaper.up_bytes - by_stream < one_frame  # of twenty none, HTTP/2's own words at most
        assert not it.told.reliable
        assert not it.told.lost
        assert not it.told.twice
        assert it.told.welcome is not None
        assert it.told.welcome.datagrams is not None


@pytest.mark.parametrize(("loss", "burst"), [(0.2, 1.0), (0.5, 1.0), (0.2, 3.0)])
async def test_on_a_path_that_loses_packets_frames_arrive_all_the_same(
    server: Server, bundle: Bundle, device: Device, loss: float, burst: float
) -> None:
    async with linked(server.address, bundle.sha256) as it:
        await it.opened()
        # From here on packets are lost, both ways. Nothing is sent a second time, so what is lost stays lost.
        assert it.shaper.udp is not None
        it.shaper.udp._up = Link(path(loss, burst=burst), "lossy/up")
        it.shaper.udp._down = Link(path(loss, burst=burst), "lossy/down")
        layers = device.layers(picture(), 0)
        for _ in range(25):  # the loss becomes known
            await it.send(layers, deadline_s=0.2)
            await asyncio.sleep(0.05)
        await until(lambda: it.told.settled >= 25, "what became of the first frames is told")
        ids = []
        for number in range(60):  # one after the other: a newer frame would take the place of one that a busy machine has not sent
            ids.append(await it.send(layers, deadline_s=2.0))
            await until(lambda number=number: it.told.settled > 25 + number, "what became of every frame is told")
        arrived = sum(frame in it.told.results for frame in ids)
    assert arrived >= 45, f"{arrived} of 60 arrived"  # without parity some 38 would at a loss of .2, and 15 at .5


async def test_a_blocked_port_costs_no_frame(server: Server, bundle: Bundle, device: Device) -> None:
    async with linked(server.address, bundle.sha256, blocked=True) as it:
        for _ in range(10):
            assert (await it.answered(await it.send(device.layers(picture(), 0)))).error is None
        assert not it.beside
        assert it.told.reliable
        assert not it.told.lost


async def test_a_port_blocked_later_is_noticed_and_one_opened_again_is_used_again(
    server: Server, bundle: Bundle, device: Device
) -> None:
    async with linked(server.address, bundle.sha256) as it:
        await it.opened()
        layers = device.layers(picture(), 0)
        await it.answered(await it.send(layers))
        assert it.shaper.udp is not None
        it.shaper.udp.blocked = True
        sent = []
        while it.beside:
            sent.append(await it.send(layers, deadline_s=0.5))
            await asyncio.sleep(0.02)
        # Two round trips of 10 ms and the allowance of 50: a few frames, not hundreds.
        after = await it.send(layers)
        assert (await it.answered(after)).error is None
        assert it.told.reliable
        known = it.told
        await until(lambda: {*known.lost, *known.unsent, *known.results} >= {*sent}, "what became of every frame is told")
        assert known.lost or known.unsent
        it.shaper.udp.blocked = False
        await until(lambda: it.beside, "datagrams arrive again")
        assert (await it.answered(await it.send(layers))).error is None
        assert not it.told.reliable
        assert not it.told.twice
        assert not it.told.downs


async def test_a_router_that_starts_again_changes_our_address_and_nothing_else(
    server: Server, bundle: Bundle, device: Device
) -> None:
    async with linked(server.address, bundle.sha256) as it:
        await it.opened()
        layers = device.layers(picture(), 0)
        await it.answered(await it.send(layers))
        assert it.shaper.udp is not None
        it.shaper.udp.rebind()
        for _ in range(5):
            await it.send(layers, deadline_s=0.5)
            await asyncio.sleep(0.05)
        assert (await it.answered(await it.send(layers))).error is None
        assert not it.told.downs
        assert it.beside


async def test_datagrams_mixed_up_doubled_and_altered_answer_each_frame_once(
    server: Server, bundle: Bundle, device: Device
) -> None:
    dice = random.Random(7)

    def fate(data: bytes) -> list[tuple[bytes, int]]:
        kind = dice.random()
        if kind < 0.2:
            return [(data, 0), (data, 1_000_000)]
        if kind < 0.4:
            return [(data, dice.randrange(8_000_000))]
        if kind < 0.5:
            at = dice.randrange(len(data))
            return [(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :], 0)]
        return [(data, 0)] if kind < 0.95 else [(data[: dice.randrange(1, len(data))], 0)]

    async with linked(server.address, bundle.sha256) as it:
        await it.opened()
        assert it.shaper.udp is not None
        it.shaper.udp.fate = fate
        layers = device.layers(picture(), 0)
        whole = await it.answered(await it.send(layers))
        for _ in range(40):
            await it.send(layers, deadline_s=1.0)
            await asyncio.sleep(0.02)
        await until(lambda: it.told.settled >= 41, "every frame is accounted for")
        assert not it.told.twice
        answers = [result for result in it.told.results.values() if result.error is None]
        assert len(answers) > 5
        assert {result.answer for result in answers} == {whole.answer}


async def test_a_path_for_smaller_packets_only_is_one_without_datagrams(server: Server, bundle: Bundle, device: Device) -> None:
    async with linked(server.address, bundle.sha256) as it:
        assert it.shaper.udp is not None
        it.shaper.udp.fate = lambda data: [] if len(data) > 1000 else [(data, 0)]
        assert (await it.answered(await it.send(device.layers(picture(), 0)))).error is None
        await until(lambda: it.shaper.udp is not None and it.shaper.udp.ups > 0, "it was tried")
        assert (await it.answered(await it.send(device.layers(picture(), 0)))).error is None
        assert not it.told.lost


async def test_auto_stays_on_the_stream_where_nothing_is_lost(server: Server, bundle: Bundle, device: Device) -> None:
    async with linked(server.address, bundle.sha256, make=AutoLink) as it:
        await it.opened()
        for _ in range(10):
            assert (await it.answered(await it.send(device.layers(picture(), 0)))).error is None
        assert it.told.reliable


async def test_auto_leaves_a_lossy_stream(server: Server, bundle: Bundle, device: Device) -> None:
    async with linked(server.address, bundle.sha256, make=AutoLink) as it:
        await it.opened()
        assert it.shaper.udp is not None
        it.shaper.udp._up = Link(path(0.2), "lossy/up")
        layers = device.layers(picture(), 0)

        async def some() -> None:
            while it.told.reliable:
                await it.send(layers)
                await asyncio.sleep(0.1)

        await asyncio.wait_for(some(), 60)


async def test_a_server_told_not_to_listens_on_no_udp_port(bundle: Bundle, device: Device) -> None:
    async with running(bundle.path, quic=False) as plain, linked(plain.address, bundle.sha256) as it:
        assert it.told.welcome is not None
        assert it.told.welcome.datagrams is None
        assert (await it.answered(await it.send(device.layers(picture(), 0)))).error is None


async def test_quotas_hold_on_both_paths(tmp_path: Path, bundle: Bundle, device: Device) -> None:
    file = tmp_path / "tokens"
    file.write_text("camera 0123456789abcdef\n")
    security = SecurityConfig(token_file=file, frames_per_s_per_token=5)
    async with running(bundle.path, security=security) as guarded:

        def make(endpoint: Endpoint, events: object, **settings: object) -> QuicLink:
            return QuicLink(Endpoint(address=endpoint.address, token="0123456789abcdef"), events, **settings)  # type: ignore[arg-type]

        async with linked(guarded.address, bundle.sha256, make=make) as it:
            await it.opened()
            layers = device.layers(picture(), 0)
            ids = []
            for _ in range(40):
                ids.append(await it.send(layers))
                await asyncio.sleep(0.005)
            await until(lambda: it.told.settled >= 40, "every frame is accounted for")
            refused = [f for f in ids if f in it.told.results and it.told.results[f].error is not None]
            assert refused
            assert all("quota" in str(it.told.results[f].error) for f in refused)
