"""The shaper on loopback agrees with the simulator about the same messages over the same link."""

from __future__ import annotations

import asyncio
import struct
import time

import pytest

from deploy.testbed.link import Link, LinkConfig, LossModel
from deploy.testbed.loop import Loop
from deploy.testbed.path import Pipe
from deploy.testbed.report import quantile
from deploy.testbed.shape import Shaper
from deploy.testbed.trace import Trace, constant

MS = 1_000_000
FRAMES, INTERVAL_S, ANSWER = 80, 0.05, 200
SIZES = [1500 + 700 * (i * 7 % 11) for i in range(FRAMES)]


def simulated(up: LinkConfig, down: LinkConfig) -> list[float]:
    """Round trips in ms: each frame answered at once with ANSWER bytes."""
    loop = Loop()
    ahead = Pipe(loop, Link(up, "up/0"), reverse_delay_ns=down.delay_ns, ack_loss=down.loss.loss, seed="up/0/0")
    back = Pipe(loop, Link(down, "down/0"), reverse_delay_ns=up.delay_ns, ack_loss=up.loss.loss, seed="down/0/0")
    found: list[float] = []
    for i, size in enumerate(SIZES):
        begin = int(i * INTERVAL_S * 1e9)

        def answered(begin: int) -> None:
            found.append((loop.now_ns - begin) / MS)

        def arrived(begin: int) -> None:
            back.send(ANSWER, answered, begin)

        loop.at(begin, lambda row: ahead.send(row[1] + 4, arrived, row[0]), (begin, size))
    loop.run(60_000 * MS)
    return found


async def measure_lag(lags: list[float]) -> None:
    """How late this machine's timers are, ms."""
    while True:
        begin = time.monotonic()
        await asyncio.sleep(0.005)
        lags.append((time.monotonic() - begin) * 1e3 - 5)


async def shaped(up: LinkConfig, down: LinkConfig, lags: list[float] | None = None) -> list[float]:
    """The same through real sockets."""
    probe = asyncio.create_task(measure_lag(lags if lags is not None else []))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (size,) = struct.unpack("!I", await reader.readexactly(4))
                await reader.readexactly(size)
                writer.write(bytes(ANSWER))
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    shaper = Shaper(up, down)
    port = await shaper.start("127.0.0.1", server.sockets[0].getsockname()[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent: list[float] = []
    found: list[float] = []

    async def receive() -> None:
        for i in range(FRAMES):
            await reader.readexactly(ANSWER)
            found.append((time.monotonic() - sent[i]) * 1e3)

    receiver = asyncio.create_task(receive())
    begin = time.monotonic()
    for i, size in enumerate(SIZES):
        await asyncio.sleep(max(0.0, begin + i * INTERVAL_S - time.monotonic()))
        sent.append(time.monotonic())
        writer.write(struct.pack("!I", size) + bytes(size))
    await asyncio.wait_for(receiver, 30)
    writer.close()
    probe.cancel()
    await shaper.close()
    server.close()
    return found


STEPS = Trace([(0, 3e6), (1_500 * MS, 1e6), (2_500 * MS, 4e6)], 4_000 * MS)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (LinkConfig(trace=constant(4e6), delay_ns=20 * MS), LinkConfig(trace=constant(10e6), delay_ns=20 * MS)),
        (LinkConfig(trace=STEPS, delay_ns=10 * MS), LinkConfig(trace=constant(10e6), delay_ns=10 * MS)),
    ],
    ids=["constant", "steps"],
)
async def test_shape_agrees_with_simulate(up: LinkConfig, down: LinkConfig) -> None:
    lags: list[float] = []
    expected, found = sorted(simulated(up, down)), sorted(await shaped(up, down, lags))
    assert len(found) == len(expected) == FRAMES
    for q in (0.5, 0.95):
        # 15 %, and what this machine adds just now to each of the four timers a round trip passes
        allowed = 0.15 * quantile(expected, q) + 4 * quantile(sorted(lags), q)
        assert abs(quantile(found, q) - quantile(expected, q)) <= allowed


async def test_loss_shows_as_delay_never_as_damage() -> None:
    lossy = LossModel(loss=0.05)
    up = LinkConfig(trace=constant(8e6), delay_ns=10 * MS, loss=lossy)
    down = LinkConfig(trace=constant(8e6), delay_ns=10 * MS, loss=lossy)
    found, expected = sorted(await shaped(up, down)), sorted(simulated(up, down))
    assert len(found) == FRAMES, "every answer came, though one packet in twenty was lost"
    assert quantile(found, 0.95) > 1.5 * quantile(found, 0.1)
    assert 0.5 < quantile(found, 0.95) / quantile(expected, 0.95) < 2, "other coins, the same law"


async def test_a_target_that_is_away_closes_the_connection() -> None:
    shaper = Shaper(LinkConfig(), LinkConfig())
    port = await shaper.start("127.0.0.1", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await shaper.close()
