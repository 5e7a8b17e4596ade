"""Temporal prediction's bookkeeping: what the server holds, and what the client may refer to.

The rule that keeps both sides exact: a frame may refer only to layers that the server has acknowledged with the right
checksum, of a frame among the last `HISTORY_FRAMES` the server decoded. Symbols are decoded exactly, so nothing can
drift; whatever is missing shows as a PayloadError, and the client answers with a key frame (`Predictor.reset`).
Both classes are pure state: no clock, no I/O, one session each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

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


class Predictor:
    """The client's choice of reference: the newest frame that the server has acknowledged, or none.

    Args:
        codec: the bundle's.
        max_frames: how many frames the server remembers; a reference that has so many successors is not used.
        key_interval_frames: a key frame at least so often, 0: only when needed.
    """

    def __init__(self, codec: LatentCodec, *, max_frames: int = HISTORY_FRAMES, key_interval_frames: int = 0) -> None:
        if max_frames < 1 or key_interval_frames < 0:
            raise ValueError("max_frames is at least 1, key_interval_frames at least 0")
        self._codec = codec
        self._max_frames, self._key_interval_frames = max_frames, key_interval_frames
        self._sent: OrderedDict[int, Symbols] = OrderedDict()
        self._best: tuple[int, Symbols] | None = None
        self._since_best = 0
        self._since_key = 0

    def choose(self) -> tuple[Symbols | None, int | None]:
        """Returns the arguments ``reference`` and ``reference_frame`` for `LatentCodec.encode`."""
        due = 0 < self._key_interval_frames <= self._since_key
        if self._best is None or due or not self._codec.supports_reference or self._since_best >= self._max_frames:
            return None, None
        return self._best[1], self._best[0]

    def sent(self, frame_id: int, symbols: Symbols, *, key: bool) -> None:
        """Notes a frame that goes out with these symbols; `key` when it was coded without a reference."""
        self._since_key = 1 if key else self._since_key + 1
        self._since_best += 1
        self._sent[frame_id] = symbols
        while len(self._sent) > self._max_frames:
            self._sent.popitem(last=False)

    def acknowledged(self, frame_id: int, layers: int, symbols_crc32: int) -> bool:
        """Takes the server's word for what it decoded.

        Returns:
            False when the checksum is not that of what was sent; such a frame is never referred to.
        """
        symbols = self._sent.get(frame_id)
        if symbols is None or not 1 <= layers <= symbols.layers:
            return symbols is None  # long forgotten is no fault; impossible layers are one
        exact = self._codec.prefix(symbols, layers)
        if exact.crc32() != symbols_crc32:
            return False
        if self._best is None or frame_id > self._best[0] or (frame_id == self._best[0] and layers > self._best[1].layers):
            self._best = (frame_id, exact)
            self._since_best = sum(other > frame_id for other in self._sent)
        return True

    def reset(self) -> None:
        """Forgets everything: after a reconnect, another bundle, or a server that lacks the reference."""
        self._sent.clear()
        self._best = None
        self._since_best = self._since_key = 0


def _size(symbols: Symbols) -> int:
    return sum(tensor.nbytes for tensor in symbols.tensors)
