"""A session's second path: frames in pieces come in as datagrams, and their results go back the same way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from edge_server.backends import Backend
from edge_server.bandwidth.grants import BandwidthManager
from edge_server.config import Limits
from edge_server.frames.assembly import ArrivedFrame
from edge_server.frames.pieces import Gatherer
from protos.datagrams.loss import extra_for
from protos.datagrams.pieces import cut, pieces_of, read_piece
from protos.errors import ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb

if TYPE_CHECKING:
    from protos.datagrams.channel import Channel

MARGIN_NS = 5_000_000  # beside the tail's time, what a frame cut short still needs to arrive in time
_GOAL = 0.995  # that a result arrives
_MOST_PIECES = 8  # of a result; a larger one goes by the stream
_RESULT_S = 1.0  # longest a result waits for the window
_BAD_PIECES = 200  # of one connection, before it is closed


class Datagrams(Protocol):
    """Who lets sessions have a second path: the QUIC door."""

    @property
    def connections(self) -> int:
        """That are open, with or without a ticket."""
        ...

    def offer(self, path: DatagramPath) -> pb.DatagramOffer | None:
        """What the client needs to open it; good until withdrawn. None: there are none."""
        ...

    def withdraw(self, path: DatagramPath) -> None:
        """The session is over, and with it the offer."""


class DatagramPath:
    """What arrives of a session's frames, and results on their way back.

    Args:
        session_id: whose.
        on_frame: told each frame that is ready.
        door: where clients open it; None: nowhere.
        bandwidth: told of arrivals.
        backend: says how long a tail takes.
        limits: how long a frame without deadline waits.
        clock: monotonic ns.
    """

    def __init__(
        self,
        session_id: str,
        on_frame: Callable[[ArrivedFrame], None],
        door: Datagrams | None,
        *,
        bandwidth: BandwidthManager,
        backend: Backend,
        limits: Limits,
        clock: Callable[[], int],
    ) -> None:
        self._session_id, self._on_frame, self._door = session_id, on_frame, door
        self._bandwidth, self._backend, self._clock, self._wait_ns = bandwidth, backend, clock, limits.layer_wait_ns
        self._gatherer = Gatherer(wait_ns=self._wait_ns)
        self._channel: Channel | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._bad = 0
        self._frames: set[int] = set()  # that came this way and were not answered

    def offer(self, *, wanted: bool) -> pb.DatagramOffer | None:
        """What a client that says hello is told of it: it may open it, and counts its frames from 0."""
        self.flush()
        self._gatherer = Gatherer(wait_ns=self._wait_ns)
        return self._door.offer(self) if wanted and self._door is not None else None

    def attach(self, channel: Channel) -> None:
        """The client opened it, or opened it again; an older connection is closed."""
        old, self._channel = self._channel, channel
        channel.on_datagram = self._on_datagram
        self._bad = 0
        if old is not None and old is not channel:
            old.close()

    def close(self) -> None:
        """The session is over."""
        if self._door is not None:
            self._door.withdraw(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.on_datagram = lambda _: None
            channel.close()

    def flush(self) -> None:
        """Runs what waits for pieces, as far as it arrived."""
        self._begin(self._gatherer.flush())

    # ------------------------------------------------------------ in

    def _on_datagram(self, data: bytes) -> None:
        try:
            piece = read_piece(data)
            if piece.WhichOneof("content") != "frame":
                raise ProtocolError("only frames come to a server")
        except ProtocolError:
            self._count_bad()
            return
        now_ns, before = self._clock(), self._gatherer.refused
        said = piece.frame.layer
        self._bandwidth.on_layer(self._session_id, len(said.payload), said.sent_ns, now_ns)
        ready = self._gatherer.add(piece.frame, now_ns, self._bandwidth.queue_ns(self._session_id))
        if self._gatherer.refused > before:
            self._count_bad()
        self._begin(ready)
        self._set_timer(now_ns)

    def _count_bad(self) -> None:
        """One that is no piece is ignored: a stranger's cannot come here; who sends many is let go."""
        self._bad += 1
        if self._bad > _BAD_PIECES and self._channel is not None:
            self._channel.close()

    def _begin(self, frames: list[ArrivedFrame]) -> None:
        for frame in frames:
            self._frames.add(frame.frame_id)
            self._on_frame(frame)

    def _tail_ns(self) -> int:
        """What decoding and the tail need before a deadline."""
        return self._backend.load_now().tail_ns + MARGIN_NS

    def _set_timer(self, now_ns: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_ns = self._gatherer.due_ns(self._tail_ns())
        if due_ns is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0, due_ns - now_ns) / 1e9, self._overdue)

    def _overdue(self) -> None:
        now_ns = self._clock()
        self._timer = None
        self._begin(self._gatherer.overdue(now_ns, self._tail_ns()))
        self._set_timer(now_ns)

    # ------------------------------------------------------------ out

    def answers(self, result: pb.Result) -> bool:
        """Sends a result back the way its frame came; False: it came another way, or the result cannot go this one."""
        if result.frame_id not in self._frames:
            return False
        self._frames.discard(result.frame_id)
        channel, message = self._channel, result.SerializeToString()
        count = pieces_of(len(message))
        if channel is None or channel.ended or count > _MOST_PIECES:
            return False
        whole = cut(message, extra_for(count, channel.control.losses.channel(), _GOAL))
        pieces = [
            pb.Piece(result=pb.ResultPiece(frame_id=result.frame_id, body=body, part=whole.part(index)))
            for index, body in enumerate(whole.bodies)
        ]
        channel.offer_all([piece.SerializeToString() for piece in pieces], within_s=_RESULT_S)
        return True
