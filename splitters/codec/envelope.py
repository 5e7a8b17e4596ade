"""The few bytes around a frame: a versioned header, and checksums.

A key frame, version 1. Base layer (layer 0), little-endian::

    u8   version << 4 | kind << 1
    u8   index of the codec point
    u8   number of layers the point has
    u32  CRC-32 of the header above
    ...  body
    u32  CRC-32 of the body, started from the header's CRC

Layer k > 0::

    u8   k
    ...  body
    u32  CRC-32 of both, started from layer k-1's CRC

The chain makes a layer of another frame, or of another order, fail its checksum like a flipped bit does.

A predicted frame, version 2, always one layer::

    u8   version << 4 | kind << 1 | 1
    u8   index of the codec point
    u8   low byte of the reference's frame id, 0 with a scene
    u8   class of the frame's density of changes; 128 more where the reference is the scene that the bundle holds
    ...  body
    u32  CRC-32 of all above, started from the CRC-32 of the reference's symbols

A reference that differs in one symbol fails the checksum, so it need not travel: a frame in which nothing moved has eight bytes
and a few bits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from protos.errors import LimitError, PayloadError

VERSION = 1
PREDICTED_VERSION = 2
KINDS = ("plain", "learned")
MAX_LAYERS = 16
MAX_POINTS = 256
MAX_LAYER_BYTES = 16 * 2**20

_CRC_BYTES = 4
_KEY_BYTES, _PREDICTED_BYTES = 3, 4
_SCENE = 0x80


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the base layer says of a key frame."""

    kind: str
    point_index: int
    layer_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedHeader:
    """What a predicted frame says of itself.

    Attributes:
        kind: of codec.
        point_index: its codec point.
        reference_byte: low byte of the reference's frame id.
        density: class of its density of changes.
        scene: whether the reference is what the bundle holds of its site.
    """

    kind: str
    point_index: int
    reference_byte: int
    density: int
    scene: bool = False


def seal(header: Header, bodies: Sequence[bytes]) -> list[bytes]:
    """Wraps one body per layer, base first, into payloads."""
    if not 1 <= len(bodies) <= header.layer_count <= MAX_LAYERS:
        raise LimitError(f"{len(bodies)} layers for a point of {header.layer_count}, at most {MAX_LAYERS}")
    head = bytearray((VERSION << 4 | KINDS.index(header.kind) << 1, header.point_index, header.layer_count))
    crc = zlib.crc32(head)
    head += struct.pack("<I", crc)
    payloads = []
    for index, body in enumerate(bodies):
        lead = b"" if index == 0 else bytes((index,))
        crc = zlib.crc32(body, zlib.crc32(lead, crc))
        payloads.append((bytes(head) if index == 0 else lead) + body + struct.pack("<I", crc))
    return payloads


def seal_predicted(header: PredictedHeader, body: bytes, reference_crc32: int) -> bytes:
    """Wraps a predicted frame's body."""
    lead = PREDICTED_VERSION << 4 | KINDS.index(header.kind) << 1 | 1
    density = header.density | _SCENE * header.scene
    data = bytes((lead, header.point_index, header.reference_byte, density)) + body
    return data + struct.pack("<I", zlib.crc32(data, reference_crc32))


def is_predicted(base_layer: bytes) -> bool:
    """Whether a frame's base layer was coded against a reference; False for a key frame."""
    return bool(base_layer[:1]) and bool(base_layer[0] & 1)


def open_predicted(payload: bytes) -> tuple[PredictedHeader, bytes]:
    """A predicted frame's header and body; whether they are whole shows when `belongs_to` is asked.

    Raises:
        PayloadError: too short, or of another version.
        LimitError: larger than any frame may be.
    """
    if len(payload) > MAX_LAYER_BYTES:
        raise LimitError(f"a layer has at most {MAX_LAYER_BYTES} bytes, got {len(payload)}")
    if len(payload) < _PREDICTED_BYTES + _CRC_BYTES:
        raise PayloadError(f"a predicted frame has at least 8 bytes, got {len(payload)}")
    lead = payload[0]
    if lead >> 4 != PREDICTED_VERSION:
        raise PayloadError(
            f"the frame is predicted in form {lead >> 4}, this release reads form {PREDICTED_VERSION}: "
            "both sides need the same release"
        )
    header = PredictedHeader(
        kind=_kind(lead), point_index=payload[1], reference_byte=payload[2], density=payload[3] & ~_SCENE,
        scene=bool(payload[3] & _SCENE),
    )  # fmt: skip
    return header, payload[_PREDICTED_BYTES:-_CRC_BYTES]


def belongs_to(payload: bytes, reference_crc32: int) -> bool:
    """Whether a predicted frame is whole and was coded against symbols of this CRC-32."""
    return bool(zlib.crc32(payload[:-_CRC_BYTES], reference_crc32) == struct.unpack("<I", payload[-_CRC_BYTES:])[0])


def _kind(lead: int) -> str:
    kind = lead >> 1 & 7
    if kind >= len(KINDS):
        raise PayloadError(f"payload kind {kind} is not known to this release")
    return KINDS[kind]


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
    if len(payload) < _KEY_BYTES + 2 * _CRC_BYTES:
        raise PayloadError(f"a base layer has at least 11 bytes, got {len(payload)}")
    lead = payload[0]
    if lead >> 4 != VERSION or lead & 1:
        raise PayloadError(f"payload version {lead >> 4} is not {VERSION}: both sides need the same release")
    crc = zlib.crc32(payload[:_KEY_BYTES])
    if struct.unpack_from("<I", payload, _KEY_BYTES)[0] != crc:
        raise PayloadError("the checksum of the header does not match: its bytes were altered or cut")
    if not 1 <= payload[2] <= MAX_LAYERS:
        raise PayloadError(f"a point has 1..{MAX_LAYERS} layers, the header says {payload[2]}")
    header = Header(kind=_kind(lead), point_index=payload[1], layer_count=payload[2])
    return header, _KEY_BYTES + _CRC_BYTES, crc
