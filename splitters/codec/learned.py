"""The learned codec: range coding with frozen integer tables. Over 400 lines: one class answers one contract, form by form.

A key frame travels in layers of channels, each of which decodes with those before it. A frame predicted from a reference is one
layer: which cells change, how each is predicted, and the symbols of those.

Shapes: one latent (C, H, W), float32, no batch axis. Symbols are round(latent * gain[tier, channel]); the latent comes
back as symbols * ungain[tier, channel] (gain units: Cui et al. 2021, arXiv 2003.02012).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from protos.errors import BundleError, ConfigError, ModelError, PayloadError
from splitters.codec.base import MAX_ELEMENTS, Coded, Latent, LatentCodec, References, check_spec
from splitters.codec.entropy.coder import CoderFactory
from splitters.codec.entropy.context import Geometry
from splitters.codec.envelope import (
    MAX_LAYERS,
    MAX_POINTS,
    Header,
    PredictedHeader,
    belongs_to,
    is_predicted,
    open_layers,
    open_predicted,
    seal,
    seal_predicted,
)
from splitters.codec.predicted.change import DENSITIES, History, density, get_changes, next_history, put_changes, unknown_history
from splitters.codec.predicted.choice import DEFAULT_PRICE, Choice, choose_symbols, match
from splitters.codec.predicted.motion import neighbours, predicted
from splitters.codec.predicted.renewal import Cells, get_cells, put_cells
from splitters.codec.slices import ALL, Coding, Slicer
from splitters.codec.stages import MAX_SYMBOL, decode_layers, encode_layers
from splitters.codec.symbols import SymbolArray, Symbols
from splitters.codec.tables import SCENE_UNIT, Predicted, finest_tier, read_tables

_MAX_PRICE = 100.0
_LEAST_PRICE = 1e-3
_BUSY = 0.3  # a share of changed cells above which coding alone is thought of, and tried where it could be cheaper
# Bytes of a frame coded alone, in those of channels without contexts, geometrically distributed. Measured: .71 to .82 over five
# clips and five tiers.
_LEAST_SHARE = 0.6
# Of the price of a bit where a key frame is told from the scene: what it leaves out stays wrong until something moves there.
_SCENE_SHARE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    tier: int
    channels: int
    ends: tuple[int, ...]  # channel groups held by the first layer, the first two, ...
    price: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    """What a frame is predicted from, in its point's units.

    Attributes:
        values: (C, H * W).
        history: when and how its cells last changed.
        crc32: of the reference as it is held.
        frame: its id; None for the bundle's scene.
    """

    values: SymbolArray
    history: History
    crc32: int
    frame: int | None


class LearnedCodec(LatentCodec):
    """One latent, any bitrate.

    Args:
        spec: from `learned_spec`.
        tables: the bytes of the part it names.
        coder: ``auto``, ``constriction`` or ``pure``; all give the same bytes.

    Raises:
        BundleError: spec and tables do not hold together.
    """

    kind = "learned"

    def __init__(self, spec: Mapping[str, Any], tables: bytes, *, coder: str = "auto") -> None:
        check_spec(spec, self.kind)
        self._coders = CoderFactory(coder)
        self._tables = read_tables(tables)
        self.supports_reference = self._tables.predicted is not None
        try:
            channels, height, width = (int(n) for n in spec["shape"])
            self._gains = np.asarray(spec["gains"], dtype=np.float32)
            self._ungains = np.asarray(spec["ungains"], dtype=np.float32)
            entries = [
                (
                    str(p["id"]),
                    int(p["tier"]),
                    int(p["channels"]),
                    bool(p.get("single_layer", False)),
                    float(p.get("price", DEFAULT_PRICE)),
                )
                for p in spec["points"]
            ]
        except (LookupError, TypeError, ValueError) as error:
            raise BundleError(f"codec.json does not hold a learned codec: {error!r}") from error
        if min(height, width) < 1 or channels * height * width > MAX_ELEMENTS or channels != self._tables.channels:
            raise BundleError(
                f"a latent of {channels} x {height} x {width} does not fit the tables' {self._tables.channels} channels"
            )
        for gains in (self._gains, self._ungains):
            if gains.shape != (self._tables.tiers, channels) or not (np.isfinite(gains).all() and (gains > 0).all()):
                raise BundleError(f"gains must be {self._tables.tiers} x {channels} positive numbers")
        if not 1 <= len(entries) <= MAX_POINTS or len({entry[0] for entry in entries}) != len(entries):
            raise BundleError(f"a codec has 1..{MAX_POINTS} points of distinct ids")
        if len(self._tables.layers) > MAX_LAYERS:
            raise BundleError(f"a codec has at most {MAX_LAYERS} layers")
        self._points = {}
        for name, tier, kept, single, price in entries:
            if not (0 <= tier < self._tables.tiers and 1 <= kept <= channels):
                raise BundleError(f"point {name} names tier {tier} and {kept} channels, which do not exist")
            if not 0 <= price <= _MAX_PRICE:
                raise BundleError(f"point {name}: a bit's price lies in 0..{_MAX_PRICE:g}, not {price:g}")
            groups = sum(start < kept for start in (0, *self._tables.layers[:-1]))
            ends = (groups,) if single else tuple(range(1, groups + 1))
            self._points[name] = _Point(tier=tier, channels=kept, ends=ends, price=price)
        self.point_ids, self.shapes = tuple(self._points), ((channels, height, width),)
        self._geometry = Geometry(height, width)
        self._slicer = Slicer(height, width, self._tables, self._coders)
        self._near = neighbours(height, width)
        predicts = self._tables.predicted
        if predicts is not None and predicts.scene is not None and predicts.scene.shape != self.shapes[0]:
            raise BundleError(f"the bundle's scene is of shape {predicts.scene.shape}, its latents are {self.shapes[0]}")

    def layer_count(self, point_id: str) -> int:
        """One, or as many as groups of channels that the point's channels kept reach into."""
        return len(self._point(point_id).ends)

    def _point(self, point_id: str) -> _Point:
        if point_id not in self._points:
            raise ConfigError(f"no codec point {point_id!r}; this bundle has {', '.join(self.point_ids)}")
        return self._points[point_id]

    def _held(self, point: _Point, layers: int) -> int:
        """Channels that the first `layers` layers of a point hold."""
        return min(self._tables.layers[point.ends[layers - 1] - 1], point.channels)

    def quantise(self, latents: Sequence[Latent], point_id: str) -> Symbols:
        """See `LatentCodec.quantise`; channels that the point drops become zero.

        Raises:
            ConfigError: an unknown point, or a latent of another shape than the bundle's.
            ModelError: the latent holds NaN.
        """
        point = self._point(point_id)
        values = np.zeros(self.shapes[0], dtype=np.int16)
        values[: point.channels] = np.clip(np.rint(self._scaled(latents, point_id)), -MAX_SYMBOL, MAX_SYMBOL)
        return Symbols(point_id=point_id, tensors=(values,), layers=len(point.ends), layer_count=len(point.ends))

    def _scaled(self, latents: Sequence[Latent], point_id: str) -> Latent:
        """Latent times gain, of the channels kept."""
        point = self._point(point_id)
        (latent,) = self._check_latents(latents, point_id)
        scaled: Latent = latent[: point.channels] * self._gains[point.tier, : point.channels, None, None]
        if np.isnan(scaled.min()):  # NaN wins over every number
            raise ModelError("the head returned NaN in latent_0")
        return scaled

    def dequantise(self, symbols: Symbols) -> tuple[Latent, ...]:
        """See `LatentCodec.dequantise`."""
        self._check_symbols(symbols)
        ungain = self._ungains[self._point(symbols.point_id).tier, :, None, None]
        return (cast("Latent", symbols.tensors[0].astype(np.float32) * ungain),)

    def prefix(self, symbols: Symbols, layers: int) -> Symbols:
        """See `LatentCodec.prefix`."""
        if layers >= symbols.layers:
            return symbols
        values = symbols.tensors[0].copy()
        values[self._held(self._point(symbols.point_id), layers) :] = 0
        return Symbols(point_id=symbols.point_id, tensors=(values,), layers=layers, layer_count=symbols.layer_count)

    def compress(
        self, latents: Sequence[Latent], point_id: str, reference: Symbols | None = None, reference_frame: int | None = None
    ) -> Coded:
        """See `LatentCodec.compress`; a reference that would not help (a cut, a turned camera) is left out.

        Raises:
            ConfigError: an unknown point, or a latent of another shape than the bundle's.
            ModelError: the latent holds NaN.
        """
        if self._tables.predicted is None:
            return super().compress(latents, point_id)
        point = self._point(point_id)
        if reference is not None and reference_frame is not None:
            base = self._base(reference, point, reference_frame)
        elif self._tables.predicted.scene is not None:
            base = self._scene(self._tables.predicted.scene, point)
        else:
            return super().compress(latents, point_id)
        wanted = np.zeros((self._tables.channels, self._near.shape[1]), np.float32)
        scaled = np.clip(self._scaled(latents, point_id), -MAX_SYMBOL, MAX_SYMBOL)
        wanted[: point.channels] = scaled.reshape(point.channels, -1)
        costs = self._tables.predicted.costs[point.tier]
        price = point.price if base.frame is not None else point.price * _SCENE_SHARE
        choice = choose_symbols(wanted, base.values, self._near, costs, price, base.frame or 0, MAX_SYMBOL)
        payload, symbols = self._predict(choice, base, point_id)
        if choice.changed.mean() > _BUSY:
            alone = self.quantise(latents, point_id)
            flat = alone.tensors[0].reshape(wanted.shape)
            gain = np.square(wanted - choice.values).sum() - np.square(wanted - flat).sum()
            worth = len(payload) + gain / max(price, _LEAST_PRICE) / 8
            if _least_bytes(flat) < worth:
                payloads = tuple(self.encode(alone))
                if sum(map(len, payloads)) < worth:
                    return Coded(symbols=alone, payloads=payloads)
        return Coded(symbols=symbols, payloads=(payload,), reference=base.frame)

    def encode(self, symbols: Symbols, reference: Symbols | None = None, reference_frame: int | None = None) -> list[bytes]:
        """See `LatentCodec.encode`: exactly these symbols, in one layer where they are predicted."""
        self._check_symbols(symbols)
        point = self._point(symbols.point_id)
        values = symbols.tensors[0]
        held = self._held(point, symbols.layers) if symbols.layer_count == len(point.ends) else point.channels
        if int(values.max()) > MAX_SYMBOL or int(values.min()) < -MAX_SYMBOL or values[held:].any():
            raise ConfigError(f"symbols of {symbols.point_id} lie in -{MAX_SYMBOL}..{MAX_SYMBOL}, those not held are zero")
        ends = point.ends[: symbols.layers] if symbols.layer_count == len(point.ends) else point.ends
        bodies = encode_layers(values, ends, self._geometry, self._tables, point.tier, point.channels, self._coders)
        index = self.point_ids.index(symbols.point_id)
        alone = seal(Header(kind=self.kind, point_index=index, layer_count=len(point.ends)), bodies)
        if reference is None or reference_frame is None or self._tables.predicted is None or not symbols.complete:
            return alone
        base = self._base(reference, point, reference_frame)
        choice = match(values.reshape(base.values.shape), base.values, self._near)
        payload, _ = self._predict(choice, base, symbols.point_id)
        return [payload] if len(payload) < sum(map(len, alone)) else alone

    def encode_slices(self, symbols: Symbols) -> bytes | None:
        """See `LatentCodec.encode_slices`."""
        self._check_symbols(symbols)
        return self._slicer.encode(symbols.tensors[0], self._coding(symbols.point_id))

    def decode_slices(self, payload: bytes) -> Symbols:
        """See `LatentCodec.decode_slices`."""
        slices, header = self._slicer.open(payload)
        point_id = self._point_of(header.kind, header.point_index)
        return self._whole(point_id, *self._slicer.decode(slices, self._coding(point_id)))

    def with_holes(self, symbols: Symbols, held: int) -> Symbols:
        """See `LatentCodec.with_holes`."""
        found = self._slicer.with_holes(symbols.tensors[0], held, self._coding(symbols.point_id))
        return self._whole(symbols.point_id, found, held)

    def _whole(self, point_id: str, values: SymbolArray, held: int) -> Symbols:
        n = self.layer_count(point_id)
        return Symbols(point_id=point_id, tensors=(values,), layers=n, layer_count=n, held=held % ALL)

    def _coding(self, point_id: str) -> Coding:
        p, header = self._point(point_id), Header(kind=self.kind, point_index=self.point_ids.index(point_id), layer_count=1)
        return Coding(header=header, groups=p.ends[-1], tier=p.tier, channels=p.channels)

    def _base(self, reference: Symbols, point: _Point, frame: int) -> _Base:
        self._check_symbols(reference)
        history = reference.history if reference.history is not None else unknown_history(*self.shapes[0][1:])
        values = self._in_units(reference.tensors[0], self._point(reference.point_id).tier, point)
        return _Base(values=values, history=history, crc32=reference.crc32(), frame=frame)

    def _scene(self, scene: SymbolArray, point: _Point) -> _Base:
        """The scene in a point's units: one product and one rounding, exact."""
        gains = self._gains.astype(np.float64)
        ratio = gains[point.tier] / (SCENE_UNIT * gains[finest_tier(self._gains)])
        values = np.clip(np.rint(scene * ratio[:, None, None]), -MAX_SYMBOL, MAX_SYMBOL).astype(np.int16)
        values[point.channels :] = 0
        crc = zlib.crc32(np.ascontiguousarray(scene, dtype="<i2").tobytes())
        flat = values.reshape(len(values), -1)
        return _Base(values=flat, history=unknown_history(*scene.shape[1:]), crc32=crc, frame=None)

    def _in_units(self, values: SymbolArray, tier: int, point: _Point) -> SymbolArray:
        """Symbols (C, H * W) of a tier in a point's units; another tier's take one product and one rounding, exact."""
        if tier != point.tier:
            ratio = self._ungains[tier].astype(np.float64) * self._gains[point.tier]
            values = np.clip(np.rint(values * ratio[:, None, None]), -MAX_SYMBOL, MAX_SYMBOL).astype(np.int16)
        if values[point.channels :].any():
            values = values.copy()
            values[point.channels :] = 0
        return values.reshape(len(values), -1)

    def _predict(self, choice: Choice, base: _Base, point_id: str) -> tuple[bytes, Symbols]:
        """A predicted frame's payload, and what the receiver will hold."""
        point, tables = self._point(point_id), cast("Predicted", self._tables.predicted)
        encoder = self._coders.encoder()
        put_changes(encoder, tables.change, self._geometry, base.history, choice.changed, choice.modes)
        cells, values = Cells.of(choice.expected, choice.modes), choice.values[:, choice.changed]
        put_cells(encoder, tables.renewal[point.tier], tables.tables, self._tables.radius, cells, values, point.channels)
        header = PredictedHeader(
            kind=self.kind, point_index=self.point_ids.index(point_id), reference_byte=(base.frame or 0) & 0xFF,
            density=density(choice.changed), scene=base.frame is None,
        )  # fmt: skip
        return seal_predicted(header, encoder.finish(), base.crc32), self._followed(point_id, choice, base)

    def _followed(self, point_id: str, choice: Choice, base: _Base) -> Symbols:
        """What a frame leaves at both sides."""
        history = next_history(base.history, choice.changed, choice.modes)
        values = choice.values.reshape(self.shapes[0])
        return Symbols(point_id=point_id, tensors=(values,), layers=1, layer_count=1, history=history)

    def decode(self, layers: Sequence[bytes], references: References | None = None, *, strict: bool = False) -> Symbols:
        """See `LatentCodec.decode`."""
        if layers and is_predicted(layers[0]):
            return self._decode_predicted(layers, references or {})
        header, bodies = open_layers(layers, strict=strict)
        point_id = self._check_header(header)
        point = self._points[point_id]
        values = decode_layers(bodies, point.ends, self._geometry, self._tables, point.tier, point.channels, self._coders)
        return Symbols(point_id=point_id, tensors=(values,), layers=len(bodies), layer_count=len(point.ends))

    def _decode_predicted(self, layers: Sequence[bytes], references: References) -> Symbols:
        payload = bytes(layers[0])
        header, body = open_predicted(payload)
        point_id = self._point_of(header.kind, header.point_index)
        if len(layers) > 1:
            raise PayloadError(f"a predicted frame is one layer, {len(layers)} arrived")
        if self._tables.predicted is None:
            raise PayloadError("the payload is predicted from a frame, but this bundle has no tables for that: send a key frame")
        point, tables = self._points[point_id], self._tables.predicted
        base = self._reference(payload, header, references, point)
        if header.density >= DENSITIES:
            raise PayloadError(f"density class {header.density} is unknown to this release")
        decoder = self._coders.decoder(body)
        changed, modes = get_changes(decoder, tables.change, self._geometry, base.history, header.density)
        expected = predicted(base.values, self._near, np.flatnonzero(changed), modes)
        cells = Cells.of(expected, modes)
        found = get_cells(decoder, tables.renewal[point.tier], tables.tables, self._tables.radius, cells, point.channels)
        if found.size and np.abs(found).max() > MAX_SYMBOL:
            raise PayloadError(f"a symbol exceeds {MAX_SYMBOL}: the payload is not of this bundle")
        values = base.values.copy()
        values[:, changed] = found
        return self._followed(point_id, Choice(values=values, changed=changed, modes=modes, expected=expected), base)

    def _reference(self, payload: bytes, header: PredictedHeader, references: References, point: _Point) -> _Base:
        """Exactly what a frame was predicted from: the scene, or the newest frame held whose id ends so."""
        if header.scene:
            scene = cast("Predicted", self._tables.predicted).scene
            if scene is None:
                raise PayloadError("the payload is predicted from a site's scene, but this bundle holds none: send a key frame")
            base = self._scene(scene, point)
            if not belongs_to(payload, base.crc32):
                raise PayloadError("the payload is damaged, or predicted from another scene: send a key frame")
            return base
        frame = max((f for f in references if f & 0xFF == header.reference_byte), default=None)
        if frame is None:
            low = header.reference_byte
            raise PayloadError(f"the payload is predicted from a frame ...{low}, which is not held: send a key frame")
        base = self._base(references[frame], point, frame)
        if not belongs_to(payload, base.crc32):
            raise PayloadError(f"the payload is damaged, or frame {frame} is held with other symbols: send a key frame")
        return base


def _least_bytes(values: SymbolArray) -> float:
    """What coding (C, N) symbols alone takes at the very least, roughly; a tenth of the time of coding them."""
    size = np.abs(values).mean(axis=1, dtype=np.float64)
    bits = (1 + size) * np.log2(1 + size) - size * np.log2(np.maximum(size, 1e-9)) + 0.9 * size
    return float(_LEAST_SHARE * values.shape[1] * bits.sum() / 8)
