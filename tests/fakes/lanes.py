"""QUIC connections of ours over a link of the testbed, in virtual time: two channels, and no socket between them.

``answered`` puts the client's lane and the server's path on top of them: frames out, results back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from types import SimpleNamespace
from typing import Any, cast

from aioquic.quic.connection import QuicConnection
from cryptography.hazmat.primitives import serialization

from deploy.testbed.link.model import LOST, Link, LinkConfig
from edge_client.transport.base import SessionEvents
from edge_client.transport.lane import Lane
from edge_server.backends import Backend
from edge_server.bandwidth.grants import BandwidthManager
from edge_server.config import Limits
from edge_server.doors.datagrams import DatagramPath
from edge_server.doors.quic import _certificate
from edge_server.frames.assembly import ArrivedFrame
from protos.datagrams.channel import Channel, client_configuration, configuration
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer
from tests.fakes.client_loop import VirtualLoop, run_virtual

HEADERS_BYTES = 28  # of IP and UDP


class Wire(asyncio.DatagramTransport):
    """What one end sends into: ``link`` says when a datagram arrives at ``target``, or that it does not."""

    def __init__(self, loop: VirtualLoop, link: Link, addr: tuple[str, int]) -> None:
        super().__init__()
        self._loop, self.link, self._addr = loop, link, addr
        self.target: Callable[[bytes, Any], None] | None = None
        self.sent_bytes = self.arrived_bytes = 0
        self.delays_s: list[tuple[float, float]] = []  # when it was sent; how long it took
        self._closed = False

    def sendto(self, data: Any, addr: Any = None) -> None:
        """See asyncio."""
        del addr
        now_ns = self._loop.clock()
        self.sent_bytes += len(data)
        at_ns = self.link.send(len(data) + HEADERS_BYTES, now_ns)
        if at_ns != LOST and not self._closed:
            self.delays_s.append((now_ns / 1e9, (at_ns - now_ns) / 1e9))
            self._loop.call_at(at_ns / 1e9, self._arrive, bytes(data))

    def _arrive(self, data: bytes) -> None:
        self.arrived_bytes += len(data)
        if self.target is not None:
            self.target(data, self._addr)

    def close(self) -> None:
        """See asyncio."""
        self._closed = True


class Pair:
    """A client's channel and a server's, joined.

    Attributes:
        client, server: the two ends.
        up, down: what their datagrams travel.
    """

    def __init__(self, client: Channel, server: Channel, up: Wire, down: Wire) -> None:
        self.client, self.server, self.up, self.down = client, server, up, down

    def close(self) -> None:
        """Ends both, so that no timer is left."""
        for channel in (self.client, self.server):
            channel.close()
            if channel._timer is not None:
                channel._timer.cancel()
        self.up.close()
        self.down.close()


async def joined(loop: VirtualLoop, up: Link, down: Link, *, number: int = 0) -> Pair:
    """Two channels whose handshake is done; the links may be shared with others."""
    certificate, key = _certificate()
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    client = Channel(QuicConnection(configuration=client_configuration(pem)))
    config = configuration(is_client=False)
    config.certificate, config.private_key = certificate, key
    here, there = ("10.0.0.1", 1000 + number), ("10.0.0.2", 443)
    server: Channel | None = None
    ready = asyncio.Event()
    client.on_ready = ready.set
    out, back = Wire(loop, up, here), Wire(loop, down, there)

    def arrive(data: bytes, addr: Any) -> None:
        nonlocal server
        if server is None:
            quic = QuicConnection(
                configuration=config, original_destination_connection_id=client._quic.original_destination_connection_id
            )
            server = Channel(quic)
            server.connection_made(back)
        server.datagram_received(data, addr)

    out.target, back.target = arrive, client.datagram_received
    client.connection_made(out)
    client.connect(there)
    await ready.wait()
    assert server is not None
    return Pair(client, server, out, back)


def answered(config: LinkConfig, n_bytes: int, *, seed: int, seconds: float, deadline_s: float = 0.2) -> list[bool]:
    """Ten frames a second, of so many bytes, from when the link begins to lose: whether each was answered in time.

    The device takes 15 ms a frame and the server 12; both directions are alike. A frame that the lane does not take counts as
    not answered.
    """
    begin_s = config.loss_from_ns * 1e-9
    captured: dict[int, float] = {}
    answers: dict[int, float] = {}

    async def main(loop: VirtualLoop) -> None:
        pair = await joined(loop, Link(config, f"up/{seed}"), Link(config, f"down/{seed}"))

        def on_result(result: pb.Result) -> None:
            answers[result.frame_id] = loop.time()

        lane = Lane(("server", 1), cast("SessionEvents", _Unheard()), on_result, clock=loop.clock)
        lane.least_rtt_ns = 2 * config.delay_ns
        pair.client.on_datagram = lane._on_datagram
        ended = asyncio.Event()
        attending = asyncio.create_task(lane._attend(pair.client, ended))

        async def answer(frame: ArrivedFrame) -> None:
            await asyncio.sleep(0.012)
            path.answers(pb.Result(frame_id=frame.frame_id))

        tasks: set[asyncio.Task[None]] = set()
        backend = cast("Backend", SimpleNamespace(load_now=lambda: SimpleNamespace(tail_ns=12_000_000)))

        def on_frame(frame: ArrivedFrame) -> None:
            tasks.add(loop.create_task(answer(frame)))

        path = DatagramPath(
            "session", on_frame, None, bandwidth=BandwidthManager(), backend=backend, limits=Limits(), clock=loop.clock
        )
        path.attach(pair.server)
        for number in range(int((begin_s + seconds) * 10)):
            captured[number] = loop.time()
            await asyncio.sleep(0.015)
            layer = FrameLayer(frame_id=number, source_width_px=4, source_height_px=4, payload=b"\1" * n_bytes)
            deadline_ns = int((captured[number] + deadline_s) * 1e9)
            if lane.takes([layer], deadline_ns):
                lane.send([layer], deadline_ns, None)
            await asyncio.sleep(captured[number] + 0.1 - loop.time())
        await asyncio.sleep(deadline_s)
        ended.set()
        await attending
        lane.close()
        path.close()
        pair.close()

    run_virtual(main, limit_s=1e4, step_s=1e-6)
    return [answers.get(number, 1e9) <= at_s + deadline_s for number, at_s in captured.items() if at_s >= begin_s]


class _Unheard:
    """Nobody is told, and nobody bounds what a frame may cost."""

    def frame_bytes(self) -> float:
        return inf

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None
