"""The few bytes around every layer: a versioned header, and checksums that chain the layers of a frame.

Base layer (layer 0), little-endian::

    u8   version << 4 | kind << 1 | predicted
    u8   index of the codec point
    u8   number of layers the point has
    [u8  layers of the reference in use, u32 CRC-32 of its symbols, LEB128 frame id]   when predicted
    u32  CRC-32 of the header above
    ...  body
    u32  CRC-32 of the body, started from the header's CRC

Layer k > 0::

    u8   k
    ...  body
    u32  CRC-32 of both, started from layer k-1's CRC

The chain makes a layer of another frame, or of another order, fail its checksum like a flipped bit does.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from protos.errors import LimitError, PayloadError

VERSION = 1
KINDS = ("plain", "learned")
MAX_LAYERS = 16
MAX_POINTS = 256
MAX_LAYER_BYTES = 16 * 2**20
MAX_FRAME_ID = 2**63 - 1

_CRC_BYTES = 4
_MAX_VARINT_BYTES = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Names the symbols a predicted frame was coded against."""

    frame_id: int
    layers: int
    crc32: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the base layer says of its frame."""

    kind: str
    point_index: int
    layer_count: int
    reference: Reference | None = None


def _varint(value: int) -> bytes:
    if not 0 <= value <= MAX_FRAME_ID:
        raise LimitError(f"a frame id lies in 0..2^63-1, got {value}")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def seal(header: Header, bodies: Sequence[bytes]) -> list[bytes]:
    """Wraps one body per layer, base first, into payloads."""
    if not 1 <= len(bodies) <= header.layer_count <= MAX_LAYERS:
        raise LimitError(f"{len(bodies)} layers for a point of {header.layer_count}, at most {MAX_LAYERS}")
    head = bytearray(
        (
            VERSION << 4 | KINDS.index(header.kind) << 1 | (header.reference is not None),
            header.point_index,
            header.layer_count,
        )
    )
    if header.reference is not None:
        head += struct.pack("<BI", header.reference.layers, header.reference.crc32)
        head += _varint(header.reference.frame_id)
    crc = zlib.crc32(head)
    head += struct.pack("<I", crc)
    payloads = []
    for index, body in enumerate(bodies):
        lead = b"" if index == 0 else bytes((index,))
        crc = zlib.crc32(body, zlib.crc32(lead, crc))
        payloads.append((bytes(head) if index == 0 else lead) + body + struct.pack("<I", crc))
    return payloads


def is_predicted(base_layer: bytes) -> bool:
    """Whether a frame's base layer was coded against a reference; False for a key frame."""
    return bool(base_layer[:1]) and bool(base_layer[0] & 1)


def open_layers(payloads: Sequence[bytes], *, strict: bool = False) -> tuple[Header, list[bytes]]:
    """Checks payloads and returns the header and the bodies of the complete prefix.

    Args:
        payloads: base layer first, without gaps; later ones may be absent.
        strict: raise for a damaged later layer instead of returning the layers before it.

    Raises:
        PayloadError: the base layer is damaged, of another version, or (strict) any layer is.
        LimitError: more or larger layers than any point may have.
    """
    if not payloads:
        raise PayloadError("a frame needs at least its base layer, but no payload arrived")
    if len(payloads) > MAX_LAYERS:
        raise LimitError(f"a frame has at most {MAX_LAYERS} layers, got {len(payloads)}")
    for payload in payloads:
        if len(payload) > MAX_LAYER_BYTES:
            raise LimitError(f"a layer has at most {MAX_LAYER_BYTES} bytes, got {len(payload)}")
    header, size, crc = _parse_header(payloads[0])
    if len(payloads) > header.layer_count:
        raise PayloadError(f"{len(payloads)} layers arrived for a point that has {header.layer_count}")
    bodies = []
    for index, payload in enumerate(payloads):
        start = size if index == 0 else 1
        if len(payload) < start + _CRC_BYTES:
            problem = f"layer {index} is truncated to {len(payload)} bytes"
        elif index > 0 and payload[0] != index:
            problem = f"layer {payload[0]} arrived where layer {index} belongs"
        else:
            crc = zlib.crc32(payload[0 if index else start : -_CRC_BYTES], crc)
            if struct.unpack("<I", payload[-_CRC_BYTES:])[0] == crc:
                bodies.append(bytes(payload[start:-_CRC_BYTES]))
                continue
            problem = f"the checksum of layer {index} does not match: its bytes were altered or cut"
        if index == 0 or strict:
            raise PayloadError(problem)
        break
    return header, bodies


def _parse_header(payload: bytes) -> tuple[Header, int, int]:
    """Returns the header, its size in bytes (checksum included) and its CRC-32."""
    if len(payload) < 3 + 2 * _CRC_BYTES:
        raise PayloadError(f"a base layer has at least 11 bytes, got {len(payload)}")
    lead = payload[0]
    if lead >> 4 != VERSION:
        raise PayloadError(f"payload version {lead >> 4} is not {VERSION}: both sides need the same release")
    size = 3
    reference = None
    if lead & 1:
        layers, ref_crc = struct.unpack_from("<BI", payload, size)
        size += 5
        frame_id = shift = 0
        while True:
            if size >= len(payload) or shift >= 7 * _MAX_VARINT_BYTES:
                raise PayloadError("the reference frame's id does not end within the header")
            byte = payload[size]
            size += 1
            frame_id |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        reference = Reference(frame_id=frame_id, layers=layers, crc32=ref_crc)
    if len(payload) < size + _CRC_BYTES:
        raise PayloadError("the payload ends within its header")
    crc = zlib.crc32(payload[:size])
    if struct.unpack_from("<I", payload, size)[0] != crc:
        raise PayloadError("the checksum of the header does not match: its bytes were altered or cut")
    kind = lead >> 1 & 7
    if kind >= len(KINDS):
        raise PayloadError(f"payload kind {kind} is not known to this release")
    if not 1 <= payload[2] <= MAX_LAYERS:
        raise PayloadError(f"a point has 1..{MAX_LAYERS} layers, the header says {payload[2]}")
    header = Header(kind=KINDS[kind], point_index=payload[1], layer_count=payload[2], reference=reference)
    return header, size + _CRC_BYTES, crc
