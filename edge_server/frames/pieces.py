"""From datagrams' pieces to frames: a frame runs when it is whole, or with the layers that are there at the last moment.

Pieces come in any order, twice, or never; those of several frames may be mixed. Pure: time comes in as an argument.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from dataclasses import dataclass, field

from edge_server.frames.assembly import ArrivedFrame, deadline_of, frame_of
from protos.datagrams.parity import MAX_DATA
from protos.datagrams.pieces import BODY_BYTES, Gathered
from protos.errors import HeadtailError, ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import MAX_LAYERS, FrameLayer

MAX_LAYER_BYTES = MAX_DATA * BODY_BYTES
_MAX_PARTIAL = 4  # frames in the making; the oldest runs, or is forgotten, for a fifth
_REMEMBERED = 512  # frames that ran, by id: what still comes of them is ignored, and what is older than all of them


@dataclass(slots=True)
class _Partial:
    begun_ns: int
    last_ns: int
    layer_count: int
    deadline_ns: int | None = None
    whole: dict[int, FrameLayer] = field(default_factory=dict)
    parts: dict[int, Gathered] = field(default_factory=dict)
    said: pb.FrameLayer | None = None  # of a frame in slices

    def frame(self) -> ArrivedFrame | None:
        """With the gapless prefix of layers that is there; None: its base is not."""
        layers: list[FrameLayer] = []
        if self.said is not None and not self.whole and (payload := self.parts[0].with_holes()) is not None:
            part = _layer(self.said, payload, zlib.crc32(payload))
            return frame_of([part], self.begun_ns, self.last_ns, self.deadline_ns)
        while (layer := self.whole.get(len(layers))) is not None:
            layers.append(layer)
        return frame_of(layers, self.begun_ns, self.last_ns, self.deadline_ns) if layers else None


class Gatherer:
    """One session's frames in pieces.

    Args:
        wait_ns: how long a frame without deadline waits for its missing pieces.
    """

    def __init__(self, *, wait_ns: int) -> None:
        self._wait_ns = wait_ns
        self._partial: OrderedDict[int, _Partial] = OrderedDict()
        self._done: OrderedDict[int, None] = OrderedDict()
        self.refused = 0  # pieces that belonged to nothing

    @property
    def partial(self) -> int:
        """Frames in the making."""
        return len(self._partial)

    def add(self, piece: pb.FramePiece, now_ns: int, waited_ns: int = 0) -> list[ArrivedFrame]:
        """Takes a piece; returns the frames that are ready because of it, oldest first. One that is no good is ignored.

        Args:
            piece: as it came.
            now_ns: when it was read.
            waited_ns: how much longer it was on its way than the fastest lately.
        """
        said = piece.layer
        if said.frame_id in self._done or said.frame_id < min(self._done, default=0):
            return []
        if not 1 <= said.layer_count <= MAX_LAYERS or said.layer >= said.layer_count:
            self.refused += 1
            return []
        partial = self._partial.get(said.frame_id)
        if partial is None:
            partial = _Partial(begun_ns=now_ns, last_ns=now_ns, layer_count=said.layer_count)
        try:
            self._take(partial, piece, now_ns, waited_ns)
        except HeadtailError:
            self.refused += 1
            return []
        self._partial[said.frame_id] = partial
        if len(partial.whole) == partial.layer_count:
            return self._run(said.frame_id)
        return self._run(next(iter(self._partial))) if len(self._partial) > _MAX_PARTIAL else []

    def _take(self, partial: _Partial, piece: pb.FramePiece, now_ns: int, waited_ns: int) -> None:
        said, number = piece.layer, piece.layer.layer
        if said.layer_count != partial.layer_count:
            raise ProtocolError("a piece says another number of layers than the pieces before it")
        if number in partial.whole:
            return
        if said.slices and (said.slices != piece.part.count or said.layer_count != 1):
            raise ProtocolError("a frame in slices has a piece for each")
        gathered = partial.parts.get(number) or Gathered(piece.part, MAX_LAYER_BYTES)
        whole = gathered.add(piece.part, said.payload)
        partial.parts[number] = gathered
        partial.last_ns = now_ns
        if said.slices:
            partial.said = said
        layer = _layer(said, b"", zlib.crc32(b"")) if whole is None else _layer(said, whole, said.payload_crc32)
        if whole is not None:
            del partial.parts[number]
            partial.whole[number] = layer
        later_ns = deadline_of(layer, now_ns, waited_ns)
        if later_ns is not None:
            partial.deadline_ns = later_ns if partial.deadline_ns is None else min(partial.deadline_ns, later_ns)

    def due_ns(self, tail_ns: int) -> int | None:
        """When the next frame must run although pieces are missing; None: none waits.

        Args:
            tail_ns: what decoding and the tail need before the deadline.
        """
        return min((self._due_ns(partial, tail_ns) for partial in self._partial.values()), default=None)

    def _due_ns(self, partial: _Partial, tail_ns: int) -> int:
        latest_ns = partial.begun_ns + self._wait_ns
        return latest_ns if partial.deadline_ns is None else max(partial.begun_ns, min(latest_ns, partial.deadline_ns - tail_ns))

    def overdue(self, now_ns: int, tail_ns: int) -> list[ArrivedFrame]:
        """The frames whose last moment is now, as far as they arrived."""
        due = [frame_id for frame_id, partial in self._partial.items() if self._due_ns(partial, tail_ns) <= now_ns]
        return [frame for frame_id in due for frame in self._run(frame_id)]

    def flush(self) -> list[ArrivedFrame]:
        """All frames that wait, as far as they arrived."""
        return [frame for frame_id in list(self._partial) for frame in self._run(frame_id)]

    def _run(self, frame_id: int) -> list[ArrivedFrame]:
        frame = self._partial.pop(frame_id).frame()
        self._done[frame_id] = None
        while len(self._done) > _REMEMBERED:
            del self._done[min(self._done)]
        return [frame] if frame is not None else []


def _layer(said: pb.FrameLayer, payload: bytes, crc32: int) -> FrameLayer:
    """What a piece says of its layer, with a payload and its checksum, read and checked."""
    message = pb.FrameLayer()
    message.CopyFrom(said)
    message.payload, message.payload_crc32 = payload, crc32
    return FrameLayer.from_proto(message, max_payload_bytes=MAX_LAYER_BYTES)
