"""The edge: doors, batcher, tail, bandwidth grants.

from edge_server import Server, ServerConfig

async with Server.start(ServerConfig(models=("detector",))) as server:
await server.wait()
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_server.config import BatchConfig, Limits, RayConfig, SecurityConfig, ServerConfig, TailConfig
    from edge_server.server import Server

__all__ = ["BatchConfig", "Limits", "RayConfig", "SecurityConfig", "Server", "ServerConfig", "TailConfig"]

# gRPC's C library writes to standard error by itself; what matters is said in our own words. It reads this once, when loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def __getattr__(name: str) -> Any:
    """Imported when first asked for: `Server` needs what the extra ``server`` installs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'server' if name == 'Server' else 'config'}"), name)
