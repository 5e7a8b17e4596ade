"""Messages as datagrams: pieces and parity over a lossy link, nothing sent twice, nothing waiting for what is missing.

Cutting, parity and what is believed of the losses are the client's own (``protos.datagrams``); the congestion controller is not
modelled: what keeps the link from filling is the policy's credit window, as on the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

from deploy.testbed.link.loop import Loop
from deploy.testbed.link.model import LOST, Link
from deploy.testbed.link.path import Pipe
from edge_client.transport.choice import LaneChoice, probe_after_s
from protos.datagrams.loss import PIECE_BYTES, Losses, Redundancy
from protos.datagrams.parity import MAX_DATA
from protos.datagrams.pieces import pieces_of

_PROBE_BYTES = 60
TRANSPORTS = ("grpc", "quic", "auto")


class Datagrams:
    """One direction of a datagram path over a link."""

    __slots__ = ("_link", "_loop", "_number", "_reverse_ns", "bytes_sent", "losses", "most_bytes")

    def __init__(self, loop: Loop, forward: Link, *, reverse_delay_ns: int) -> None:
        self._loop, self._link, self._reverse_ns = loop, forward, reverse_delay_ns
        self._number = 0
        self.bytes_sent = 0
        self.losses = Losses()
        self.most_bytes = inf  # that a message should cost, parity included

    def send(self, n_bytes: int, handler: Callable[[Any], None], argument: Any) -> None:
        """Sends a message now; ``handler(argument)`` runs once enough of it is there, or never."""
        count = pieces_of(n_bytes)
        size = -(-n_bytes // count) + PIECE_BYTES
        extra = Redundancy.of(self.losses.channel()).parity(count, size, self.most_bytes)
        arrivals = sorted(at for at in (self._piece(size) for _ in range(count + extra)) if at != LOST)
        if len(arrivals) >= count:
            self._loop.at(arrivals[count - 1], handler, argument)

    def probe(self) -> None:
        """A piece that says nothing, to learn of the path's losses."""
        self._piece(_PROBE_BYTES)

    def _piece(self, n_bytes: int) -> int:
        """Puts a piece on the link; its fate is known a round trip later."""
        now_ns = self._loop.now_ns
        arrival_ns = self._link.send(n_bytes, now_ns)
        self.bytes_sent += n_bytes
        lost = arrival_ns == LOST
        known_ns = (now_ns + self._link.delay_ns if lost else arrival_ns) + self._reverse_ns
        self._loop.at(known_ns, self._learn, (self._number, lost))
        self._number += 1
        return arrival_ns

    def _learn(self, fate: tuple[int, bool]) -> None:
        self.losses.add(fate[0], lost=fate[1])


class TwoWays:
    """One direction with both transports: what a message goes by is chosen when it is sent, by the client's own rule.

    Args:
        loop: virtual time.
        stream: the TCP connection.
        datagrams: the other one.
        always: datagrams whenever a message is not too long for them; else only where the path loses packets.
        until_ns: when probing ends.
        after: the other direction, which chooses: answers go back the way their frames came.
    """

    __slots__ = ("_after", "_choice", "_loop", "_until_ns", "datagrams", "stream")

    def __init__(
        self, loop: Loop, stream: Pipe, datagrams: Datagrams, *, always: bool, until_ns: int, after: TwoWays | None = None
    ) -> None:
        self._loop, self.stream, self.datagrams = loop, stream, datagrams
        self._choice, self._after, self._until_ns = LaneChoice(always=always), after, until_ns
        if not always and after is None:
            loop.at(0, self._probe)

    @property
    def unreliable(self) -> bool:
        """Whether what is sent now may never arrive."""
        if self._after is not None:
            return self._after.unreliable
        losses = self.datagrams.losses
        return self._choice.beside(losses.seen, losses.counted, self._loop.now_ns)

    @property
    def lost(self) -> tuple[float, float] | None:
        """See ``Path``."""
        return self.datagrams.losses.channel() if self.unreliable else None

    def allow(self, n_bytes: float) -> None:
        """See ``Path``."""
        self.datagrams.most_bytes = n_bytes

    def send(self, n_bytes: int, handler: Callable[[Any], None], argument: Any) -> None:
        """Sends a message now."""
        way = self.datagrams if pieces_of(n_bytes) <= MAX_DATA and self.unreliable else self.stream
        way.send(n_bytes, handler, argument)

    def _probe(self, _: object) -> None:
        if not self.unreliable:
            self.datagrams.probe()
        losses = self.datagrams.losses
        if self._loop.now_ns < self._until_ns:
            self._loop.at(self._loop.now_ns + int(probe_after_s(losses.seen, losses.counted) * 1e9), self._probe)
