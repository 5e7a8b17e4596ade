"""Frames in layers: what each layer of a choice weighs, and what an answer from the first few of them is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose

from protos.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of a frame.

    Attributes:
        share: of the payload's bytes, above 0; those of a choice sum to 1.
        accuracy: 0..1, of an answer from this layer and all before it.
    """

    share: float
    accuracy: float


Layers = Mapping[str, Sequence[Layer]]
"""By the choice's name, base first. What is not in it travels whole."""


def checked(layers: Layers) -> Layers:
    """The same.

    Raises:
        ConfigError: shares that do not sum to 1, or an accuracy beyond 0..1.
    """
    for name, rows in layers.items():
        if not rows or any(r.share <= 0 or not 0 <= r.accuracy <= 1 for r in rows) or not isclose(sum(r.share for r in rows), 1):
            raise ConfigError(f"the layers of {name!r} need shares above 0 that sum to 1, and accuracies 0..1")
    return layers


def split_bytes(n_bytes: int, layers: Sequence[Layer]) -> list[int]:
    """``n_bytes`` by the layers' shares, each at least one byte."""
    sizes = [max(1, int(n_bytes * layer.share)) for layer in layers[:-1]]
    return [*sizes, max(1, n_bytes - sum(sizes))]
