"""Residuals as table symbols: small ones directly, the rest as an escape and two flat symbols of 7 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splitters.codec.entropy.coder import Decoder, Encoder, IntArray, TableSet

_ESCAPE_BITS = 7
_FLAT = TableSet(np.full((1, 2**_ESCAPE_BITS), 2**16 >> _ESCAPE_BITS))


def put_residuals(encoder: Encoder, residual: IntArray, rows: NDArray[np.intp], tables: TableSet, radius: int) -> None:
    """Codes residuals (n,), each with its row of ``tables``; those beyond the tables' radius follow as escapes."""
    symbols = np.clip(residual, -radius, radius)
    symbols += radius
    encoder.put(symbols, tables, rows)
    far = np.abs(residual[(symbols == 0) | (symbols == 2 * radius)]) - radius
    if len(far):
        halves = np.stack([far >> _ESCAPE_BITS, far & (2**_ESCAPE_BITS - 1)], axis=1).astype(np.int32)
        encoder.put(halves.ravel(), _FLAT, np.zeros(halves.size, dtype=np.intp))


def get_residuals(decoder: Decoder, rows: NDArray[np.intp], tables: TableSet, radius: int) -> IntArray:
    """Reads what `put_residuals` wrote, (n,).

    Raises:
        PayloadError: the bytes cannot have come from these tables.
    """
    residual = decoder.get(tables, rows)
    residual -= radius
    far = np.flatnonzero(np.abs(residual) == radius)
    if len(far):
        halves = decoder.get(_FLAT, np.zeros(2 * len(far), dtype=np.intp)).reshape(-1, 2)
        residual[far] += np.sign(residual[far]) * ((halves[:, 0] << _ESCAPE_BITS) + halves[:, 1])
    return residual
