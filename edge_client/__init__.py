"""The device: capture, head, session, control.

For programs: ``Client`` answers frames, ``ClientOptions`` says how; see ``docs/guides/embed.md``.
They are loaded when first asked for.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.blocking import BlockingClient
    from edge_client.client import Client
    from edge_client.frames import FrameReport, Outcome
    from edge_client.options import ClientOptions

# gRPC's C library writes to standard error by itself; what matters is said in our own words. It reads this once, when loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__all__ = ["BlockingClient", "Client", "ClientOptions", "FrameReport", "Outcome"]

_PLACES = {
    "BlockingClient": "edge_client.blocking",
    "Client": "edge_client.client",
    "ClientOptions": "edge_client.options",
    "FrameReport": "edge_client.frames",
    "Outcome": "edge_client.frames",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
