"""Clocks that step and clocks that disagree: nothing is decided by the wall clock, and no clock is compared with another's."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_server.config import SecurityConfig
from splitters.bundle import Bundle
from tests.fakes.client_process import ON_BOTH_TRANSPORTS, ClientProcess, over
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child, environment, running

ROOT = Path(__file__).parents[2]
DAY_NS = 86_400_000_000_000

# Frames are stamped for people who read the results, spans for those who read traces; nothing is decided by either. What looks
# after the clock itself has to read it: `edge-client doctor` says whether it is set.
STAMPS = {
    ("edge_client/doctor/checks.py", "gmtime"),
    ("edge_client/doctor/checks.py", "time"),
    ("edge_client/capture/capture.py", "time_ns"),
    ("edge_client/capture/given.py", "time_ns"),
    ("protos/tracing.py", "time_ns"),
}


def wall_clock_reads(path: Path) -> set[str]:
    """Names by which a module reads the wall clock."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "time" and node.attr in ("time", "time_ns", "localtime", "gmtime"):
                found.add(node.attr)
            if node.value.id in ("datetime", "date") and node.attr in ("now", "utcnow", "today"):
                found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found |= {alias.name for alias in node.names} & {"time", "time_ns"}
    return found


def test_nothing_is_decided_by_the_wall_clock() -> None:
    reads = {
        (str(path.relative_to(ROOT)), name)
        for room in ("edge_client", "edge_server", "protos")
        for path in (ROOT / room).rglob("*.py")
        for name in wall_clock_reads(path)
    }
    assert reads <= STAMPS
    assert ("edge_client/capture/capture.py", "time_ns") in reads  # so the search finds something


# A day forth, two days back, and so on: at every single reading.
_STEPPING = """
import itertools, sys, time
day, steps, real_ns, real = 86_400_000_000_000, itertools.cycle((1, -1, 3, -3)), time.time_ns, time.time
time.time_ns = lambda: real_ns() + next(steps) * day
time.time = lambda: real() + next(steps) * day / 1e9
from edge_client.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Stepping(ClientProcess):
    """A client whose wall clock is never the same day twice."""

    def __init__(self, tmp: Path, *arguments: str) -> None:
        self.results = tmp / "results.jsonl"
        self._lines, self._read_bytes = [], 0
        line = [sys.executable, "-c", _STEPPING, "--output", str(self.results), *arguments]
        self.process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment(), "HEADTAIL_CACHE": str(tmp / "cache")},
        )  # fmt: skip


@ON_BOTH_TRANSPORTS
def test_a_device_whose_wall_clock_steps_by_days_answers_as_ever(bundle: Bundle, tmp_path: Path, transport: str) -> None:
    camera = ("--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off", "--frames", "90", "--operating-point", "0")
    with child(tmp_path, bundle.path) as server:
        edge = Stepping(tmp_path, *camera, *over(transport), "--server", server.address, "--json")
        try:
            done = edge.finish()
        finally:
            edge.kill()
    assert done.code == 0, done.err
    assert done.went_over(transport), done.err
    assert sum(done.outcomes().values()) == 90
    assert done.outcomes().get("result", 0) >= 10, done.outcomes()  # a busy machine answers the others itself
    assert all(0 <= line["latency_ms"]["total"] <= 60_000 for line in done.lines)  # no day is in it
    stamps = [line["captured_unix_ns"] for line in done.lines]
    assert max(abs(b - a) for a, b in itertools.pairwise(stamps)) > DAY_NS  # it did step
    times = [line["captured_ns"] for line in done.lines]
    assert times == sorted(times)


async def test_a_server_whose_wall_clock_steps_serves_as_ever(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text("a alice-token-0123456789\n")
    security = SecurityConfig(token_file=tmp_path / "tokens", frames_per_s_per_token=1000)
    bearer = (("authorization", "Bearer alice-token-0123456789"),)
    device, real_ns, real = Device(bundle), time.time_ns, time.time
    async with running(bundle.path, security=security) as server, session(server.address, bundle.sha256, bearer) as stream:
        for i, days in enumerate((0, 400, -400, 30, -1, 0)):
            monkeypatch.setattr(time, "time_ns", lambda days=days: real_ns() + days * DAY_NS)
            monkeypatch.setattr(time, "time", lambda days=days: real() + days * 86_400.0)
            result = await stream.frame(device.layers(picture(i), i, deadline_ns=5_000_000_000))
            assert result.error is None, (days, result.error)
            assert 0 < result.timings.total_ns < 5_000_000_000


@pytest.mark.parametrize("start_ns", [0, 1, DAY_NS, 1 << 62, (1 << 63) - DAY_NS], ids=["boot", "ns", "day", "146 years", "most"])
async def test_a_devices_clock_may_be_anything(bundle: Bundle, start_ns: int) -> None:
    """Send times are the device's own; only their differences are used, the rest is echoed."""
    device, begun_ns = Device(bundle), time.monotonic_ns()
    async with running(bundle.path) as server, session(server.address, bundle.sha256, fps=50.0) as stream:
        for i in range(30):
            (layer,) = device.layers(picture(i), i, deadline_ns=5_000_000_000)
            layer.sent_ns += start_ns - begun_ns
            layer.captured_unix_ns = 0 if i % 2 else (1 << 64) - 1
            result = await stream.frame([layer])
            assert result.error is None
            assert result.echo_sent_ns == layer.sent_ns
        grants = [m.grant for m in stream.others if m.WhichOneof("content") == "grant"]
        # A clock that is believed stretches a frame over its offset, to less than a bit a second. A busy machine stays far above.
        assert all(g.bitrate_bps == 0 or g.bitrate_bps > 1_000 for g in grants), grants


async def test_a_devices_clock_may_drift_and_jump(bundle: Bundle) -> None:
    """A clock that runs 10 % fast, and one that is set while it runs: a wrong delay at worst, never a refusal."""
    device = Device(bundle)
    async with running(bundle.path) as server:
        for drift in (lambda t, i: int(t * 1.1), lambda t, i: t + (i % 3) * DAY_NS):
            async with session(server.address, bundle.sha256, fps=50.0) as stream:
                for i in range(30):
                    (layer,) = device.layers(picture(i), i)
                    layer.sent_ns = drift(layer.sent_ns, i)
                    assert (await stream.frame([layer])).error is None
