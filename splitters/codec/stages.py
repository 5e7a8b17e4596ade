"""Walks a latent's symbols stage by stage; the encoder and the decoder are the same walk.

Shape legend: C channels, H x W cells, G channels of a layer, P cells of a pass, S padded cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.errors import PayloadError
from splitters.codec.coder import CoderFactory, Decoder, Encoder, TableSet
from splitters.codec.context import MAX_FEATURE, PASSES, Exact, Geometry, Stage, State, choose, predict
from splitters.codec.symbols import SymbolArray
from splitters.codec.tables import Mode, Tables

MAX_SYMBOL = 2047
# Escapes carry the excess over the table in two flat symbols of 7 bits.
_ESCAPE_BITS = 7
_FLAT = TableSet(np.full((1, 2**_ESCAPE_BITS), 2**16 >> _ESCAPE_BITS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How one frame is walked.

    Attributes:
        tier: gain tier.
        channels: channels kept; later ones are zero.
        reference: (C, H, W) symbols in this tier's units, or None.
        reference_channels: how many of its channels are held; layers beyond are coded on their own.
    """

    tier: int
    channels: int
    reference: SymbolArray | None = None
    reference_channels: int = 0


class Walk:
    """One frame's symbols in the making, with the contexts they give."""

    def __init__(self, geometry: Geometry, tables: Tables, plan: Plan) -> None:
        self._geometry, self._tables, self._plan = geometry, tables, plan
        channels, cells = tables.channels, geometry.height * geometry.width
        self.values = np.zeros((channels, cells), dtype=np.int64)
        rows = 2 * len(tables.layers)
        self._intra = State(planes=np.zeros((channels, geometry.size)), activity=np.zeros((rows, geometry.size)))
        self._inter: State | None = None
        self._reference: NDArray[np.int64] | None = None
        if plan.reference is not None and tables.inter is not None:
            self._reference = plan.reference.reshape(channels, cells).astype(np.int64)
            own = geometry.pad(np.clip(plan.reference, -MAX_FEATURE, MAX_FEATURE))
            self._inter = State(planes=np.zeros((channels, geometry.size)), activity=np.zeros((rows, geometry.size)), own=own)

    def stages(self, layer: int) -> Iterator[Stage]:
        """The passes of one layer that have any cells, clipped to the channels kept."""
        start = self._tables.layers[layer - 1] if layer else 0
        stop = min(self._tables.layers[layer], self._plan.channels)
        for k in range(PASSES):
            if len(self._geometry.passes[k].cells):
                yield Stage(layer=layer, start=start, stop=stop, number=k)

    def expect(self, stage: Stage) -> tuple[NDArray[np.int64], NDArray[np.intp], TableSet]:
        """Rounded expectation (G, P) of a stage's symbols, their table rows (G, P) and the tables."""
        mode, state, base = self._mode(stage)
        mean, scale = predict(self._geometry, mode.weights[self._plan.tier], state, stage)
        rounded, row = choose(mean, scale)
        if base is not None:
            rounded += base[stage.start : stage.stop, self._geometry.passes[stage.number].raster]
        return rounded, row, mode.tables

    def accept(self, stage: Stage, values: NDArray[np.int64]) -> None:
        """Takes a stage's symbols (G, P) as known."""
        where = self._geometry.passes[stage.number]
        rows = slice(stage.start, stage.stop)
        self.values[rows, where.raster] = values
        self._intra.planes[rows, where.cells] = np.clip(values, -MAX_FEATURE, MAX_FEATURE)
        if self._inter is not None and self._reference is not None:
            difference = values - self._reference[rows, where.raster]
            self._inter.planes[rows, where.cells] = np.clip(difference, -MAX_FEATURE, MAX_FEATURE)

    def close(self, layer: int) -> None:
        """Sums a complete layer's activity for the layers after it."""
        start = self._tables.layers[layer - 1] if layer else 0
        rows = slice(start, self._tables.layers[layer])
        for state in (self._intra, self._inter):
            if state is not None:
                state.activity[2 * layer : 2 * layer + 2] = self._geometry.activity(state.planes[rows])

    def _mode(self, stage: Stage) -> tuple[Mode, State, NDArray[np.int64] | None]:
        if self._inter is not None and self._tables.inter is not None and stage.stop <= self._plan.reference_channels:
            return self._tables.inter, self._inter, self._reference
        return self._tables.intra, self._intra, None


def encode_layers(
    symbols: SymbolArray, ends: Sequence[int], geometry: Geometry, tables: Tables, plan: Plan, coders: CoderFactory
) -> list[bytes]:
    """Codes (C, H, W) symbols into one body per payload layer.

    `ends` says how many groups of channels each body, with those before it, holds; rising.
    """
    walk = Walk(geometry, tables, plan)
    flat = symbols.reshape(len(symbols), -1).astype(np.int64)
    bodies = []
    for first, last in zip((0, *ends), ends, strict=False):
        encoder = coders.encoder()
        for group in range(first, last):
            for stage in walk.stages(group):
                expected, rows, table_set = walk.expect(stage)
                values = flat[stage.start : stage.stop, geometry.passes[stage.number].raster]
                _put(encoder, (values - expected).ravel(), rows.ravel(), table_set, tables.radius)
                walk.accept(stage, values)
            walk.close(group)
        bodies.append(encoder.finish())
    return bodies


def decode_layers(
    bodies: Sequence[bytes], ends: Sequence[int], geometry: Geometry, tables: Tables, plan: Plan, coders: CoderFactory
) -> SymbolArray:
    """Returns (C, H, W) symbols; channels of layers without a body are zero.

    Raises:
        PayloadError: the bytes cannot have come from these tables.
    """
    walk = Walk(geometry, tables, plan)
    for body, first, last in zip(bodies, (0, *ends), ends, strict=False):
        decoder = coders.decoder(body)
        for group in range(first, last):
            for stage in walk.stages(group):
                expected, rows, table_set = walk.expect(stage)
                residual = _get(decoder, rows.ravel(), table_set, tables.radius)
                values = expected + residual.reshape(expected.shape)
                if np.abs(values).max() > MAX_SYMBOL:
                    raise PayloadError(f"a symbol exceeds {MAX_SYMBOL}: the payload is not of this bundle")
                walk.accept(stage, values)
            walk.close(group)
    return walk.values.reshape(-1, geometry.height, geometry.width).astype(np.int16)


def _put(encoder: Encoder, residual: NDArray[np.int64], rows: NDArray[np.intp], tables: TableSet, radius: int) -> None:
    clipped = np.clip(residual, -radius, radius)
    encoder.put((clipped + radius).astype(np.int32), tables, rows)
    far = np.abs(residual[np.abs(clipped) == radius]) - radius
    if len(far):
        halves = np.stack([far >> _ESCAPE_BITS, far & (2**_ESCAPE_BITS - 1)], axis=1).astype(np.int32)
        encoder.put(halves.ravel(), _FLAT, np.zeros(halves.size, dtype=np.intp))


def _get(decoder: Decoder, rows: NDArray[np.intp], tables: TableSet, radius: int) -> NDArray[np.int64]:
    residual = decoder.get(tables, rows).astype(np.int64) - radius
    far = np.flatnonzero(np.abs(residual) == radius)
    if len(far):
        halves = decoder.get(_FLAT, np.zeros(2 * len(far), dtype=np.intp)).reshape(-1, 2).astype(np.int64)
        residual[far] += np.sign(residual[far]) * ((halves[:, 0] << _ESCAPE_BITS) + halves[:, 1])
    return residual


def padded_planes(geometry: Geometry, symbols: NDArray[np.integer]) -> Exact:
    """Saturated symbols (C, H, W) as the contexts see them, (C, S)."""
    return geometry.pad(np.clip(symbols, -MAX_FEATURE, MAX_FEATURE))
