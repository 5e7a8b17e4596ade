"""The server is killed in the middle of a camera's stream and comes back; every frame has its outcome."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import client, standby, write_clip

DEADLINE_MS = 500.0


@pytest.mark.timeout(240)
def test_sigkill_at_frame_60_and_restart_three_seconds_later(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    clip = write_clip(tmp_path / "clip.avi", frames=60, fps=30)
    with standby(tmp_path, bundle) as first:
        first.wait_ready()
        address = first.serve()
        with standby(tmp_path, bundle, listen=address) as second:
            second.wait_ready()
            camera = ["--camera", str(clip), "--loop", "--realtime", "--change-gate", "off"]
            with client(tmp_path, *camera, "--frames", "300", "--server", address, "--json") as edge:
                edge.wait_frame(59)
                first.kill()
                time.sleep(3.0)
                restarted_at = max(line["frame"] for line in edge.lines())
                second.serve()
                done = edge.finish()
    assert done.code == 0, done.err
    assert sum(done.outcomes().values()) == 300
    assert done.summary["balanced"]
    assert done.summary["outcomes"] == {**dict.fromkeys(done.summary["outcomes"], 0), **done.outcomes()}
    assert done.outcomes(last=59).get("result", 0) >= 50, done.outcomes(last=59)
    between = done.outcomes(first=64, last=restarted_at)
    assert between.get("local", 0) >= 0.8 * sum(between.values()), between
    assert between.get("result", 0) <= 2, between
    assert done.outcomes(first=restarted_at).get("result", 0) >= 60, done.outcomes(first=restarted_at)
    for line in done.lines:
        if line["outcome"] == "local":
            assert line["latency_ms"]["total"] <= DEADLINE_MS + 100
            assert line["predictions"]
    assert done.summary["reconnects"] >= 1
