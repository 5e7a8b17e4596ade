"""A QUIC connection that carries pieces: a queue one message deep before aioquic's, which has no expiry, and a pace.

Nothing is handed to aioquic beyond the window, so nothing waits there. What cannot leave before its deadline is dropped here, and
a newer frame takes the place of whatever of an older one has not left.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, DatagramFrameReceived, HandshakeCompleted, QuicEvent, StreamDataReceived

from protos.datagrams import congestion
from protos.datagrams.pieces import MAX_DATAGRAM_BYTES

logging.getLogger("quic").setLevel(logging.WARNING)  # aioquic's: every handshake is no news of ours

ALPN = "headtail"
SERVER_NAME = "headtail"
IDLE_S = 30.0
_FRAME_BYTES = 1 << 16  # what either side says it can take of one DATAGRAM; paths decide
_OVERHEAD_BYTES = 50  # a packet's own, around a datagram
_LEAST_GAP_S = 0.0005
_SEND_AHEAD_S = 0.001  # pieces due within this leave together: an event loop's timer is no finer


def configuration(*, is_client: bool) -> QuicConfiguration:
    """What both ends have in common."""
    return QuicConfiguration(
        is_client=is_client, alpn_protocols=[ALPN], congestion_control_algorithm=congestion.NAME, idle_timeout=IDLE_S,
        max_datagram_frame_size=_FRAME_BYTES, max_data=1 << 16, max_stream_data=1 << 12,
    )  # fmt: skip


def client_configuration(certificate_pem: bytes) -> QuicConfiguration:
    """A client's, which accepts this one certificate."""
    config = configuration(is_client=True)
    config.verify_mode, config.server_name, config.cadata = ssl.CERT_REQUIRED, SERVER_NAME, certificate_pem
    return config


@dataclass(slots=True)
class Item:
    """One piece that waits to leave.

    Attributes:
        data: at most ``MAX_DATAGRAM_BYTES``.
        until_s: on the loop's clock; later it is worthless.
        on_out: told whether it left (True) or was dropped.
    """

    data: bytes
    until_s: float
    on_out: Callable[[bool], None] | None = None


class Channel(QuicConnectionProtocol):
    """One connection, of either end; what arrives is told to three functions that its owner sets.

    Attributes:
        control: its window, and what is known of the path.
        on_datagram: told each datagram that arrived.
        on_stream: told each piece of a stream: its number, the bytes, whether it was the last.
        on_ready: told once that the handshake is complete.
        on_end: told once that the connection is over.
    """

    def __init__(self, quic: QuicConnection, stream_handler: Any = None) -> None:
        super().__init__(quic, stream_handler)
        self.control = congestion.latest()
        self.on_datagram: Callable[[bytes], None] = _ignored
        self.on_stream: Callable[[int, bytes, bool], None] = _ignored
        self.on_ready: Callable[[], None] = _ignored
        self.on_end: Callable[[], None] = _ignored
        self.ended = False
        self._items: deque[Item] = deque()
        self._timer_out: asyncio.TimerHandle | None = None
        self._next_s = 0.0

    # ------------------------------------------------------------------ in

    def quic_event_received(self, event: QuicEvent) -> None:
        """See aioquic."""
        if isinstance(event, DatagramFrameReceived):
            self.on_datagram(event.data)
        elif isinstance(event, StreamDataReceived):
            self.on_stream(event.stream_id, event.data, event.end_stream)
        elif isinstance(event, HandshakeCompleted):
            self.on_ready()
        elif isinstance(event, ConnectionTerminated) and not self.ended:
            self.ended = True
            self.clear()
            self.on_end()

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        """See aioquic; an acknowledgement may have made room."""
        super().datagram_received(data, addr)
        if self._items:
            self._pump()

    # ------------------------------------------------------------------ out

    def say(self, data: bytes, stream_id: int | None = None) -> None:
        """Sends bytes on a stream, and its end. Reliable: for what is said once a connection."""
        if stream_id is None:
            stream_id = self._quic.get_next_available_stream_id()
        self._quic.send_stream_data(stream_id, data, end_stream=True)
        self.transmit()

    def probe(self) -> None:
        """Sends a packet whose fate tells of the path."""
        if not self.ended:
            self._quic.send_ping(0)
            self.transmit()

    def offer(self, items: Iterable[Item]) -> None:
        """Queues pieces, in this order, behind those that wait.

        Raises:
            ValueError: one is larger than a datagram.
        """
        for item in items:
            if len(item.data) > MAX_DATAGRAM_BYTES:
                raise ValueError(f"a piece of {len(item.data)} bytes is larger than a datagram")
            self._items.append(item)
        self._pump()

    def offer_all(self, pieces: Iterable[bytes], *, within_s: float) -> None:
        """Queues pieces that are worthless after so long."""
        until_s = self._loop.time() + within_s
        self.offer([Item(data, until_s) for data in pieces])

    def clear(self) -> None:
        """Drops what waits."""
        items, self._items = list(self._items), deque()
        if self._timer_out is not None:
            self._timer_out.cancel()
            self._timer_out = None
        for item in items:
            if item.on_out is not None:
                item.on_out(False)

    @property
    def waiting(self) -> int:
        """Pieces that have not left."""
        return len(self._items)

    def _pump(self) -> None:
        loop, control = self._loop, self.control
        if self._timer_out is not None:
            self._timer_out.cancel()
            self._timer_out = None
        now_s = loop.time()
        self._next_s = max(self._next_s, now_s - _SEND_AHEAD_S)
        while self._items and not self.ended:
            item = self._items[0]
            if now_s > item.until_s:
                self._out(item, left=False)
                continue
            if self._next_s > now_s + _SEND_AHEAD_S:
                break
            size = len(item.data) + _OVERHEAD_BYTES
            if control.room_bytes(now_s) < size:
                self._next_s = now_s + min(0.01, size / control.pace_bytes_per_s)
                break
            self._next_s += max(_LEAST_GAP_S, size / control.pace_bytes_per_s)
            self._quic.send_datagram_frame(item.data)
            self._out(item, left=True)
            self.transmit()
        if self._items:
            self._timer_out = loop.call_later(max(0.0, self._next_s - now_s), self._pump)

    def _out(self, item: Item, *, left: bool) -> None:
        self._items.popleft()
        if item.on_out is not None:
            item.on_out(left)


def _ignored(*_: Any) -> None:
    """Nobody listens yet."""
