"""Walks a latent's symbols stage by stage; the encoder and the decoder are the same walk.

A stage looks at no cell that comes after it, so the encoder may know the whole frame from the start.

Shape legend: C channels, H x W cells, G channels of a layer, P cells of a pass, S padded cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from protos.errors import PayloadError
from splitters.codec.entropy.coder import CoderFactory, TableSet
from splitters.codec.entropy.context import (
    MAX_FEATURE,
    PASSES,
    Exact,
    Geometry,
    Index,
    Integers,
    Stage,
    State,
    choose,
    predict,
)
from splitters.codec.entropy.residuals import get_residuals, put_residuals
from splitters.codec.symbols import SymbolArray
from splitters.codec.tables import Tables

MAX_SYMBOL = 2047


class Walk:
    """One frame's symbols in the making, with the contexts they give.

    Args:
        geometry: of the plane.
        tables: the bundle's.
        tier: of the weights.
        channels: that are coded.
        values: (C, H * W) symbols; zeros, or what an encoder knows.
    """

    def __init__(self, geometry: Geometry, tables: Tables, tier: int, channels: int, values: SymbolArray) -> None:
        self._geometry, self._tables, self._channels, self.values = geometry, tables, channels, values
        self._weights = tables.intra.weights[tier]
        shape = (-1, geometry.height, geometry.width)
        planes = geometry.pad(np.clip(values, -MAX_FEATURE, MAX_FEATURE).reshape(shape), self._weights.mean_bias.dtype.type)
        activity = np.zeros((2 * len(tables.layers), geometry.size), planes.dtype)
        self._state = State(planes=planes, activity=activity)

    def stages(self, layer: int) -> Iterator[Stage]:
        """The passes of one layer that have any cells, clipped to the channels kept."""
        start = self._tables.layers[layer - 1] if layer else 0
        stop = min(self._tables.layers[layer], self._channels)
        for k in range(PASSES):
            if len(self._geometry.passes[k].cells):
                yield Stage(layer=layer, start=start, stop=stop, number=k)

    def expect(self, stage: Stage) -> tuple[Integers, Index, TableSet]:
        """Rounded expectation (G, P) of a stage's symbols, their table rows (G, P) and the tables."""
        rounded, row = choose(*predict(self._geometry, self._weights, self._state, stage))
        return rounded, row, self._tables.intra.tables

    def accept(self, stage: Stage, values: Integers) -> None:
        """Takes a stage's symbols (G, P) as known."""
        where = self._geometry.passes[stage.number]
        rows = slice(stage.start, stage.stop)
        self.values[rows, where.raster] = values
        self._state.planes[rows, where.cells] = np.clip(values, -MAX_FEATURE, MAX_FEATURE)

    def close(self, layer: int) -> None:
        """Sums a complete layer's activity for the layers after it."""
        start = self._tables.layers[layer - 1] if layer else 0
        rows = slice(start, self._tables.layers[layer])
        self._state.activity[2 * layer : 2 * layer + 2] = self._geometry.activity(self._state.planes[rows])


def encode_layers(
    symbols: SymbolArray, ends: Sequence[int], geometry: Geometry, tables: Tables, tier: int, channels: int, coders: CoderFactory
) -> list[bytes]:
    """Codes (C, H, W) symbols into one body per payload layer.

    `ends` says how many groups of channels each body, with those before it, holds; rising. Later channels than `channels` are
    zero.
    """
    flat = symbols.reshape(len(symbols), -1)
    walk = Walk(geometry, tables, tier, channels, flat)
    bodies = []
    for first, last in zip((0, *ends), ends, strict=False):
        encoder = coders.encoder()
        for group in range(first, last):
            for stage in walk.stages(group):
                expected, rows, table_set = walk.expect(stage)
                values = flat[stage.start : stage.stop, geometry.passes[stage.number].raster]
                put_residuals(encoder, (values - expected).ravel(), rows.ravel(), table_set, tables.radius)
            walk.close(group)
        bodies.append(encoder.finish())
    return bodies


def decode_layers(
    bodies: Sequence[bytes], ends: Sequence[int], geometry: Geometry, tables: Tables, tier: int, channels: int, coders: CoderFactory
) -> SymbolArray:
    """Returns (C, H, W) symbols; channels of layers without a body are zero.

    Raises:
        PayloadError: the bytes cannot have come from these tables.
    """
    walk = Walk(geometry, tables, tier, channels, np.zeros((tables.channels, geometry.height * geometry.width), np.int16))
    for body, first, last in zip(bodies, (0, *ends), ends, strict=False):
        decoder = coders.decoder(body)
        for group in range(first, last):
            for stage in walk.stages(group):
                expected, rows, table_set = walk.expect(stage)
                residual = get_residuals(decoder, rows.ravel(), table_set, tables.radius)
                values = expected + residual.reshape(expected.shape)
                if np.abs(values).max() > MAX_SYMBOL:
                    raise PayloadError(f"a symbol exceeds {MAX_SYMBOL}: the payload is not of this bundle")
                walk.accept(stage, values)
            walk.close(group)
    return walk.values.reshape(-1, geometry.height, geometry.width)


def padded_planes(geometry: Geometry, symbols: NDArray[np.integer]) -> Exact:
    """Saturated symbols (C, H, W) as the contexts see them, (C, S)."""
    return geometry.pad(np.clip(symbols, -MAX_FEATURE, MAX_FEATURE))
