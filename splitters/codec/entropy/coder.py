"""Range coding with frozen integer tables; two coders, the same bytes.

`ConstrictionCoder` calls the compiled library `constriction`; `PureCoder` needs nothing but Python, for machines the
library has no wheel for (aarch64 Linux). Both implement range coding (Martin 1979; the variant of Bamler 2022,
arXiv 2201.01741): 64-bit state, 32-bit words, 24-bit probabilities.

A table is a row of integer frequencies that sum to 2^16 and are all positive. `constriction` takes floats, which it
turns into fixed point as ``floor(cumulative * (2^24 - K) / sum) + index``; handing it ``256 * frequency - 1`` makes
that sum exactly 2^24 - K, so every step is an exact integer in float32 and no rounding is left to differ.

A body is the shortest byte string that, followed by zeros, lies in the final interval (big-endian).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError, PayloadError

try:
    import constriction as _constriction
except ImportError:  # no wheel for this machine: the pure coder takes over
    _constriction = None

TABLE_BITS = 16
_SHIFT = 24 - TABLE_BITS
_WORD = 2**32
_STATE_MASK = 2**64 - 1
_WINDOW = 15
_CHUNK = 2704  # symbols searched in one window; its tables stay in the processor's cache
_SHORT = 2**18  # bytes of a body, above which no window is tried: it would be copied each time
_MISSES = 1.0  # expected of a chunk, above which no window is tried

IntArray = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The likeliest entries of every table, those to either side of them taken together: cheaper to search.

    Attributes:
        weights: (T, _WINDOW + 2), the outermost two of everything that lies outside.
        shift: (T,) what to add to an entry's place to have its place in the table.
        missed: (T,) probability of what lies outside.
    """

    weights: NDArray[np.float32]
    shift: IntArray
    missed: NDArray[np.float32]


class TableSet:
    """Frozen tables, prepared for both coders.

    Args:
        frequencies: (T, K) positive integers, every row sums to 2^16; K ≥ 2.
    """

    def __init__(self, frequencies: NDArray[np.integer[Any]]) -> None:
        rows = frequencies.astype(np.int64)
        if rows.ndim != 2 or rows.shape[1] < 2 or (rows < 1).any() or (rows.sum(axis=1) != 2**TABLE_BITS).any():
            raise ValueError(f"a table is a row of positive frequencies that sum to 2^{TABLE_BITS}")
        self.frequencies = rows
        self.weights = (rows * 2**_SHIFT - 1).astype(np.float32)
        self._cumulative: list[list[int]] | None = None
        self._narrow: tuple[IntArray, NDArray[np.float32]] | None = None
        self._window: Window | None = None

    @property
    def cumulative(self) -> list[list[int]]:
        """Left cumulative frequencies, K + 1 per table; built when first asked for."""
        if self._cumulative is None:
            padded = np.concatenate([np.zeros((len(self.frequencies), 1), np.int64), np.cumsum(self.frequencies, axis=1)], axis=1)
            self._cumulative = padded.tolist()
        return self._cumulative

    @property
    def narrow(self) -> tuple[IntArray, NDArray[np.float32]]:
        """For every entry a table of three in which it keeps its interval, and its place there; built when first asked for.

        An encoder needs no more of a table than where its symbol lies: below it, the symbol, above it. Where nothing lies on
        one side, the other is divided in two.

        Returns:
            Places (T * K,) and weights (T * K, 3).
        """
        if self._narrow is None:
            wide = self.frequencies << _SHIFT
            left = np.cumsum(wide, axis=1) - wide
            right = 2**24 - left - wide
            first, last = left == 0, right == 0
            parts = np.stack([left, wide, right], axis=2)
            parts[first] = np.stack([wide[first], right[first] // 2, right[first] - right[first] // 2], axis=1)
            parts[last] = np.stack([left[last] // 2, left[last] - left[last] // 2, wide[last]], axis=1)
            places = np.where(first, 0, np.where(last, 2, 1)).astype(np.int32).ravel()
            self._narrow = places, (parts - 1).astype(np.float32).reshape(-1, 3)
        return self._narrow

    @property
    def window(self) -> Window | None:
        """The likeliest part of every table; built when first asked for, None where tables are hardly wider."""
        size = self.frequencies.shape[1]
        if self._window is None and size > 2 * _WINDOW:
            edges = np.concatenate([np.zeros((len(self.frequencies), 1), np.int64), np.cumsum(self.frequencies, axis=1)], axis=1)
            first = (edges[:, 1 + _WINDOW : size] - edges[:, 1 : size - _WINDOW]).argmax(axis=1) + 1
            ends = np.take_along_axis(edges, first[:, None] + np.arange(_WINDOW + 1), axis=1)
            parts = np.diff(ends, axis=1, prepend=0, append=2**TABLE_BITS)
            # The least frequency is a floor, much above the probability of what never came.
            missed = (parts[:, [0, -1]].sum(axis=1) - (size - _WINDOW)) / 2**TABLE_BITS
            self._window = Window(
                weights=(parts * 2**_SHIFT - 1).astype(np.float32),
                shift=(first - 1).astype(np.int32),
                missed=missed.astype(np.float32),
            )
        return self._window


class Encoder(ABC):
    """Codes one layer's body."""

    @abstractmethod
    def put(self, symbols: IntArray, tables: TableSet, index: NDArray[np.intp]) -> None:
        """Appends symbols (n,), each coded with row ``index`` (n,) of ``tables``."""

    @abstractmethod
    def finish(self) -> bytes:
        """Returns the body."""


class Decoder(ABC):
    """Reads one layer's body."""

    @abstractmethod
    def get(self, tables: TableSet, index: NDArray[np.intp]) -> IntArray:
        """Returns the next symbols, (n,), coded with rows ``index``.

        Raises:
            PayloadError: the bytes cannot have come from these tables.
        """


def _shortest(low: int, span: int, size: int) -> bytes:
    """The shortest big-endian string that, followed by zeros, lies in [low, low + span), a number of `size` bytes.

    `span` is below 2^64, so at most one multiple of 2^64 lies there, and no string shorter than its need be tried.
    """
    for length in range(max(0, size - 8), size + 1):
        shift = 8 * (size - length)
        value = -(-low >> shift)
        if value << shift < low + span:
            return value.to_bytes(length, "big").rstrip(b"\0")
    raise AssertionError("the interval of a range coder is never empty")


class PureEncoder(Encoder):
    """The same bytes as `ConstrictionEncoder`, in Python integers."""

    def __init__(self) -> None:
        self._words: list[int] = []
        self._low = 0
        self._span = _STATE_MASK

    def put(self, symbols: IntArray, tables: TableSet, index: NDArray[np.intp]) -> None:
        """See `Encoder.put`."""
        cumulative, words, low, span = tables.cumulative, self._words, self._low, self._span
        for symbol, row in zip(symbols.tolist(), index.tolist(), strict=True):
            left = cumulative[row][symbol]
            scale = span >> 24
            span = scale * ((cumulative[row][symbol + 1] - left) << _SHIFT)
            low += scale * (left << _SHIFT)
            if low > _STATE_MASK:  # carry into the words written before
                low &= _STATE_MASK
                at = len(words) - 1
                while words[at] == _WORD - 1:
                    words[at] = 0
                    at -= 1
                words[at] += 1
            if span < _WORD:
                span <<= 32
                words.append(low >> 32)
                low = low << 32 & _STATE_MASK
        self._low, self._span = low, span

    def finish(self) -> bytes:
        """See `Encoder.finish`."""
        lead = b"".join(word.to_bytes(4, "big") for word in self._words)
        return _shortest((int.from_bytes(lead, "big") << 64) + self._low, self._span, len(lead) + 8)


class PureDecoder(Decoder):
    """The same symbols as `ConstrictionDecoder`, in Python integers."""

    def __init__(self, body: bytes) -> None:
        self._body = body + bytes(-len(body) % 4)
        self._at = 8
        self._point = int.from_bytes(self._body[:8].ljust(8, b"\0"), "big")  # relative to the interval's low end
        self._span = _STATE_MASK

    def get(self, tables: TableSet, index: NDArray[np.intp]) -> IntArray:
        """See `Decoder.get`."""
        cumulative, point, span = tables.cumulative, self._point, self._span
        out = []
        for row in index.tolist():
            edges = cumulative[row]
            scale = span >> 24
            quantile = point // scale
            if quantile >= 2**24:
                raise PayloadError("the payload's bytes do not belong to this bundle's tables")
            symbol = bisect_right(edges, quantile >> _SHIFT) - 1
            left = edges[symbol]
            point -= scale * (left << _SHIFT)
            span = scale * ((edges[symbol + 1] - left) << _SHIFT)
            if span < _WORD:
                span <<= 32
                point = point << 32 | int.from_bytes(self._body[self._at : self._at + 4].ljust(4, b"\0"), "big")
                self._at += 4
            out.append(symbol)
        self._point, self._span = point, span
        return np.array(out, dtype=np.int32)


class ConstrictionEncoder(Encoder):
    """Compiled range encoder."""

    def __init__(self) -> None:
        self._coder = _constriction.stream.queue.RangeEncoder()
        self._family = _constriction.stream.model.Categorical(perfect=False)

    def put(self, symbols: IntArray, tables: TableSet, index: NDArray[np.intp]) -> None:
        """See `Encoder.put`."""
        if len(symbols):
            places, weights = tables.narrow
            entry = index * tables.weights.shape[1]
            entry += symbols
            self._coder.encode(places.take(entry), self._family, weights.take(entry, axis=0))

    def finish(self) -> bytes:
        """See `Encoder.finish`."""
        words, (low, span) = self._coder.pos()
        if words == 0 and span == _STATE_MASK:
            return b""
        # The library seals with ceil(low / 2^32) * 2^32; low itself follows from its own lower half.
        sealed = np.asarray(self._coder.get_compressed(), dtype=">u4").tobytes()[: 4 * words + 4]
        exact = (int.from_bytes(sealed, "big") << 32) - (-low % _WORD)
        return _shortest(exact, span, len(sealed) + 4)


class ConstrictionDecoder(Decoder):
    """Compiled range decoder."""

    def __init__(self, body: bytes) -> None:
        self._short = len(body) <= _SHORT
        words = np.frombuffer(body + bytes(-len(body) % 4), dtype=">u4").astype(np.uint32)
        self._coder = _constriction.stream.queue.RangeDecoder(words)
        self._family = _constriction.stream.model.Categorical(perfect=False)

    def get(self, tables: TableSet, index: NDArray[np.intp]) -> IntArray:
        """See `Decoder.get`."""
        found = np.empty(len(index), np.int32)
        for start in range(0, len(index), _CHUNK):
            rows = index[start : start + _CHUNK]
            likely = self._likely(tables, rows)
            try:
                found[start : start + _CHUNK] = self._decode(tables.weights, rows) if likely is None else likely
            except (AssertionError, ValueError) as error:
                raise PayloadError("the payload's bytes do not belong to this bundle's tables") from error
        return found

    def _decode(self, weights: NDArray[np.float32], rows: NDArray[np.intp]) -> IntArray:
        decoded: IntArray = self._coder.decode(self._family, weights.take(rows, axis=0))
        return decoded

    def _likely(self, tables: TableSet, rows: NDArray[np.intp]) -> IntArray | None:
        """The next symbols where they all lie in their tables' windows, in which they are the same; else None, nothing read."""
        window = tables.window
        if not self._short or window is None or window.missed.take(rows).sum() > _MISSES:
            return None
        start = self._coder.clone()
        with suppress(AssertionError, ValueError):
            found = self._decode(window.weights, rows)
            if found.min() > 0 and found.max() <= _WINDOW:
                found += window.shift.take(rows)
                return found
        self._coder = start
        return None


class CoderFactory:
    """Makes encoders and decoders of one implementation.

    Args:
        name: ``constriction``, ``pure``, or ``auto`` for the first where it is installed.

    Raises:
        ConfigError: constriction was asked for by name and is not installed.
    """

    def __init__(self, name: str = "auto") -> None:
        if name not in {"auto", "constriction", "pure"}:
            raise ConfigError(f"no range coder {name!r}; there are auto, constriction, pure")
        if name == "constriction" and _constriction is None:
            raise ConfigError("the package constriction is not installed; use the coder 'pure' or install it")
        self.name = name if name != "auto" else "pure" if _constriction is None else "constriction"

    def encoder(self) -> Encoder:
        """A fresh encoder."""
        return PureEncoder() if self.name == "pure" else ConstrictionEncoder()

    def decoder(self, body: bytes) -> Decoder:
        """A decoder at the start of `body`."""
        return PureDecoder(body) if self.name == "pure" else ConstrictionDecoder(body)
