"""Which numbers of a model's outputs a declaration reads, and in what order they lie.

Shape legend: N batch, P positions, queries or rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError

Floats = NDArray[np.float32]
Axes = Literal["pc", "cp", "chw", "hwc", "p"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Some columns of one or several outputs, which lie one after the other along P.

    Attributes:
        outputs: indices or names of outputs.
        axes: their order after the batch: ``pc`` rows, ``cp`` columns first, ``chw`` and ``hwc`` maps, ``p`` one column.
        start, stop: which columns; without ``stop`` all that follow.
        activation: what is still to be applied.
    """

    outputs: tuple[int | str, ...] = (0,)
    axes: Axes = "pc"
    start: int = 0
    stop: int | None = None
    activation: Literal["none", "sigmoid", "softmax", "tanh"] = "none"

    def read(self, outputs: Sequence[Floats]) -> Floats:
        """(N, P, C).

        Raises:
            BundleError: an output is absent, of another rank, or has too few columns.
        """
        parts = []
        for which in self.outputs:
            if not isinstance(which, int) or not 0 <= which < len(outputs):
                raise BundleError(f"the decoding reads output {which!r}; the model has outputs 0..{len(outputs) - 1}")
            parts.append(_rows(np.asarray(outputs[which]), self.axes, which))
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        columns = joined.shape[2]
        if self.start >= columns or (self.stop is not None and self.stop > columns):
            raise BundleError(
                f"the decoding reads columns {self.start}..{self.stop or 'end'} of output {self.outputs[0]}, which has {columns}"
            )
        return activate(joined[..., self.start : self.stop].astype(np.float32, copy=False), self.activation)


def _rows(array: NDArray[Any], axes: Axes, which: int) -> NDArray[Any]:
    ranks = {"pc": 3, "cp": 3, "chw": 4, "hwc": 4, "p": 2}
    if array.ndim == ranks[axes] + 1 and array.shape[1] == 1:
        array = array[:, 0]
    if axes == "pc" and array.ndim == 2:
        array = array[:, None, :]
    if array.ndim != ranks[axes]:
        raise BundleError(
            f"output {which} has shape {array.shape}; decoding it as (N, {', '.join(axes.upper())}) needs {ranks[axes]} axes"
        )
    if axes == "cp":
        return array.transpose(0, 2, 1)
    if axes == "chw":
        return array.reshape(*array.shape[:2], -1).transpose(0, 2, 1)
    if axes == "hwc":
        return array.reshape(array.shape[0], -1, array.shape[3])
    return array[..., None] if axes == "p" else array


def activate(values: Floats, how: str) -> Floats:
    """Applies an activation over the last axis."""
    if how == "sigmoid":
        return sigmoid(values)
    if how == "tanh":
        return np.asarray(np.tanh(values), np.float32)
    if how == "softmax":
        shifted = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)
    return values


def sigmoid(values: Floats) -> Floats:
    """By tanh: no overflow for large negative values."""
    half = np.float32(0.5)
    return np.asarray(half * (np.tanh(half * values) + np.float32(1)), np.float32)
