"""When two frames' symbols are the same."""

from __future__ import annotations

import numpy as np

from splitters.codec import Symbols


def same(a: Symbols, b: Symbols) -> bool:
    """Whether both hold the same layers of the same point with the same integers."""
    return (
        a.point_id == b.point_id
        and (a.layers, a.layer_count) == (b.layers, b.layer_count)
        and len(a.tensors) == len(b.tensors)
        and all(np.array_equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    )
