"""Splitters: cut a model in two, profile its cuts, train bottlenecks, write bundles.

``split`` and ``profile`` are loaded when first used, so that ``import splitters`` stays light.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitters.cutting.split import Split, split
    from splitters.profiling.measure import profile
    from splitters.profiling.table import Profile

# ONNX Runtime from 1.29 on reports its sessions to Microsoft unless told otherwise before it is loaded. Whoever loads it here has
# loaded this package first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Profile", "Split", "profile", "split"]

_HOMES = {
    "Split": "splitters.cutting.split",
    "split": "splitters.cutting.split",
    "Profile": "splitters.profiling.table",
    "profile": "splitters.profiling.measure",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'splitters' has no attribute {name!r}")
