"""The learned codec's frozen integers as one binary part of the bundle.

File: a zstandard frame of ``HTCT``, u32 length of a JSON index, the index, then little-endian arrays back to back.
The index is {version, channels, layers, tiers, radius, arrays: [{name, dtype, shape}]}; nothing in it can run code. Version 1
predicted frames in another form: its tables of symbols on their own are read, those of predicted ones are not.
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
from splitters.codec.entropy.coder import TableSet
from splitters.codec.entropy.context import TABLES, WEIGHT_NAMES, Weights, exact_dtype, weight_shapes
from splitters.codec.predicted.change import MAP_ROWS, MODE_ROWS, MODES, ChangeTables
from splitters.codec.predicted.choice import Costs
from splitters.codec.predicted.renewal import RENEWAL_NAMES, Renewal, renewal_shapes

TABLES_VERSION = 2
_READABLE = (1, 2)
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
class Predicted:
    """What predicted frames are coded with.

    Attributes:
        change: flags and modes of cells.
        renewal: weights of every tier.
        tables: `TABLES` rows of 2 * radius + 1 frequencies for the symbols of changed cells.
        costs: of every tier, for the encoder's choice alone.
        scene: (C, H, W) of what a site's camera sees when nothing happens, in 1/16 of the finest tier's steps: rounded to whole
            steps it would be up to a step wrong at the next tier. Both sides hold it from the start. None: the bundle belongs to
            no site.
    """

    change: ChangeTables
    renewal: tuple[Renewal, ...]
    tables: TableSet
    costs: tuple[Costs, ...]
    scene: NDArray[np.int16] | None = None


COST_UNIT = 64  # of `Costs`, in the file
SCENE_UNIT = 16
SCENE = f"predicted/scene{SCENE_UNIT}"  # "predicted/scene", of an earlier form, is not read
_CHANGE = ("flags", "modes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """All frozen integers of one bundle.

    Attributes:
        channels: C.
        layers: where each layer ends, rising, the last is C.
        radius: residuals below it have a symbol of their own, others are escapes.
        intra: for symbols on their own.
        predicted: for frames predicted from a reference; None where no clips were there to fit it.
    """

    channels: int
    layers: tuple[int, ...]
    radius: int
    intra: Mode
    predicted: Predicted | None

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
class Index:
    """What the file says of itself."""

    version: int
    channels: int
    layers: tuple[int, ...]
    tiers: int
    radius: int
    arrays: tuple[_Array, ...]


def unpack_tables(data: bytes) -> tuple[Index, dict[str, NDArray[np.integer[Any]]]]:
    """The file's index and its arrays by name, unchecked."""
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(data) as reader:
            raw = reader.read(_MAX_BYTES + 1)
    except zstandard.ZstdError as error:
        raise BundleError(f"the codec's tables are no zstandard frame: {error}") from error
    if raw[:4] != _MAGIC or len(raw) > _MAX_BYTES or len(raw) < 8:
        raise BundleError("the codec's tables are not of this format")
    (size,) = struct.unpack_from("<I", raw, 4)
    index = read_json(raw[8 : 8 + size], Index, what="the index of the codec's tables")
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
        index, arrays = unpack_tables(data)
        if index.version not in _READABLE:
            raise BundleError(f"the codec's tables have version {index.version}, this release reads 1 and {TABLES_VERSION}")
        channels, tiers, radius, layers = index.channels, index.tiers, index.radius, index.layers
        if not (1 <= channels <= MAX_CHANNELS and 1 <= tiers <= MAX_TIERS and 1 <= radius <= 256):
            raise BundleError("the codec's tables name impossible sizes")
        if not layers or layers[-1] != channels or any(b <= a for a, b in zip((0, *layers), layers, strict=False)):
            raise BundleError("the codec's layers must rise and end at the last channel")
        intra = _read_mode(arrays, "intra", channels, layers, tiers, radius)
        known = index.version == TABLES_VERSION and "predicted/tables" in arrays
        predicted = _read_predicted(arrays, channels, tiers, radius) if known else None
        return Tables(channels=channels, layers=layers, radius=radius, intra=intra, predicted=predicted)
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise BundleError(f"the codec's tables do not hold together: {error!r}") from error


def finest_tier(gains: NDArray[np.floating[Any]]) -> int:
    """The tier of the largest gains (tiers, C): a scene's."""
    return int(gains.sum(axis=1).argmax())


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
    weights = [_weights({name: arrays[f"{mode}/{name}"][tier] for name in WEIGHT_NAMES}, layers) for tier in range(tiers)]
    return Mode(weights=tuple(weights), tables=TableSet(frequencies))


def _weights(arrays: Mapping[str, NDArray[np.integer[Any]]], layers: tuple[int, ...]) -> Weights:
    wide = Weights(**{name: array.astype(np.float64) for name, array in arrays.items()})
    dtype = exact_dtype(wide, layers)
    return Weights(**{name: array.astype(dtype) for name, array in arrays.items()})


def _read_predicted(arrays: Mapping[str, NDArray[np.integer[Any]]], channels: int, tiers: int, radius: int) -> Predicted:
    shapes = {f"predicted/{name}": (tiers, *shape) for name, shape in renewal_shapes(channels).items()}
    shapes |= {"predicted/tables": (TABLES, 2 * radius + 1), "predicted/costs": (tiers, 2, channels, 1)}
    shapes |= {"predicted/flags": (MAP_ROWS, 2), "predicted/modes": (MODE_ROWS, MODES)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}")
    costs = arrays["predicted/costs"].astype(np.float32) / COST_UNIT
    if costs.min() < 0:
        raise ValueError("a symbol costs less than nothing")
    flags, modes = (TableSet(arrays[f"predicted/{name}"]) for name in _CHANGE)
    return Predicted(
        change=ChangeTables(flags=flags, modes=modes),
        renewal=tuple(
            Renewal(**{n: arrays[f"predicted/{n}"][tier].astype(np.float64) for n in RENEWAL_NAMES}) for tier in range(tiers)
        ),
        tables=TableSet(arrays["predicted/tables"]), costs=tuple(Costs(same=c[0], other=c[1]) for c in costs),
        scene=arrays[SCENE].astype(np.int16) if SCENE in arrays else None,
    )  # fmt: skip
