"""The learned codec's frozen integers as one binary part of the bundle.

File: a zstandard frame of ``HTCT``, u32 length of a JSON index, the index, then little-endian arrays back to back.
The index is {version, channels, layers, tiers, radius, arrays: [{name, dtype, shape}]}; nothing in it can run code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from protos.errors import BundleError
from protos.schema import read_json
from splitters.codec.coder import TableSet
from splitters.codec.context import TABLES, WEIGHT_NAMES, Weights, weight_shapes

TABLES_VERSION = 1
MODES = ("intra", "inter")
MAX_CHANNELS = 512
MAX_TIERS = 64
_MAGIC = b"HTCT"
_MAX_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """Weights of every tier and the tables they choose from.

    Attributes:
        weights: one per tier.
        tables: `TABLES` rows of 2 * radius + 1 frequencies; the outermost two announce an escape.
    """

    weights: tuple[Weights, ...]
    tables: TableSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """All frozen integers of one bundle.

    Attributes:
        channels: C.
        layers: where each layer ends, rising, the last is C.
        radius: residuals below it have a symbol of their own, others are escapes.
        intra: for symbols on their own.
        inter: for differences to a reference frame; None where no pairs were there to fit it.
    """

    channels: int
    layers: tuple[int, ...]
    radius: int
    intra: Mode
    inter: Mode | None

    @property
    def tiers(self) -> int:
        """Number of gain tiers."""
        return len(self.intra.weights)


def pack_tables(tables: Mapping[str, Any], arrays: Mapping[str, NDArray[np.integer[Any]]]) -> bytes:
    """Writes the file from the index's scalar entries and named integer arrays."""
    entries, blobs = [], []
    for name, array in arrays.items():
        dtype = "<u2" if array.dtype.kind == "u" else "<i2"
        entries.append({"name": name, "dtype": dtype, "shape": list(array.shape)})
        blobs.append(np.ascontiguousarray(array, dtype=dtype).tobytes())
    index = json.dumps({"version": TABLES_VERSION, **tables, "arrays": entries}, separators=(",", ":")).encode()
    raw = b"".join([_MAGIC, struct.pack("<I", len(index)), index, *blobs])
    return zstandard.ZstdCompressor(level=19, write_content_size=True).compress(raw)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Array:
    name: str
    dtype: Literal["<i2", "<u2"]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Index:
    version: int
    channels: int
    layers: tuple[int, ...]
    tiers: int
    radius: int
    arrays: tuple[_Array, ...]


def _unpack(data: bytes) -> tuple[_Index, dict[str, NDArray[np.integer[Any]]]]:
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as reader:
            raw = reader.read(_MAX_BYTES + 1)
    except zstandard.ZstdError as error:
        raise BundleError(f"the codec's tables are no zstandard frame: {error}") from error
    if raw[:4] != _MAGIC or len(raw) > _MAX_BYTES or len(raw) < 8:
        raise BundleError("the codec's tables are not of this format")
    (size,) = struct.unpack_from("<I", raw, 4)
    index = read_json(raw[8 : 8 + size], _Index, what="the index of the codec's tables")
    at = 8 + size
    arrays: dict[str, NDArray[np.integer[Any]]] = {}
    for entry in index.arrays:
        count = math.prod(entry.shape)
        if any(n < 0 for n in entry.shape) or 2 * count > len(raw) - at:
            raise BundleError("the codec's tables are shorter than their index says")
        arrays[entry.name] = np.frombuffer(raw, dtype=entry.dtype, count=count, offset=at).reshape(entry.shape)
        at += 2 * count
    if at != len(raw):
        raise BundleError("the codec's tables are longer than their index says")
    return index, arrays


def read_tables(data: bytes) -> Tables:
    """Reads and checks the file.

    Raises:
        BundleError: another format or version, or arrays that do not hold together.
    """
    try:
        index, arrays = _unpack(data)
        if index.version != TABLES_VERSION:
            raise BundleError(f"the codec's tables have version {index.version}, this release reads {TABLES_VERSION}")
        channels, tiers, radius, layers = index.channels, index.tiers, index.radius, index.layers
        if not (1 <= channels <= MAX_CHANNELS and 1 <= tiers <= MAX_TIERS and 1 <= radius <= 256):
            raise BundleError("the codec's tables name impossible sizes")
        if not layers or layers[-1] != channels or any(b <= a for a, b in zip((0, *layers), layers, strict=False)):
            raise BundleError("the codec's layers must rise and end at the last channel")
        modes = [_read_mode(arrays, name, channels, layers, tiers, radius) for name in MODES if f"{name}/tables" in arrays]
        return Tables(channels=channels, layers=layers, radius=radius, intra=modes[0], inter=modes[1] if len(modes) > 1 else None)
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise BundleError(f"the codec's tables do not hold together: {error!r}") from error


def _read_mode(
    arrays: Mapping[str, NDArray[np.integer[Any]]], mode: str, channels: int, layers: tuple[int, ...], tiers: int, radius: int
) -> Mode:
    frequencies = arrays[f"{mode}/tables"]
    if frequencies.shape != (TABLES, 2 * radius + 1):
        raise ValueError(f"{mode} tables have shape {frequencies.shape}")
    shapes = weight_shapes(channels, len(layers))
    for name in WEIGHT_NAMES:
        if arrays[f"{mode}/{name}"].shape != (tiers, *shapes[name]):
            raise ValueError(f"{mode}/{name} has shape {arrays[f'{mode}/{name}'].shape}")
    weights = tuple(
        Weights(**{name: arrays[f"{mode}/{name}"][tier].astype(np.float64) for name in WEIGHT_NAMES}) for tier in range(tiers)
    )
    return Mode(weights=weights, tables=TableSet(frequencies))
