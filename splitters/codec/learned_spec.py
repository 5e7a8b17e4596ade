"""The learned codec's settings as a bundle holds them.

Shape legend: latents are (C, H, W).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.codec.base import SPEC_VERSION, Spec
from splitters.codec.predicted.choice import DEFAULT_PRICE


def learned_spec(
    *,
    shape: tuple[int, int, int],
    gains: NDArray[np.floating[Any]],
    ungains: NDArray[np.floating[Any]],
    points: Mapping[str, tuple[int, int]],
    tables_path: str,
    single_layer: Collection[str] = (),
    prices: Mapping[str, float] | None = None,
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
        prices: what a bit of a predicted frame is worth to a point, in squared quantiser steps; `DEFAULT_PRICE` where not told.
    """
    return {
        "kind": "learned",
        "version": SPEC_VERSION,
        "shape": [int(n) for n in shape],
        "gains": [[float(np.float32(g)) for g in row] for row in gains],
        "ungains": [[float(np.float32(g)) for g in row] for row in ungains],
        "points": [
            {
                "id": name,
                "tier": int(tier),
                "channels": int(kept),
                "single_layer": name in single_layer,
                "price": float((prices or {}).get(name, DEFAULT_PRICE)),
            }
            for name, (tier, kept) in points.items()
        ],
        "tables": tables_path,
    }


def check_learned(spec: Mapping[str, Any], bundle: str) -> None:
    """Refuses to adapt another codec.

    Args:
        spec: of any codec.
        bundle: its bundle's name, for the message.

    Raises:
        ConfigError: the codec is not learned.
    """
    if spec.get("kind") != "learned":
        raise ConfigError(f"bundle {bundle!r} has a {spec.get('kind')} codec; only a learned one can be adapted")


def tier_prices(spec: Mapping[str, Any]) -> list[float]:
    """What a bit is worth at each gain tier: the mean over the spec's points there, the default where there is none."""
    by_tier: dict[int, list[float]] = {}
    for point in spec["points"]:
        by_tier.setdefault(int(point["tier"]), []).append(float(point.get("price", DEFAULT_PRICE)))
    return [float(np.mean(by_tier.get(tier, [DEFAULT_PRICE]))) for tier in range(len(spec["gains"]))]
