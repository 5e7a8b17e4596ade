"""The symbols a session's later frames may be predicted from: the latest few, never more."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from splitters.codec import Symbols


class References(Mapping[int, Symbols]):
    """Decoded symbols by frame id; the oldest is forgotten first, but never the one last referred to.

    Args:
        capacity: frames held. A device refers to a frame it has an acknowledgement of, so a window's worth suffices.
        max_bytes: of all symbols together.
    """

    def __init__(self, *, capacity: int = 16, max_bytes: int = 8 << 20) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._held: OrderedDict[int, Symbols] = OrderedDict()
        self._bytes = 0

    def add(self, frame_id: int, symbols: Symbols) -> None:
        """Holds a frame's symbols."""
        size = _size(symbols)
        if size > self._max_bytes:
            return
        self._held[frame_id] = symbols
        self._bytes += size
        while len(self._held) > self._capacity or self._bytes > self._max_bytes:
            _, gone = self._held.popitem(last=False)
            self._bytes -= _size(gone)

    def __getitem__(self, frame_id: int) -> Symbols:
        symbols = self._held[frame_id]
        self._held.move_to_end(frame_id)
        return symbols

    def __contains__(self, frame_id: object) -> bool:
        return frame_id in self._held

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _size(symbols: Symbols) -> int:
    return sum(tensor.nbytes for tensor in symbols.tensors)
