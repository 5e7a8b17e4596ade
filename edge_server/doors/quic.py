"""The QUIC door: a UDP port beside gRPC's, on which sessions that gRPC let in have a second path.

It lets nobody in by itself. A connection's first stream carries the ticket that a session was given on its gRPC stream; one that
does not is closed. The certificate is made at the start, and clients accept no other: they were told it on the same stream.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any

from aioquic.asyncio.server import QuicServer
from aioquic.quic.connection import QuicConnection
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_server.config import Limits
from edge_server.doors.datagrams import DatagramPath
from protos.datagrams.channel import SERVER_NAME, Channel, configuration
from protos.headtail.v1 import headtail_pb2 as pb

log = logging.getLogger(__name__)

TICKET_BYTES = 32
_ACCEPTED = b"\x01"
_LONG_HEADER = 0x80  # set in the first byte of every packet of a handshake, and of no other
_HANDSHAKES_PER_S = 64  # packets of handshakes from one address; the first costs a validation and no key exchange
_VALID_DAYS = 3650


class _Listener(QuicServer):
    """aioquic's server with a limit before anything is decrypted."""

    def __init__(self, limits: Limits, **settings: Any) -> None:
        super().__init__(**settings)
        self._limits = limits
        self._hosts: Counter[str] = Counter()
        self._all = 0
        self._second = 0

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        """See asyncio."""
        if data and isinstance(data, bytes) and data[0] & _LONG_HEADER and not self._admits(str(addr[0])):
            return
        super().datagram_received(data, addr)

    def _admits(self, host: str) -> bool:
        second = int(asyncio.get_running_loop().time())
        if second != self._second:
            self._hosts.clear()
            self._second, self._all = second, 0
        self._hosts[host] += 1
        self._all += 1
        return self._hosts[host] <= _HANDSHAKES_PER_S and self._all <= self._limits.max_connections


class QuicDoor:
    """Listens, and hands connections to the sessions whose tickets they bring.

    Args:
        limits: of connections, and how long one may take to bring its ticket.

    Attributes:
        listener: once it is open, who takes its datagrams.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._paths: dict[bytes, DatagramPath] = {}
        self._tickets: dict[DatagramPath, bytes] = {}
        self._channels: set[Channel] = set()
        self._transport: asyncio.DatagramTransport | None = None
        self.listener: _Listener | None = None
        self._certificate_der = b""
        self._other_port = 0

    async def open(self, host: str, port: int) -> None:
        """Listens; where the port cannot be had, sessions have no second path, and the log says so.

        Args:
            host: as gRPC's.
            port: UDP; 0: any.
        """
        config = configuration(is_client=False)
        config.certificate, config.private_key = _certificate()
        self._certificate_der = config.certificate.public_bytes(serialization.Encoding.DER)
        loop = asyncio.get_running_loop()

        def listener() -> _Listener:
            return _Listener(self._limits, configuration=config, create_protocol=self._accept, retry=True)

        try:
            self._transport, self.listener = await loop.create_datagram_endpoint(listener, local_addr=(host.strip("[]"), port))
        except OSError as error:
            log.warning("no datagrams: UDP port %d of %s cannot be had (%s)", port, host, error.strerror)
            return
        bound: int = self._transport.get_extra_info("sockname")[1]
        self._other_port = bound if bound != port else 0

    @property
    def connections(self) -> int:
        """That are open, with or without a ticket."""
        return len(self._channels)

    def close(self) -> None:
        """Closes every connection and the port."""
        for channel in list(self._channels):
            channel.close()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def offer(self, path: DatagramPath) -> pb.DatagramOffer | None:
        """See ``Datagrams``."""
        if self._transport is None:
            return None
        ticket = self._tickets.get(path)
        if ticket is None:
            ticket = self._tickets[path] = secrets.token_bytes(TICKET_BYTES)
            self._paths[ticket] = path
        return pb.DatagramOffer(ticket=ticket, certificate_der=self._certificate_der, port=self._other_port)

    def withdraw(self, path: DatagramPath) -> None:
        """See ``Datagrams``."""
        ticket = self._tickets.pop(path, None)
        if ticket is not None:
            del self._paths[ticket]

    def _accept(self, quic: QuicConnection, stream_handler: Any = None) -> Channel:
        channel = Channel(quic, stream_handler)
        guest = _Guest(channel, self._paths.get)
        patience = asyncio.get_running_loop().call_later(self._limits.hello_s, guest.give_up)
        self._channels.add(channel)

        def gone() -> None:
            patience.cancel()
            self._channels.discard(channel)

        channel.on_end = gone
        if len(self._channels) > self._limits.max_connections:
            guest.give_up()
        return channel


class _Guest:
    """A connection until it has brought its ticket."""

    def __init__(self, channel: Channel, find: Callable[[bytes], DatagramPath | None]) -> None:
        self._channel, self._find = channel, find
        self._said = b""
        self._let_in = False
        channel.on_stream = self._on_stream

    def _on_stream(self, stream_id: int, data: bytes, end: bool) -> None:
        if self._let_in:
            return
        self._said += data
        path = self._find(self._said) if end and stream_id == 0 else None
        if path is not None:
            self._let_in = True
            path.attach(self._channel)
            self._channel.say(_ACCEPTED, stream_id)
        elif end or stream_id != 0 or len(self._said) > TICKET_BYTES:
            self._channel.close(error_code=1, reason_phrase="no such ticket")

    def give_up(self) -> None:
        """Its time is up."""
        if not self._let_in:
            self._channel.close(error_code=1, reason_phrase="no ticket came")


def _certificate() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A fresh one, which vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER_NAME)])
    # Devices without a battery-backed clock believe that it is 1970: what they are told on the stream is good at any time.
    begin = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    end = dt.datetime.now(tz=dt.UTC) + dt.timedelta(days=_VALID_DAYS)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return made, key
