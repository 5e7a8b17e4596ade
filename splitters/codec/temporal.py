"""Temporal prediction's bookkeeping: what the server holds, and what the client may refer to.

On a reliable stream a frame refers to the newest one sent: the stream delivers it before, or ends. Over anything else it refers
to the newest that the server has acknowledged, which is several frames older. Either way the payload's checksum starts from the
reference's symbols, so a frame whose reference the server does not hold exactly is refused (`PayloadError`) and never drifts;
the client then forgets that reference and all frames predicted from it, and continues from an older one or with a key frame.
Both classes are pure state: no clock, no I/O, one session each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from splitters.codec.base import LatentCodec
from splitters.codec.symbols import Symbols

HISTORY_FRAMES = 32


class ReferenceStore(Mapping[int, Symbols]):
    """The server's decoded symbols of one session, bounded in frames and bytes, oldest forgotten first.

    Pass it to `LatentCodec.decode` as ``references``, and add what came out.
    """

    def __init__(self, max_frames: int = HISTORY_FRAMES, max_bytes: int = 16 * 2**20) -> None:
        if max_frames < 1 or max_bytes < 1:
            raise ValueError("a reference store holds at least one frame and one byte")
        self._max_frames, self._max_bytes = max_frames, max_bytes
        self._frames: OrderedDict[int, Symbols] = OrderedDict()
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of symbols held."""
        return self._bytes

    def add(self, frame_id: int, symbols: Symbols) -> None:
        """Remembers a frame's symbols; more layers of a frame that is held replace the fewer."""
        self._drop(frame_id)
        self._frames[frame_id] = symbols
        self._bytes += _size(symbols)
        while len(self._frames) > self._max_frames or (self._bytes > self._max_bytes and len(self._frames) > 1):
            self._drop(next(iter(self._frames)))

    def clear(self) -> None:
        """Forgets everything: a new bundle or a new session."""
        self._frames.clear()
        self._bytes = 0

    def _drop(self, frame_id: int) -> None:
        gone = self._frames.pop(frame_id, None)
        if gone is not None:
            self._bytes -= _size(gone)

    def __getitem__(self, frame_id: int) -> Symbols:
        return self._frames[frame_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self._frames)

    def __len__(self) -> int:
        return len(self._frames)


@dataclass(slots=True)
class _Sent:
    symbols: Symbols
    reference: int | None
    delivered: bool


class Predictor:
    """The client's choice of reference.

    Args:
        codec: the bundle's.
        max_frames: how many frames the server remembers; a reference this many frames back is not used.
        key_interval_frames: a key frame at least so often, 0: only when needed.
        reliable: whether what is sent arrives, in order, or the session ends; else only acknowledged frames are referred to.

    Attributes:
        reliable: may change while frames are on their way; each is taken for what it was when it was sent.
    """

    def __init__(
        self, codec: LatentCodec, *, max_frames: int = HISTORY_FRAMES, key_interval_frames: int = 0, reliable: bool = False
    ) -> None:
        if max_frames < 1 or key_interval_frames < 0:
            raise ValueError("max_frames is at least 1, key_interval_frames at least 0")
        self._codec = codec
        self._max_frames, self._key_interval_frames, self.reliable = max_frames, key_interval_frames, reliable
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._best: tuple[int, Symbols] | None = None
        self._since_best = 0
        self._since_key = 0

    def choose(self) -> tuple[Symbols | None, int | None]:
        """Returns the arguments ``reference`` and ``reference_frame`` for `LatentCodec.compress`."""
        due = 0 < self._key_interval_frames <= self._since_key
        if due or not self._codec.supports_reference:
            return None, None
        if self.reliable:
            newest = next((f for f in reversed(self._sent) if self._sent[f].delivered), None)
            if newest is not None and (self._best is None or newest > self._best[0]):
                return self._sent[newest].symbols, newest
        if self._best is None or self._since_best >= self._max_frames:
            return None, None
        return self._best[1], self._best[0]

    def sent(self, frame_id: int, symbols: Symbols, *, reference: int | None) -> None:
        """Notes a frame that shall go out with these symbols; until `delivered` is told so, no later one refers to it.

        Args:
            frame_id: under which the server will hold them.
            symbols: all of them.
            reference: the frame it was coded against; None for a key frame.
        """
        self._since_key = 1 if reference is None else self._since_key + 1
        self._since_best += 1
        self._sent[frame_id] = _Sent(symbols, reference, delivered=False)  # it may wait its turn, and be held back then
        while len(self._sent) > self._max_frames:
            self._sent.popitem(last=False)

    def delivered(self, frame_id: int, layer: int) -> None:
        """Notes that a layer was handed to the transport; with its last the frame may be referred to on a reliable stream."""
        frame = self._sent.get(frame_id)
        if frame is not None and self.reliable and layer == frame.symbols.layer_count - 1:
            frame.delivered = True

    def acknowledged(self, frame_id: int, layers: int, symbols_crc32: int) -> bool:
        """Takes the server's word for what it decoded.

        Returns:
            False when the checksum is not that of what was sent; such a frame is never referred to.
        """
        frame = self._sent.get(frame_id)
        if frame is None or not 1 <= layers <= frame.symbols.layers:
            return frame is None  # long forgotten is no fault; impossible layers are one
        exact = self._codec.prefix(frame.symbols, layers)
        if exact.crc32() != symbols_crc32:
            self.lost(frame_id)
            return False
        if layers < frame.symbols.layers:
            self._drop_children(frame_id)  # what referred to all of it was told of too much
            frame.delivered = False
        if self._best is None or frame_id > self._best[0] or (frame_id == self._best[0] and layers > self._best[1].layers):
            self._best = (frame_id, exact)
            self._since_best = sum(other > frame_id for other in self._sent)
        return True

    def lost(self, frame_id: int) -> None:
        """The server does not hold this frame: it was not sent after all, or not decoded. Nor can it decode what refers to it."""
        if self._best is not None and self._best[0] == frame_id:
            self._best = None
        self._sent.pop(frame_id, None)
        self._drop_children(frame_id)

    def refused(self, frame_id: int) -> None:
        """The server could not decode this frame: it does not hold the reference.

        Where it had acknowledged that, its memory is gone, and all the rest with it. Else the newest acknowledged frame is the
        one that can be relied on.
        """
        frame = self._sent.get(frame_id)
        if frame is not None and frame.reference is not None:
            if self._best is not None and self._best[0] == frame.reference:
                self.reset()
                return
            for other, older in self._sent.items():
                older.delivered &= other > frame.reference
            self.lost(frame.reference)
        self.lost(frame_id)

    def reset(self) -> None:
        """Forgets everything: after a reconnect, or with another bundle."""
        self._sent.clear()
        self._best = None
        self._since_best = self._since_key = 0

    def _drop_children(self, frame_id: int) -> None:
        gone = {frame_id}
        for other, frame in list(self._sent.items()):  # in the order of sending, so that children come after
            if frame.reference in gone:
                gone.add(other)
                del self._sent[other]


def _size(symbols: Symbols) -> int:
    return sum(tensor.nbytes for tensor in symbols.tensors)
