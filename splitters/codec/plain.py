"""The plain codec: static per-channel affine scale, 1..14 bits, one zstandard layer.

Above 8 bits all high bytes follow all low ones.
Works for any number of latent tensors of any shape, so every cut has a payload before one is trained.

Shapes: latents are (C, H, W), (L, C) with ``channel_axis`` 1, (C,) or (); no batch axis.
Symbols lie in 0..2^bits-1; latent = low[channel] + step[channel] * symbol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from protos.errors import BundleError, ConfigError, ModelError, PayloadError
from splitters.codec.base import (
    MAX_ELEMENTS,
    MAX_TENSORS,
    Latent,
    LatentCodec,
    References,
    check_spec,
)
from splitters.codec.envelope import MAX_POINTS, Header, is_predicted, open_layers, seal
from splitters.codec.symbols import SymbolArray, Symbols

MAX_BITS = 14
_ZSTD_LEVEL = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scale:
    """One tensor's scale at one point; arrays broadcast against the tensor."""

    low: NDArray[np.float32]
    step: NDArray[np.float32]
    inverse: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    levels: int
    scales: tuple[_Scale, ...]


class PlainCodec(LatentCodec):
    """Per-channel quantisation and zstandard; the spec comes from `calibrate_plain`."""

    kind = "plain"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        """Reads a spec.

        Raises:
            BundleError: the spec is of another kind or version, or does not hold together.
        """
        check_spec(spec, self.kind)
        try:
            self.shapes = tuple(tuple(int(n) for n in t["shape"]) for t in spec["tensors"])
            axes = [int(t.get("channel_axis", 0)) for t in spec["tensors"]]
            self._points = {str(p["id"]): self._read_point(p, axes) for p in spec["points"]}
        except (LookupError, TypeError, ValueError) as error:
            raise BundleError(f"codec.json does not hold a plain codec: {error!r}") from error
        self.point_ids = tuple(self._points)
        if any(n < 1 for shape in self.shapes for n in shape):
            raise BundleError("a plain codec's tensors have sides of at least 1")
        self._sizes = [math.prod(shape) for shape in self.shapes]
        if not 1 <= len(self.shapes) <= MAX_TENSORS or not 1 <= sum(self._sizes) <= MAX_ELEMENTS:
            raise BundleError(f"a plain codec holds 1..{MAX_TENSORS} tensors of at most {MAX_ELEMENTS} elements")
        if not 1 <= len(self.point_ids) <= MAX_POINTS or len(self.point_ids) != len(spec["points"]):
            raise BundleError(f"a codec has 1..{MAX_POINTS} points of distinct ids")

    def _read_point(self, point: Mapping[str, Any], axes: Sequence[int]) -> _Point:
        bits = int(point["bits"])
        if not 1 <= bits <= MAX_BITS:
            raise ValueError(f"bits must lie in 1..{MAX_BITS}, got {bits}")
        scales = []
        for entry, shape, axis in zip(point["tensors"], self.shapes, axes, strict=True):
            channels = shape[axis] if shape else 1
            with np.errstate(over="ignore"):  # infinity is refused below
                low = np.asarray(entry["low"], dtype=np.float32)
                step = np.asarray(entry["step"], dtype=np.float32)
            if low.shape != (channels,) or step.shape != (channels,):
                raise ValueError(f"{channels} channels need as many scales, got {low.shape} and {step.shape}")
            if not (np.isfinite(low).all() and np.isfinite(step).all() and (step > 0).all()):
                raise ValueError("scales must be finite, steps positive")
            broadcast = [1] * len(shape)
            if shape:
                broadcast[axis] = channels
            scales.append(
                _Scale(
                    low=low.reshape(broadcast),
                    step=step.reshape(broadcast),
                    inverse=(np.float32(1) / step).reshape(broadcast),
                )
            )
        return _Point(levels=2**bits - 1, scales=tuple(scales))

    def layer_count(self, point_id: str) -> int:
        """One: a plain payload does not come in parts."""
        if point_id not in self._points:
            raise ConfigError(f"no codec point {point_id!r}; this bundle has {', '.join(self.point_ids)}")
        return 1

    def quantise(self, latents: Sequence[Latent], point_id: str) -> Symbols:
        """See `LatentCodec.quantise`; values outside the calibrated interval saturate.

        Raises:
            ConfigError: an unknown point, or tensors of other shapes than the bundle's.
            ModelError: a latent holds NaN.
        """
        arrays = self._check_latents(latents, point_id)
        point = self._points[point_id]
        tensors = []
        for index, (array, scale) in enumerate(zip(arrays, point.scales, strict=True)):
            scaled = np.rint((array - scale.low) * scale.inverse)
            if np.isnan(scaled).any():
                raise ModelError(f"the head returned NaN in latent_{index}")
            tensors.append(np.clip(scaled, 0, point.levels).astype(np.int16))
        return Symbols(point_id=point_id, tensors=tuple(tensors), layers=1, layer_count=1)

    def dequantise(self, symbols: Symbols) -> tuple[Latent, ...]:
        """See `LatentCodec.dequantise`."""
        self._check_symbols(symbols)
        scales = self._points[symbols.point_id].scales
        return tuple(
            cast("Latent", scale.low + scale.step * tensor.astype(np.float32))
            for tensor, scale in zip(symbols.tensors, scales, strict=True)
        )

    def encode(self, symbols: Symbols, reference: Symbols | None = None, reference_frame: int | None = None) -> list[bytes]:
        """See `LatentCodec.encode`; a reference is not made use of."""
        del reference, reference_frame
        self._check_symbols(symbols)
        levels = self._points[symbols.point_id].levels
        for tensor in symbols.tensors:
            if tensor.size and (int(tensor.min()) < 0 or int(tensor.max()) > levels):
                raise ConfigError(f"symbols of point {symbols.point_id} lie in 0..{levels}")
        raw = b"".join((tensor & 0xFF).astype(np.uint8).tobytes() for tensor in symbols.tensors)
        if levels > 0xFF:
            raw += b"".join((tensor >> 8).astype(np.uint8).tobytes() for tensor in symbols.tensors)
        # A compressor per call: they are cheap, and not safe to share between threads.
        compressor = zstandard.ZstdCompressor(
            level=_ZSTD_LEVEL, write_checksum=False, write_content_size=False, write_dict_id=False
        )
        header = Header(kind=self.kind, point_index=self.point_ids.index(symbols.point_id), layer_count=1)
        return seal(header, [compressor.compress(raw)])

    def decode(self, layers: Sequence[bytes], references: References | None = None, *, strict: bool = False) -> Symbols:
        """See `LatentCodec.decode`."""
        del references
        if layers and is_predicted(layers[0]):
            raise PayloadError("a plain payload has no reference frame")
        header, bodies = open_layers(layers, strict=strict)
        point_id = self._check_header(header)
        levels = self._points[point_id].levels
        count = sum(self._sizes)
        raw = _decompress(bodies[0], count if levels <= 0xFF else 2 * count)
        flat = np.frombuffer(raw, dtype=np.uint8).astype(np.int16)
        if levels > 0xFF:
            flat = flat[:count] | (flat[count:] << 8)
        if int(flat.max()) > levels:
            raise PayloadError(f"a symbol of point {point_id} exceeds {levels}")
        tensors: list[SymbolArray] = []
        start = 0
        for shape, size in zip(self.shapes, self._sizes, strict=True):
            tensors.append(flat[start : start + size].reshape(shape))
            start += size
        return Symbols(point_id=point_id, tensors=tuple(tensors), layers=1, layer_count=1)


def _decompress(body: bytes, size: int) -> bytes:
    """Returns exactly `size` bytes and never allocates more, whatever the frame claims."""
    try:
        # A window wider than such a frame needs is refused before it is allocated.
        decompressor = zstandard.ZstdDecompressor(max_window_size=2 ** max(17, size.bit_length() + 1))
        with decompressor.stream_reader(body, read_across_frames=False) as reader:
            raw = reader.read(size + 1)
    except zstandard.ZstdError as error:
        raise PayloadError(f"the payload is no zstandard frame of this bundle: {error}") from error
    if len(raw) != size:
        raise PayloadError(f"the payload holds {'more' if len(raw) > size else len(raw)} symbols, expected {size}")
    return raw
