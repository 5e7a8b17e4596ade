"""What an offloaded H.264 frame is on the wire: which frame it depends on, and exactly one picture's NAL units.

    version   1 byte, 1
    kind      1 byte; 0: key frame, 1: predicted
    reference 4 bytes, little-endian; of a predicted frame alone: the id, modulo 2**32, of the frame that it depends on
    units     NAL units behind four-byte start codes (ITU-T H.264, annex B)

A key frame holds one sequence parameter set, picture parameter sets and the slices of one IDR picture; a predicted frame the
slices of one picture. Nothing else is let through: a payload of a few kilobytes could else hold thousands of pictures whose
blocks are all skipped, each of which takes a decoder its whole time.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from protos.errors import PayloadError

VERSION: Final = 1
_KEY, _PREDICTED = 0, 1
_SLICE, _IDR, _SPS, _PPS = 1, 5, 7, 8  # NAL unit types
_PICTURE: Final = frozenset({_SLICE, _IDR, _SPS, _PPS})
_MAX_SLICES: Final = 8
_MAX_PARAMETER_BYTES: Final = 512
_MAX_PPS: Final = 4
_START: Final = re.compile(rb"\x00{2,}\x01")
_START_CODE: Final = b"\0\0\0\1"
_REFERENCE: Final = struct.Struct("<I")
_ID_MASK: Final = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPayload:
    """One frame of an H.264 stream.

    Attributes:
        units: its NAL units with their start codes.
        reference: id, modulo 2**32, of the frame that it depends on; None: it is a key frame.
    """

    units: bytes
    reference: int | None = None

    def depends_on(self, frame_id: int) -> bool:
        """Whether ``frame_id`` is its reference."""
        return self.reference == frame_id & _ID_MASK

    def to_bytes(self) -> bytes:
        """As it travels."""
        if self.reference is None:
            return bytes((VERSION, _KEY)) + self.units
        return bytes((VERSION, _PREDICTED)) + _REFERENCE.pack(self.reference & _ID_MASK) + self.units

    @classmethod
    def from_bytes(cls, data: bytes) -> VideoPayload:
        """Reads a payload and checks that it holds one picture of the kind that it says.

        Raises:
            PayloadError: it does not.
        """
        if len(data) < 2 or data[0] != VERSION or data[1] not in (_KEY, _PREDICTED):
            raise PayloadError(f"an offloaded video frame begins with version {VERSION} and its kind")
        reference, at = None, 2
        if data[1] == _PREDICTED:
            at += _REFERENCE.size
            if len(data) < at:
                raise PayloadError("the offloaded video frame ends within its header")
            (reference,) = _REFERENCE.unpack_from(data, 2)
        units = data[at:]
        _check(split_units(units), key=reference is None)
        return cls(units=units, reference=reference)


def split_units(data: bytes) -> list[bytes]:
    """The NAL units of a byte stream, without start codes; what stands before the first start code is left out."""
    return [unit for unit in _START.split(data)[1:] if unit]


def joined_units(units: Iterable[bytes]) -> bytes:
    """NAL units as a byte stream."""
    return b"".join(_START_CODE + unit for unit in units)


def picture_units(packet: bytes) -> tuple[bytes, bool]:
    """What of an encoder's packet a receiver needs, and whether it is a key frame.

    x264 writes its version and settings into every stream, 700 bytes of them; others write delimiters.
    """
    kept = [unit for unit in split_units(packet) if unit[0] & 0x1F in _PICTURE]
    return joined_units(kept), any(unit[0] & 0x1F == _IDR for unit in kept)


def _check(units: list[bytes], *, key: bool) -> None:
    types = [unit[0] & 0x1F for unit in units]
    slices = [unit for unit, kind in zip(units, types, strict=True) if kind in (_SLICE, _IDR)]
    parameters = [unit for unit, kind in zip(units, types, strict=True) if kind in (_SPS, _PPS)]
    if set(types) - ({_IDR, _SPS, _PPS} if key else {_SLICE}):
        raise PayloadError("an offloaded video frame holds NAL units that do not belong to a frame of its kind")
    if key and (types.count(_SPS) != 1 or not 1 <= types.count(_PPS) <= _MAX_PPS or types[0] != _SPS):
        raise PayloadError("an offloaded video key frame begins with one sequence parameter set and holds a picture's")
    if any(len(unit) > _MAX_PARAMETER_BYTES for unit in parameters):
        raise PayloadError("an offloaded video frame holds an impossibly large parameter set")
    # A slice begins with the number of its first block, which is 0, one set bit, in the first slice of a picture alone.
    first = [len(unit) > 1 and unit[1] & 0x80 != 0 for unit in slices]
    if not 1 <= len(slices) <= _MAX_SLICES or not first[0] or any(first[1:]):
        raise PayloadError(f"an offloaded video frame holds one picture of at most {_MAX_SLICES} slices")
