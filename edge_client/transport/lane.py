"""Frames as datagrams beside the stream: opened with the ticket that the stream brought, used while it delivers.

While nothing tells that the path is open, while what left it stays unanswered, and for whatever has no deadline, frames go by the
stream; so a blocked UDP port costs no frame that would not have been late anyway. A blocked path is tried again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from aioquic.quic.connection import QuicConnection
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from edge_client.frames import NS_PER_MS, NS_PER_S, Clock
from edge_client.transport.base import Gate, SessionEvents
from edge_client.transport.choice import probe_after_s
from protos.datagrams.channel import Channel, Item, client_configuration
from protos.datagrams.loss import GOAL, PIECE_BYTES, Redundancy
from protos.datagrams.parity import MAX_DATA
from protos.datagrams.pieces import BODY_BYTES, Cut, Gathered, cut, pieces_of, read_piece
from protos.errors import ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import MAX_ANSWER_BYTES, FrameLayer, PayloadKind

log = logging.getLogger(__name__)

_TRY_AGAIN_S = (2.0, 30.0)  # first and longest wait
_OPEN_S = 5.0  # a handshake, its address validation and the ticket's acceptance
_GRACE_NS = 100 * NS_PER_MS  # beyond a frame's deadline: then no answer will come
_PROBE_S, _BLOCKED_PROBE_S = 0.1, 0.03
_SILENT_RTTS, _SILENT_S = 2.0, 0.05
_UNLIKELY = 3e-4  # that so long a silence is chance
_FURTHER_GOAL = 0.95  # that each layer but the base arrives
_MOST_RATIO = 0.5  # of the time to the deadline, for a frame to leave


@dataclass(slots=True)
class _Awaited:
    timer: asyncio.TimerHandle
    result: Gathered | None = None


@dataclass(slots=True)
class _Leaving:
    """A frame whose pieces are leaving."""

    frame_id: int
    sizes: list[int]  # of each layer, bytes
    begun: set[int] = field(default_factory=set)
    left: int = 0  # pieces of the base that may still leave


class Lane:
    """The client's end.

    Args:
        server: host and port of the stream.
        events: told what becomes of frames.
        on_result: told each answer.
        clock: monotonic ns.

    Attributes:
        idle: frames go by the stream for now, though they could go this way.
        least_rtt_ns: of the stream; None: not known.
    """

    def __init__(
        self, server: tuple[str, int], events: SessionEvents, on_result: Callable[[pb.Result], None], *, clock: Clock
    ) -> None:
        self._server, self._events, self._on_result, self._clock = server, events, on_result, clock
        self._channel: Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._awaited: dict[int, _Awaited] = {}
        self._silent_since_s: float | None = None  # the first packet that nothing was heard since
        self._heard_s = self._sent_at_heard = 0.0
        self._blocked = False
        self.idle = False
        self.least_rtt_ns: int | None = None

    # ------------------------------------------------------------------ the connection

    def open(self, offer: pb.DatagramOffer) -> None:
        """A session stands: its offer is taken up, again and again while it lasts."""
        self.close()
        self._task = asyncio.create_task(self._hold(offer))

    def close(self) -> None:
        """The session is over; frames that have no answer are the session's loss."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._leave()
        for awaited in self._awaited.values():
            awaited.timer.cancel()
        self._awaited.clear()

    @property
    def open_now(self) -> bool:
        """Whether frames can go this way."""
        return self._channel is not None and not self._blocked

    @property
    def loss(self) -> float:
        """The share of packets lost lately."""
        return self._channel.control.losses.seen if self._channel is not None else 0.0

    @property
    def counted(self) -> int:
        """Of how many packets."""
        return self._channel.control.losses.counted if self._channel is not None else 0

    @property
    def lost(self) -> tuple[float, float] | None:
        """How the path loses packets, rounded: the share and the mean run of losses."""
        if self._channel is None:
            return None
        redundancy = Redundancy.of(self._channel.control.losses.channel())
        return redundancy.share, redundancy.run

    def heard_within(self, seconds: float) -> bool:
        """Whether the server was heard on this path so lately."""
        return self._channel is not None and asyncio.get_running_loop().time() - self._channel.control.heard_s < seconds

    def _address(self, offer: pb.DatagramOffer) -> tuple[str, int]:
        return self._server[0], offer.port or self._server[1]

    async def _hold(self, offer: pb.DatagramOffer) -> None:
        wait_s, longest_s = _TRY_AGAIN_S
        while True:
            try:
                await self._stand(offer)
                wait_s = _TRY_AGAIN_S[0]
            except (OSError, ValueError, TimeoutError) as error:
                log.info("no datagrams to %s:%d (%s); frames go by the stream", *self._address(offer), _told(error))
            self._leave()
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, longest_s)

    async def _stand(self, offer: pb.DatagramOffer) -> None:
        """Connects, and returns when the connection is over."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        accepted = asyncio.Event()
        pem = x509.load_der_x509_certificate(offer.certificate_der).public_bytes(serialization.Encoding.PEM)
        infos = await loop.getaddrinfo(*self._address(offer), type=socket.SOCK_DGRAM)
        family, address = infos[0][0], infos[0][4]
        quic = QuicConnection(configuration=client_configuration(pem))
        any_address = ("::", 0) if family == socket.AF_INET6 else ("0.0.0.0", 0)  # noqa: S104 - a client's own end
        transport, channel = await loop.create_datagram_endpoint(lambda: Channel(quic), local_addr=any_address, family=family)

        def on_stream(stream_id: int, data: bytes, end: bool) -> None:
            del stream_id, end
            if data:
                accepted.set()

        def on_end() -> None:
            ended.set()
            accepted.set()

        channel.on_stream, channel.on_end, channel.on_datagram = on_stream, on_end, self._on_datagram
        channel.on_ready = partial(channel.say, offer.ticket)
        try:
            async with asyncio.timeout(_OPEN_S):
                channel.connect(address)
                await accepted.wait()
            if ended.is_set():
                raise ConnectionRefusedError("the server closed the connection")
            log.info("datagrams to %s:%d", *self._address(offer))
            await self._attend(channel, ended)
        finally:
            channel.on_end = channel.on_datagram = _nothing
            channel.close()
            transport.close()

    async def _attend(self, channel: Channel, ended: asyncio.Event) -> None:
        """Frames can go this way from now on; says something now and then, so that it is known whether they still can."""
        self._enter(channel)
        while not ended.is_set():
            self._watch()
            usual_s = probe_after_s(self.loss, self.counted) if self.idle else _PROBE_S
            try:
                async with asyncio.timeout(_BLOCKED_PROBE_S if self._blocked else usual_s):
                    await ended.wait()
            except TimeoutError:
                channel.probe()

    def _enter(self, channel: Channel) -> None:
        self._channel = channel
        self._silent_since_s = None
        self._heard_s, self._sent_at_heard = channel.control.heard_s, channel.control.sent
        self._blocked = False

    def _leave(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.clear()

    def _watch(self) -> None:
        """Whether what left stays unanswered for longer than loss explains."""
        channel = self._channel
        if channel is None:
            return
        control, now_s = channel.control, asyncio.get_running_loop().time()
        if control.heard_s != self._heard_s:
            self._heard_s, self._sent_at_heard, self._silent_since_s = control.heard_s, control.sent, None
            if self._blocked:
                log.info("datagrams arrive again")
            self._blocked = False
            return
        unheard = control.sent - self._sent_at_heard
        if unheard <= 0:
            return
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        share, _ = control.losses.channel()
        chance = (1 - (1 - share) ** 2) ** (unheard / 2)
        if not self._blocked and now_s - self._silent_since_s > _SILENT_RTTS * control.rtt_s + _SILENT_S and chance < _UNLIKELY:
            log.warning("datagrams stay unanswered; frames go by the stream until they arrive again")
            self._blocked = True
            channel.clear()

    # ------------------------------------------------------------------ frames out

    def takes(self, layers: list[FrameLayer], deadline_ns: int | None) -> bool:
        """Whether a frame may go this way: nothing that must arrive, that waits for ever, or that is too large."""
        self._watch()
        if not self.open_now or deadline_ns is None or layers[0].kind not in (PayloadKind.LATENT, PayloadKind.IMAGE):
            return False
        return all(
            len(layer.payload) <= layer.slices * BODY_BYTES if layer.slices else pieces_of(len(layer.payload)) <= MAX_DATA
            for layer in layers
        )

    def send(self, layers: list[FrameLayer], deadline_ns: int, gate: Gate | None) -> None:
        """Sends a frame; what an older one still had to say is dropped.

        Args:
            layers: base first, with their ids.
            deadline_ns: on our clock.
            gate: asked before each layer; a refused one ends the frame.
        """
        channel, now_ns, frame_id = self._channel, self._clock(), layers[0].frame_id
        if channel is None:
            raise RuntimeError("the lane is not open")
        channel.clear()
        allowed: list[FrameLayer] = []
        for layer in layers:
            if now_ns >= deadline_ns or (gate is not None and not gate(layer.layer, len(layer.payload))):
                break
            allowed.append(layer)
        if not allowed:
            self._events.on_unsent(frame_id)
            return
        loop = asyncio.get_running_loop()
        until_s = loop.time() + (deadline_ns - now_ns) / NS_PER_S
        cuts = self._cuts(channel, allowed, deadline_ns - now_ns)
        leaving = _Leaving(frame_id, [len(layer.payload) for layer in allowed], left=len(cuts[0].bodies))
        timer = loop.call_later((deadline_ns + _GRACE_NS - now_ns) / NS_PER_S, self._expired, frame_id)
        self._awaited[frame_id] = _Awaited(timer)
        there_ns = max(1, deadline_ns - now_ns - (self.least_rtt_ns or 0))
        items = []
        # One piece of each layer after the other: a burst of losses then meets few of any one layer.
        for turn in range(max(len(each.bodies) for each in cuts)):
            for layer, each in zip(allowed, cuts, strict=True):
                if turn < len(each.bodies):
                    said = replace(layer, sent_ns=now_ns, deadline_remaining_ns=there_ns).to_proto()
                    said.payload = each.bodies[turn]
                    data = pb.Piece(frame=pb.FramePiece(layer=said, part=each.part(turn))).SerializeToString()
                    items.append(Item(data, until_s, self._on_out(leaving, layer.layer)))
        channel.offer(items)

    def _cuts(self, channel: Channel, layers: list[FrameLayer], left_ns: int) -> list[Cut]:
        """Pieces and parity of each layer: as much as the losses ask for, the policy grants and the time to the deadline allows."""
        redundancy = Redundancy.of(channel.control.losses.channel())
        granted_bytes = self._events.frame_bytes()
        most_bytes = channel.control.pace_bytes_per_s * _MOST_RATIO * left_ns / NS_PER_S
        spent = float(sum(len(layer.payload) for layer in layers))
        cuts = []
        for layer in layers:
            count = layer.slices or pieces_of(len(layer.payload))
            size = len(layer.payload) / count
            extra = redundancy.parity(count, size + PIECE_BYTES, granted_bytes, GOAL if layer.layer == 0 else _FURTHER_GOAL)
            allowed = max(0, min(extra, int((most_bytes - spent) / max(1.0, size))))
            spent += allowed * size
            granted_bytes -= (count + allowed) * (size + PIECE_BYTES)
            cuts.append(cut(layer.payload, allowed, layer.slices))
        return cuts

    def _on_out(self, leaving: _Leaving, layer: int) -> Callable[[bool], None]:
        def out(left: bool) -> None:
            if layer == 0:
                leaving.left -= 1
            if left and layer not in leaving.begun:
                leaving.begun.add(layer)
                self._events.on_sent(leaving.frame_id, layer, leaving.sizes[layer], self._clock())
            elif layer == 0 and leaving.left == 0 and 0 not in leaving.begun and self._forget(leaving.frame_id):
                self._events.on_unsent(leaving.frame_id)

        return out

    def _forget(self, frame_id: int) -> bool:
        awaited = self._awaited.pop(frame_id, None)
        if awaited is not None:
            awaited.timer.cancel()
        return awaited is not None

    def _expired(self, frame_id: int) -> None:
        if self._awaited.pop(frame_id, None) is not None:
            self._events.on_lost(frame_id, self._clock())

    # ------------------------------------------------------------------ answers in

    def _on_datagram(self, data: bytes) -> None:
        try:
            piece = read_piece(data)
            awaited = self._awaited.get(piece.result.frame_id)
            if awaited is None:
                return  # an answer's further copies, or one that nobody waits for
            if awaited.result is None:
                awaited.result = Gathered(piece.result.part, MAX_ANSWER_BYTES)
            whole = awaited.result.add(piece.result.part, piece.result.body)
            result = pb.Result.FromString(whole) if whole is not None else None
        except (ProtocolError, ValueError) as error:
            log.debug("a datagram was no good: %s", error)
            return
        if result is not None and result.frame_id == piece.result.frame_id:
            self._forget(result.frame_id)
            self._on_result(result)


def _told(error: Exception) -> str:
    return str(error) or ("no answer" if isinstance(error, TimeoutError) else "refused")


def _nothing(*_: Any) -> None:
    """Nobody listens any more."""
