"""The head of the Ray cluster goes: what is running goes on for a while, then the server ends, and says so by its exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import TRANSPORTS
from tests.fakes.links import asking
from tests.fakes.ray_cluster import cluster
from tests.fakes.server_client import Device, picture
from tests.fakes.server_running import child

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")


PATIENCE_S = 8  # Ray's own is a minute


async def test_the_head_of_the_cluster_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", str(PATIENCE_S))
    bundle = write_tiny_bundle(tmp_path / "bundle")
    device = Device(bundle)
    with cluster() as ray:
        (head,) = [p for p in ray.process.children(recursive=True) if p.name().startswith("gcs_server")]
        arguments = ("--backend", "ray", "--ray-address", ray.address, "--cpus-per-replica", "0.5")
        with child(tmp_path, bundle.path, arguments=arguments) as server:
            async with AsyncExitStack() as stack:
                ways = [await stack.enter_async_context(asking(server.address, bundle.sha256, t)) for t in TRANSPORTS]
                for ask in ways:
                    assert (await ask(device.layers(picture(), 0))).error is None
                os.kill(head.pid, signal.SIGKILL)
                killed = time.monotonic()
                for i in range(1, 11):  # handles and replicas speak to each other without the head
                    for ask in ways:
                        result = await ask(device.layers(picture(), i, deadline_ns=5_000_000_000))
                        assert result.error is None, result.error
            code = await asyncio.to_thread(server.process.wait, 120)
            took_s = time.monotonic() - killed
    log = next(tmp_path.glob("port-*.log")).read_text()
    # Ray ends processes that find no head for so long, and there is no way to ask it not to. Whoever supervises the server
    # starts it again, which succeeds once there is a head to join; clients do without meanwhile, as with any killed server.
    assert code == 1, log
    assert took_s >= PATIENCE_S / 2
    assert "GCS" in log
