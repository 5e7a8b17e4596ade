"""QUIC connections of ours over a link of the testbed, in virtual time: two channels, and no socket between them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aioquic.quic.connection import QuicConnection
from cryptography.hazmat.primitives import serialization

from deploy.testbed.link.model import LOST, Link
from edge_server.doors.quic import _certificate
from protos.datagrams.channel import Channel, client_configuration, configuration
from tests.fakes.client_loop import VirtualLoop

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
