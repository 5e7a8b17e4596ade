"""A message as pieces, and the message again from enough of them. Pure: no clock, no socket."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protos.datagrams.parity import MAX_DATA, MAX_PARITY, parity, restore
from protos.errors import ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb

MAX_DATAGRAM_BYTES = 1150
"""QUIC packets of 1,200 bytes, which every path carries, hold so much; a larger datagram would block aioquic's queue for good."""

_ROOM_BYTES = 150  # a piece's own fields, the longest traceparent included
BODY_BYTES = MAX_DATAGRAM_BYTES - _ROOM_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A message in pieces.

    Attributes:
        bodies: data, then parity; all of one length.
        count: of data.
        whole_bytes: of the message.
    """

    bodies: tuple[bytes, ...]
    count: int
    whole_bytes: int

    def part(self, index: int) -> pb.Part:
        """What piece ``index`` says of itself."""
        return pb.Part(count=self.count, index=index, whole_bytes=self.whole_bytes)


def pieces_of(n_bytes: int) -> int:
    """How many pieces of data a message of this many bytes is; more than ``parity.MAX_DATA``: it is no message for datagrams."""
    return max(1, -(-n_bytes // BODY_BYTES))


def cut(message: bytes, extra: int) -> Cut:
    """Cuts a message and adds parity.

    Args:
        message: at most ``MAX_DATA`` bodies long.
        extra: pieces of parity.

    Raises:
        ValueError: it is longer.
    """
    count = pieces_of(len(message))
    if count > MAX_DATA:
        raise ValueError(f"a message of {len(message)} bytes is too long for datagrams")
    size = max(1, -(-len(message) // count))
    data = np.frombuffer(message.ljust(count * size, b"\0"), np.uint8).reshape(count, size)
    bodies = [row.tobytes() for row in data] + [row.tobytes() for row in parity(data, min(extra, MAX_PARITY))]
    return Cut(bodies=tuple(bodies), count=count, whole_bytes=len(message))


class Gathered:
    """The pieces of one message that arrived.

    Args:
        part: what the first of them says.
        most_bytes: that the message may have.

    Raises:
        ProtocolError: there is no such message.
    """

    __slots__ = ("_count", "_pieces", "_size", "_whole_bytes")

    def __init__(self, part: pb.Part, most_bytes: int) -> None:
        if not 1 <= part.count <= MAX_DATA or part.whole_bytes > most_bytes:
            raise ProtocolError(f"a message of {part.whole_bytes} bytes in {part.count} pieces is not possible")
        self._count, self._whole_bytes = part.count, part.whole_bytes
        self._size = max(1, -(-part.whole_bytes // part.count))
        self._pieces: dict[int, bytes] = {}

    @property
    def held_bytes(self) -> int:
        """Of all pieces held."""
        return len(self._pieces) * self._size

    def add(self, part: pb.Part, body: bytes) -> bytes | None:
        """Takes a piece; the message, where it is the last that was needed. One held already changes nothing.

        Raises:
            ProtocolError: it is no piece of this message.
        """
        if (part.count, part.whole_bytes) != (self._count, self._whole_bytes) or len(body) != self._size:
            raise ProtocolError("a piece belongs to another message than the pieces before it")
        if part.index >= self._count + MAX_PARITY:
            raise ProtocolError(f"piece {part.index} of {self._count} is not possible")
        if part.index in self._pieces or len(self._pieces) >= self._count:
            return None
        self._pieces[part.index] = body
        whole = restore(self._pieces, self._count)
        return whole[: self._whole_bytes] if whole is not None else None


def read_piece(data: bytes) -> pb.Piece:
    """A datagram as a message of the schema.

    Raises:
        ProtocolError: it is none.
    """
    from google.protobuf.message import DecodeError

    try:
        return pb.Piece.FromString(data)
    except DecodeError as error:
        raise ProtocolError("a datagram holds bytes that are no piece") from error
