"""How old the reference is that a frame would be predicted from: what its payload will cost depends on that."""

from __future__ import annotations

from collections import OrderedDict

_KEPT = 64  # more than any server remembers


class ReferenceAges:
    """Which captured frame was sent under which id."""

    def __init__(self) -> None:
        self._indices: OrderedDict[int, int] = OrderedDict()

    def sent(self, wire_id: int, index: int) -> None:
        """Captured frame ``index`` was sent as ``wire_id``."""
        self._indices[wire_id] = index
        while len(self._indices) > _KEPT:
            self._indices.popitem(last=False)

    def age(self, wire_id: int | None, index: int) -> int:
        """Frames captured from the one sent as ``wire_id`` to the one of ``index``; 0 where there is no such reference."""
        sent = self._indices.get(wire_id) if wire_id is not None else None
        return max(1, index - sent) if sent is not None else 0
