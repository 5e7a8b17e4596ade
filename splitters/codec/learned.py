"""The learned codec: gain tiers x channels kept, layers of channels, range coding with frozen integer tables.

Shapes: one latent (C, H, W), float32, no batch axis. Symbols are round(latent * gain[tier, channel]); the latent comes
back as symbols * ungain[tier, channel] (gain units: Cui et al. 2021, arXiv 2003.02012).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ConfigError, ModelError, PayloadError
from splitters.codec.base import MAX_ELEMENTS, SPEC_VERSION, Latent, LatentCodec, References, Spec, check_spec
from splitters.codec.coder import CoderFactory
from splitters.codec.context import Geometry
from splitters.codec.envelope import MAX_LAYERS, MAX_POINTS, Header, Reference, open_layers, seal
from splitters.codec.stages import MAX_SYMBOL, Plan, decode_layers, encode_layers
from splitters.codec.symbols import SymbolArray, Symbols
from splitters.codec.tables import read_tables


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    tier: int
    channels: int
    ends: tuple[int, ...]  # channel groups held by the first layer, the first two, ...


def learned_spec(
    *,
    shape: tuple[int, int, int],
    gains: NDArray[np.floating[Any]],
    ungains: NDArray[np.floating[Any]],
    points: Mapping[str, tuple[int, int]],
    tables_path: str,
    single_layer: Collection[str] = (),
) -> Spec:
    """Builds the spec `codec_from_spec` reads.

    Args:
        shape: C, H, W of the latent.
        gains: (tiers, C), symbols = round(latent * gain).
        ungains: (tiers, C), latent = symbols * ungain; usually near 1 / gain.
        points: codec point id → (tier, channels kept).
        tables_path: the bundle part that holds the bytes from `fit_tables`.
        single_layer: points whose frames travel in one layer: at a few hundred bytes a further layer's 5 bytes of
            number and checksum, and its own ending of the range code, cost more than refinement is worth.
    """
    return {
        "kind": "learned",
        "version": SPEC_VERSION,
        "shape": [int(n) for n in shape],
        "gains": [[float(np.float32(g)) for g in row] for row in gains],
        "ungains": [[float(np.float32(g)) for g in row] for row in ungains],
        "points": [
            {"id": name, "tier": int(tier), "channels": int(kept), "single_layer": name in single_layer}
            for name, (tier, kept) in points.items()
        ],
        "tables": tables_path,
    }


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
        self.supports_reference = self._tables.inter is not None
        try:
            channels, height, width = (int(n) for n in spec["shape"])
            self._gains = np.asarray(spec["gains"], dtype=np.float32)
            self._ungains = np.asarray(spec["ungains"], dtype=np.float32)
            entries = [
                (str(p["id"]), int(p["tier"]), int(p["channels"]), bool(p.get("single_layer", False))) for p in spec["points"]
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
        for name, tier, kept, single in entries:
            if not (0 <= tier < self._tables.tiers and 1 <= kept <= channels):
                raise BundleError(f"point {name} names tier {tier} and {kept} channels, which do not exist")
            groups = sum(start < kept for start in (0, *self._tables.layers[:-1]))
            ends = (groups,) if single else tuple(range(1, groups + 1))
            self._points[name] = _Point(tier=tier, channels=kept, ends=ends)
        self.point_ids = tuple(self._points)
        self.shapes = ((channels, height, width),)
        self._geometry = Geometry(height, width)

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
        (latent,) = self._check_latents(latents, point_id)
        scaled = np.rint(latent[: point.channels] * self._gains[point.tier, : point.channels, None, None])
        if np.isnan(scaled).any():
            raise ModelError("the head returned NaN in latent_0")
        values = np.zeros(self.shapes[0], dtype=np.int16)
        values[: point.channels] = np.clip(scaled, -MAX_SYMBOL, MAX_SYMBOL)
        return Symbols(point_id=point_id, tensors=(values,), layers=len(point.ends), layer_count=len(point.ends))

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

    def encode(self, symbols: Symbols, reference: Symbols | None = None, reference_frame: int | None = None) -> list[bytes]:
        """See `LatentCodec.encode`; a reference that would not help (a cut, a turned camera) is left out."""
        self._check_symbols(symbols)
        point = self._point(symbols.point_id)
        values = symbols.tensors[0]
        if int(values.max()) > MAX_SYMBOL or int(values.min()) < -MAX_SYMBOL or values[self._held(point, symbols.layers) :].any():
            raise ConfigError(f"symbols of {symbols.point_id} lie in -{MAX_SYMBOL}..{MAX_SYMBOL}, those not held are zero")
        ends = point.ends[: symbols.layers]
        plan = Plan(tier=point.tier, channels=point.channels)
        named = None
        if reference is not None and reference_frame is not None and self._tables.inter is not None:
            predicted = self._plan(point, reference)
            if self._helps(values, plan, predicted, ends):
                plan = predicted
                named = Reference(frame_id=reference_frame, layers=reference.layers, crc32=reference.crc32())
        bodies = self._bodies(values, plan, ends)
        header = Header(
            kind=self.kind,
            point_index=self.point_ids.index(symbols.point_id),
            layer_count=symbols.layer_count,
            reference=named,
        )
        return seal(header, bodies)

    def _bodies(self, values: SymbolArray, plan: Plan, ends: Sequence[int]) -> list[bytes]:
        return encode_layers(values, ends, self._geometry, self._tables, plan, self._coders)

    def _helps(self, values: SymbolArray, alone: Plan, predicted: Plan, ends: Sequence[int]) -> bool:
        """Whether prediction saves bytes: clear from the sums as a rule, else from coding the base layer both ways."""
        held = min(predicted.reference_channels, self._tables.layers[ends[-1] - 1])
        now = values[:held].astype(np.int32)
        change = int(np.abs(now - cast("SymbolArray", predicted.reference)[:held]).sum())
        whole = int(np.abs(now).sum())
        if change >= whole or 3 * change < whole:
            return change < whole
        sizes = [len(self._bodies(values, plan, ends[:1])[0]) for plan in (alone, predicted)]
        return sizes[1] < sizes[0]

    def decode(self, layers: Sequence[bytes], references: References | None = None, *, strict: bool = False) -> Symbols:
        """See `LatentCodec.decode`."""
        header, bodies = open_layers(layers, strict=strict)
        point_id = self._check_header(header)
        point = self._points[point_id]
        plan = Plan(tier=point.tier, channels=point.channels)
        if header.reference is not None:
            plan = self._plan(point, self._find(header.reference, references))
        values = decode_layers(bodies, point.ends, self._geometry, self._tables, plan, self._coders)
        return Symbols(point_id=point_id, tensors=(values,), layers=len(bodies), layer_count=len(point.ends))

    def _find(self, wanted: Reference, references: References | None) -> Symbols:
        """Returns exactly the symbols a frame was predicted from."""
        if self._tables.inter is None:
            raise PayloadError("the payload is predicted from a frame, but this bundle has no tables for that")
        held = references.get(wanted.frame_id) if references is not None else None
        if held is None:
            raise PayloadError(f"the payload is predicted from frame {wanted.frame_id}, which is not held: send a key frame")
        if not 1 <= wanted.layers <= held.layers:
            raise PayloadError(
                f"the payload is predicted from {wanted.layers} layers of frame {wanted.frame_id},"
                f" of which {held.layers} are held: send a key frame"
            )
        self._check_symbols(held)
        exact = self.prefix(held, wanted.layers)
        if exact.crc32() != wanted.crc32:
            raise PayloadError(
                f"frame {wanted.frame_id} is held with other symbols than the payload is predicted from: send a key frame"
            )
        return exact

    def _plan(self, point: _Point, reference: Symbols) -> Plan:
        """A predicted frame's plan; a reference of another tier is rescaled (one product and one rounding, exact)."""
        self._check_symbols(reference)
        other = self._point(reference.point_id)
        values = reference.tensors[0]
        if other.tier != point.tier:
            ratio = self._ungains[other.tier].astype(np.float64) * self._gains[point.tier]
            values = np.clip(np.rint(values * ratio[:, None, None]), -MAX_SYMBOL, MAX_SYMBOL).astype(np.int16)
        return Plan(
            tier=point.tier,
            channels=point.channels,
            reference=values,
            reference_channels=self._held(other, reference.layers),
        )
