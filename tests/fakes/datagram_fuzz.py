"""Hostile datagrams: what a stranger can send to the UDP port, and what a client that was let in can put into its pieces."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from aioquic.quic.connection import QuicConnection

from edge_server.config import Limits
from edge_server.doors.quic import QuicDoor
from edge_server.frames.assembly import ArrivedFrame
from edge_server.frames.pieces import Gatherer
from protos.datagrams import congestion
from protos.datagrams.channel import configuration
from protos.datagrams.pieces import cut, read_piece
from protos.errors import ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Bits turned, bytes replaced, cut off, put in twice, or nothing of it."""
    kind = dice.randrange(6)
    if kind == 0 or not data:
        return dice.randbytes(dice.randrange(1300))
    at = dice.randrange(len(data))
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[dice.randrange(len(data)) :]
    out = bytearray(data)
    for _ in range(dice.randrange(1, 9)):
        where = dice.randrange(len(out))
        out[where] = out[where] ^ 1 << dice.randrange(8) if kind == 3 else dice.randrange(256)
    return bytes(out)


class Strangers:
    """Packets of handshakes, true and altered, from many addresses, to a door that listens.

    Attributes:
        answered_bytes, sent_bytes: what the door sent to whom it does not know, and what it got.
    """

    def __init__(self, door: QuicDoor, seed: int = 0) -> None:
        self.door, self._dice = door, random.Random(seed)
        self.answered_bytes = self.sent_bytes = 0
        self._packets: list[bytes] = []
        for _ in range(20):
            connection = QuicConnection(configuration=configuration(is_client=True))
            congestion.latest()
            connection.connect(("127.0.0.1", 1), now=0.0)
            self._packets += [data for data, _ in connection.datagrams_to_send(now=0.0)]
        listener = door.listener
        assert listener is not None
        self._listener = listener
        transport = listener._transport
        listener.connection_made(self)  # type: ignore[arg-type]  # what it sends is counted
        self._transport = transport

    def sendto(self, data: bytes, addr: Any = None) -> None:
        self.answered_bytes += len(data)

    def close(self) -> None:
        self._listener.connection_made(self._transport)

    def send(self) -> None:
        """One packet: as it was, replayed, or altered."""
        packet = self._dice.choice(self._packets)
        data = packet if self._dice.random() < 0.3 else mutated(packet, self._dice)
        addr = (f"10.{self._dice.randrange(256)}.{self._dice.randrange(256)}.1", self._dice.randrange(1, 65536))
        self.sent_bytes += len(data)
        self._listener.datagram_received(data, addr)


class Insider:
    """Pieces of true frames, altered, mixed and replayed, to one session's gatherer."""

    def __init__(self, seed: int = 0) -> None:
        self._dice = random.Random(seed)
        self.gatherer = Gatherer(wait_ns=10**9)
        self.fates: Counter[str] = Counter()
        self.wrong: list[int] = []  # frames with other bytes than were sent
        self._true: set[bytes] = set()
        self._pieces: list[bytes] = []
        self._now_ns = 0
        self._next = 0

    def _frame(self) -> None:
        dice, frame_id = self._dice, self._next
        self._next += 1
        payloads = tuple(dice.randbytes(dice.randrange(1, 2500)) for _ in range(dice.randrange(1, 4)))
        self._true.update(payloads)
        for number, payload in enumerate(payloads):
            layer = FrameLayer(
                frame_id=frame_id, layer=number, layer_count=len(payloads), source_width_px=9, source_height_px=9,
                payload=payload, deadline_remaining_ns=10**8,
            )  # fmt: skip
            whole = cut(payload, dice.randrange(3))
            for index, body in enumerate(whole.bodies):
                said = layer.to_proto()
                said.payload = body
                piece = pb.Piece(frame=pb.FramePiece(layer=said, part=whole.part(index)))
                self._pieces.append(piece.SerializeToString())
        del self._pieces[:-60]

    def send(self) -> None:
        """One datagram."""
        dice = self._dice
        if dice.random() < 0.1:
            self._frame()
        if not self._pieces:
            return
        data = dice.choice(self._pieces)
        data = data if dice.random() < 0.3 else mutated(data, dice)
        self._now_ns += 1_000_000
        try:
            piece = read_piece(data)
        except ProtocolError:
            self.fates["no piece"] += 1
            return
        if piece.WhichOneof("content") != "frame":
            self.fates["another"] += 1
            return
        self.fates["piece"] += 1
        self._check(self.gatherer.add(piece.frame, self._now_ns))
        self._check(self.gatherer.overdue(self._now_ns, 0))

    def _check(self, frames: list[ArrivedFrame]) -> None:
        for frame in frames:
            self.fates["frame"] += 1
            if not self._true.issuperset(frame.layers):
                self.wrong.append(frame.frame_id)


async def attack(count: int, *, seed: int = 0, told: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Half of the datagrams from strangers, half from an insider; what came of them."""
    door = QuicDoor(Limits(max_connections=1 << 20))
    await door.open("127.0.0.1", 0)
    strangers, insider = Strangers(door, seed), Insider(seed)
    try:
        for number in range(count // 2):
            strangers.send()
            insider.send()
            if number % 1000 == 0:
                await asyncio.sleep(0)
                if told is not None:
                    told(2 * number)
        connections = door.connections
    finally:
        strangers.close()
        door.close()
    return {
        "datagrams": 2 * (count // 2), "connections": connections, "wrong_frames": len(insider.wrong), **insider.fates,
        "amplification": round(strangers.answered_bytes / max(1, strangers.sent_bytes), 3),
        "frames_held": insider.gatherer.partial,
    }  # fmt: skip
