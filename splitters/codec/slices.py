"""A key frame as four slices that decode alone: quarters of the latent's plane, each with its own range coder and contexts.

Datagrams are lost one by one. A frame larger than one datagram is therefore cut in space, at multiples of four cells, where the
lattice of contexts begins again: that costs 1.5 to 4.4 % at a kilobyte and more (horizontal bands up to 6, every other cell to 20).
What is missing is filled by the prior: each channel's own expectation where nothing is known of its neighbours.

A payload of slices is four parts of one length, each two bytes of the slice's length, little-endian, and the slice; a part that
is all zeros is a hole. A slice is sealed as a frame of one layer is (`codec.envelope`).

Shape legend: C channels, H x W cells.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from protos.errors import PayloadError
from protos.messages import SLICES
from splitters.codec.entropy.coder import CoderFactory
from splitters.codec.entropy.context import UNIT, Geometry
from splitters.codec.envelope import Header, open_layers, seal
from splitters.codec.stages import decode_layers, encode_layers
from splitters.codec.symbols import SymbolArray
from splitters.codec.tables import Tables

ALL = (1 << SLICES) - 1
_LATTICE = 4
_LENGTH = struct.Struct("<H")
_MAX_BYTES = 0xFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class Coding:
    """What a point's slices are coded with.

    Attributes:
        header: of every slice.
        groups: of channels that the point holds.
        tier, channels: the point's.
    """

    header: Header
    groups: int
    tier: int
    channels: int


def quarters(height: int, width: int) -> tuple[tuple[slice, slice], ...]:
    """Rows and columns of each slice of a plane of so many cells; none where the plane is too small to be cut."""
    y, x = ((side + _LATTICE) // (2 * _LATTICE) * _LATTICE for side in (height, width))
    if not (0 < y < height and 0 < x < width):
        return ()
    rows, columns = (slice(0, y), slice(y, height)), (slice(0, x), slice(x, width))
    return tuple((row, column) for row in rows for column in columns)


class Slicer:
    """The quarters of one latent's plane; where it is too small to be cut, there are no slices.

    Args:
        height, width: of the plane, cells.
        tables: the bundle's.
        coders: of bits.
    """

    def __init__(self, height: int, width: int, tables: Tables, coders: CoderFactory) -> None:
        self._tables, self._coders = tables, coders
        self._places = quarters(height, width)
        self.possible = bool(self._places)
        self._geometries = tuple(Geometry(r.stop - r.start, c.stop - c.start) for r, c in self._places) if self.possible else ()

    def encode(self, values: SymbolArray, coding: Coding) -> bytes | None:
        """The payload of symbols (C, H, W); None: the plane is too small, or a slice would be too long."""
        if not self.possible:
            return None
        found = []
        for place, geometry in zip(self._places, self._geometries, strict=True):
            part = np.ascontiguousarray(values[:, *place])
            bodies = encode_layers(part, (coding.groups,), geometry, self._tables, coding.tier, coding.channels, self._coders)
            found += seal(coding.header, bodies)
        return pack(found) if max(map(len, found)) <= _MAX_BYTES else None

    def open(self, payload: bytes) -> tuple[list[bytes | None], Header]:
        """A payload's slices, None for a hole, and the header of the first that is whole.

        Raises:
            PayloadError: none is, or this plane has none.
        """
        slices = unpack(payload) if self.possible else []
        for piece in slices:
            if piece is not None:
                with suppress(PayloadError):
                    return slices, open_layers([piece])[0]
        raise PayloadError("no slice of the frame is whole" if self.possible else "this bundle's latents are not cut in slices")

    def decode(self, slices: Sequence[bytes | None], coding: Coding) -> tuple[SymbolArray, int]:
        """Symbols (C, H, W) and which slices they are from, a bit each; a damaged slice is a missing one.

        Raises:
            PayloadError: none is there.
        """
        values, held = self.prior(coding), 0
        for index, (piece, place, geometry) in enumerate(zip(slices, self._places, self._geometries, strict=True)):
            if piece is None:
                continue
            try:
                header, bodies = open_layers([piece])
                if header != coding.header:
                    raise PayloadError("a slice is of another point than the frame's others")
                values[:, *place] = decode_layers(
                    bodies, (coding.groups,), geometry, self._tables, coding.tier, coding.channels, self._coders
                )
            except PayloadError:
                continue
            held |= 1 << index
        if not held:
            raise PayloadError("no slice of the frame is whole")
        return values, held

    def with_holes(self, values: SymbolArray, held: int, coding: Coding) -> SymbolArray:
        """What a receiver has who holds these slices only."""
        found = self.prior(coding)
        for index, place in enumerate(self._places):
            if held >> index & 1:
                found[:, *place] = values[:, *place]
        return found

    def prior(self, coding: Coding) -> SymbolArray:
        """Each channel's expectation where nothing is known, (C, H, W)."""
        bias = self._tables.intra.weights[coding.tier].mean_bias[0]
        channel = np.rint(bias / UNIT).astype(np.int16)
        channel[coding.channels :] = 0
        (rows, columns) = self._places[-1]
        return np.broadcast_to(channel[:, None, None], (len(channel), rows.stop, columns.stop)).copy()


def pack(slices: Sequence[bytes]) -> bytes:
    """Slices as a payload."""
    size = _LENGTH.size + max(map(len, slices))
    return b"".join((_LENGTH.pack(len(each)) + each).ljust(size, b"\0") for each in slices)


def unpack(payload: bytes) -> list[bytes | None]:
    """A payload's slices; None for a hole.

    Raises:
        PayloadError: it cannot be one.
    """
    size, rest = divmod(len(payload), SLICES)
    if rest or size < _LENGTH.size:
        raise PayloadError(f"a payload of {len(payload)} bytes is not {SLICES} slices of one length")
    found: list[bytes | None] = []
    for at in range(0, len(payload), size):
        (length,) = _LENGTH.unpack_from(payload, at)
        if length > size - _LENGTH.size:
            raise PayloadError("a slice is longer than its place in the payload")
        found.append(payload[at + _LENGTH.size : at + _LENGTH.size + length] if length else None)
    return found
