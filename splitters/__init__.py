"""Splitters: cut a model in two, profile its cuts, train bottlenecks, write bundles, measure and run them.

``split``, ``profile``, ``train``, ``export``, ``evaluate`` and ``load`` (`splitters.api`) are loaded when first used, so that
``import splitters`` stays light.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitters.api import evaluate, export, load, profile, split, train
    from splitters.cutting.graph.split import Split
    from splitters.profiling.table import Profile
    from splitters.runtime.whole import BundleModel, Inference

# ONNX Runtime from 1.29 on reports its sessions to Microsoft unless told otherwise before it is loaded. Whoever loads it here has
# loaded this package first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["BundleModel", "Inference", "Profile", "Split", "evaluate", "export", "load", "profile", "split", "train"]

_HOMES = {
    "BundleModel": "splitters.runtime.whole",
    "Inference": "splitters.runtime.whole",
    "Split": "splitters.cutting.graph.split",
    "Profile": "splitters.profiling.table",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "splitters.api")), name)
    raise AttributeError(f"module 'splitters' has no attribute {name!r}")
