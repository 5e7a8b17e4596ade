"""Symbols: the integers a latent becomes, and what both sides must agree on exactly.

Shapes: one integer array per latent tensor, without a batch axis, e.g. (C, H, W), (L, C) or (C,).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SymbolArray = NDArray[np.int16]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Symbols:
    """One frame's symbols at one codec point.

    Attributes:
        point_id: the codec point whose scales turn these integers back into a latent.
        tensors: one int16 array per latent tensor; cells of layers that are missing are zero.
        layers: how many complete layers are held, base first.
        layer_count: how many layers the frame has.
        history: when and how every cell last changed, (H, W) bytes as `codec.predicted.change` reads them; None for a key frame.
    """

    point_id: str
    tensors: tuple[SymbolArray, ...]
    layers: int
    layer_count: int
    history: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= self.layer_count:
            raise ValueError(f"layers must lie in 1..{self.layer_count}, got {self.layers}")
        if any(tensor.dtype != np.int16 for tensor in self.tensors):
            raise ValueError("symbols are int16 arrays")

    @property
    def complete(self) -> bool:
        """Whether every layer of the point is held."""
        return self.layers == self.layer_count

    def crc32(self) -> int:
        """CRC-32 over point, number of layers, history and every integer; the same on every processor."""
        crc = zlib.crc32(f"{self.point_id}\0{self.layers}".encode())
        for tensor in self.tensors:
            crc = zlib.crc32(np.ascontiguousarray(tensor, dtype="<i2").tobytes(), crc)
        return crc if self.history is None else zlib.crc32(self.history.tobytes(), crc)
