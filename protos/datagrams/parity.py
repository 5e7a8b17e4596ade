"""Erasure coding: any k of the k + r pieces of a message restore it. Systematic: the first k are the message itself.

Parity is a Cauchy matrix over GF(2^8) with the polynomial 0x11d (Blömer et al. 1995), every square part of which can be
inverted. One table of all products makes a row of parity one look-up and one exclusive or for each piece of data.

Shape legend: k pieces of data, r pieces of parity, n bytes of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

MAX_DATA = 128
MAX_PARITY = 128
_POLYNOMIAL = 0x11D


@cache
def _logarithms() -> tuple[Bytes, NDArray[np.int64]]:
    """Powers of the generator 2, (510,), and their inverse, (256,); the logarithm of 0 stands for nothing."""
    power = np.zeros(510, np.uint8)
    log = np.zeros(256, np.int64)
    value = 1
    for exponent in range(255):
        power[exponent] = power[exponent + 255] = value
        log[value] = exponent
        value = value << 1 ^ (_POLYNOMIAL if value & 0x80 else 0)
    return power, log


@cache
def _products() -> Bytes:
    """All products, (256, 256)."""
    power, log = _logarithms()
    table: Bytes = power[log[:, None] + log[None, :]]
    table[0] = table[:, 0] = 0
    return table


def _inverse(value: int) -> int:
    power, log = _logarithms()
    return int(power[255 - log[value]])


def _row(index: int, count: int) -> Bytes:
    """What parity ``index`` takes of each of ``count`` pieces of data, (k,). Of one piece every parity is a copy."""
    if count == 1:
        return np.ones(1, np.uint8)
    return np.array([_inverse((MAX_DATA + index) ^ column) for column in range(count)], np.uint8)


def parity(data: Bytes, count: int) -> Bytes:
    """Parity, (r, n), of data (k, n).

    Raises:
        ValueError: more pieces than the code has.
    """
    if not 1 <= len(data) <= MAX_DATA or not 0 <= count <= MAX_PARITY:
        raise ValueError(f"the code has 1..{MAX_DATA} pieces of data and at most {MAX_PARITY} of parity")
    rows = [_row(index, len(data)) for index in range(count)]
    return np.stack([_combined(row, data) for row in rows]) if rows else np.zeros((0, data.shape[1]), np.uint8)


def _combined(row: Bytes, data: Bytes) -> Bytes:
    products = _products()
    total: Bytes = products[row[0]][data[0]]
    for factor, piece in zip(row[1:], data[1:], strict=True):
        total ^= products[factor][piece]
    return total


def restore(pieces: Mapping[int, bytes], count: int) -> bytes | None:
    """The k pieces of data, one after the other, from any k pieces by their index; None: there are too few.

    Args:
        pieces: all of one length; an index of ``count`` or above is parity.
        count: k.
    """
    if len(pieces) < count:
        return None
    missing = [index for index in range(count) if index not in pieces]
    if missing:
        pieces = {**pieces, **_solved(pieces, count, missing)}
    return b"".join(pieces[index] for index in range(count))


def _solved(pieces: Mapping[int, bytes], count: int, missing: Sequence[int]) -> dict[int, bytes]:
    """The missing data: what parity says less the data held, times the inverse of the part of the matrix that is left."""
    products = _products()
    used = [index for index in pieces if index >= count][: len(missing)]
    rows = np.stack([_row(index - count, count) for index in used])
    right = np.stack([np.frombuffer(pieces[index], np.uint8) for index in used]).copy()
    for index in range(count):
        if index in pieces:
            held = np.frombuffer(pieces[index], np.uint8)
            right ^= products[rows[:, index, None], held[None, :]]
    left = rows[:, list(missing)].copy()
    for at in range(len(missing)):
        pivot = at + int(np.flatnonzero(left[at:, at])[0])
        left[[at, pivot]], right[[at, pivot]] = left[[pivot, at]], right[[pivot, at]]
        factor = _inverse(int(left[at, at]))
        left[at], right[at] = products[factor][left[at]], products[factor][right[at]]
        for other in range(len(missing)):
            if other != at and left[other, at]:
                factor = int(left[other, at])
                left[other] ^= products[factor][left[at]]
                right[other] ^= products[factor][right[at]]
    return {index: right[at].tobytes() for at, index in enumerate(missing)}
