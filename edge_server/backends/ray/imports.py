"""Ray, imported with the settings that serving frames needs; import ``ray`` and ``serve`` from here.

Ray reads them when it is imported and when a cluster starts. To start a cluster by hand, set the same ones
(``deploy/ray/cluster.env``).
"""

from __future__ import annotations

import os
from pathlib import Path

SETTINGS = {
    # No extra thread and loop per hop, gRPC between ingress and replica, no log line per request.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Serve's own ways in for clients stay shut: the door in front is ours.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    # Ray's workers give way to everything else on a machine (nice 15). A tail is what the machine is there for: beside one busy
    # process on the same core its frames took four times as long.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
# Clusters want a token by default, yet a process that joins one shows its own only when told that it has to.
_token = Path(os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111 - Path.home() fails where there is no home
if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or _token.exists():
    os.environ.setdefault("RAY_AUTH_MODE", "token")

try:
    import ray
    from ray import serve
    from ray.serve import request_router
    from ray.serve.config import RequestRouterConfig
except ImportError as missing:
    from protos.errors import MissingDependencyError

    raise MissingDependencyError("--backend ray needs Ray Serve: pip install 'headtail[ray]'") from missing

__all__ = ["SETTINGS", "RequestRouterConfig", "ray", "request_router", "serve"]
