"""Tables ``[[camera]]``, the worker that cameras share, and their metrics behind one address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_client.cameras.metrics import CamerasMetrics
from edge_client.cameras.tables import CamerasConfig, read_any
from edge_client.config import ClientConfig
from edge_client.device.worker import DeviceWorker, Lanes
from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.observe.fairness import jain
from edge_client.pipeline.live import LiveStrategy
from edge_client.pipeline.parts import Parts, PipelineConfig
from edge_client.pipeline.runner import Runner
from protos.errors import ConfigError
from tests.fakes.client_loop import VirtualLoop, run_virtual
from tests.fakes.client_parts import FakeDevice, FakeEngine, FakeFrames, FakeLink, fake_controller

TWO = """server = "edge:50051"
deadline-ms = 300
output = "/tmp/{camera}.jsonl"
web = "127.0.0.1:8080"
[[camera]]
name = "front door"
source = "rtsp://cam/1"
deadline-ms = 200
[[camera]]
name = "yard"
source = "0"
model = "detector"
[[camera.events]]
name = "people"
to = "mqtt://broker"
"""


def read(tmp_path: Path, text: str, **given: Any) -> ClientConfig | CamerasConfig:
    path = tmp_path / "client.toml"
    path.write_text(text)
    return read_any(path, given)


def test_what_stands_above_holds_for_all_and_what_stands_in_a_table_for_one(tmp_path: Path) -> None:
    config = read(tmp_path, TWO, threads=2)
    assert isinstance(config, CamerasConfig)
    assert config.web == "127.0.0.1:8080"
    door, yard = config.cameras
    assert (door.camera_id, door.camera, door.deadline_ms, door.output) == (
        "front door",
        "rtsp://cam/1",
        200,
        "/tmp/front_door.jsonl",
    )
    assert (yard.deadline_ms, yard.model, yard.threads, yard.web) == (300, "detector", 2, None)
    assert [rule.name for rule in yard.events] == ["people"]
    assert door.events == ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("name = \"yard\"", "name = \"front door\""), "two cameras have the name"),
        (("{camera}", "all"), "two cameras have the output"),
        (("source = \"0\"", ""), "camera 2 needs a name and a source"),
        (("model = ", "modell = "), "camera 2 \\('yard'\\).*modell"),
        (("model = \"detector\"", "web = \"127.0.0.1:1\""), "web stands above the tables"),
        (("web = ", "display = true\nweb = "), "display is for a single camera"),
        (("deadline-ms = 200", "deadline-ms = -1"), "deadline-ms"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_the_camera(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    assert change[0] in TWO
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path, TWO.replace(*change))


def test_a_file_without_tables_is_one_camera(tmp_path: Path) -> None:
    assert isinstance(read(tmp_path, 'camera = "0"\n'), ClientConfig)
    with pytest.raises(ConfigError, match="do not go with them"):
        read(tmp_path, TWO, camera="1")


class Hand:
    """An executor whose jobs end when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []

    def __call__(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.jobs.append((function, future))
        return future

    async def finish(self) -> None:
        while not self.jobs:
            await asyncio.sleep(0)
        function, future = self.jobs.pop(0)
        future.set_result(function())
        await self.settle()

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)


async def test_the_earliest_deadline_goes_first_whoevers_it_is() -> None:
    hand, order = Hand(), list[str]()
    lanes = Lanes(hand)
    a, b = DeviceWorker(lanes), DeviceWorker(lanes)
    jobs = [
        asyncio.create_task(part.run(lambda name=name: order.append(name), due_ns=due_ns))
        for part, name, due_ns in ((a, "a last", 9), (a, "a late", 5), (b, "b early", 1), (a, "a middle", 3))
    ]
    for _ in jobs:
        await hand.finish()
    await asyncio.gather(*jobs)
    assert order == ["b early", "a middle", "a late", "a last"]


async def test_two_lanes_work_side_by_side_but_never_twice_for_one_camera() -> None:
    hand, order = Hand(), list[str]()
    lanes = Lanes(hand, 2)
    a, b = DeviceWorker(lanes), DeviceWorker(lanes)
    jobs = [
        asyncio.create_task(worker.run(lambda name=name: order.append(name), due_ns=due_ns))
        for worker, name, due_ns in ((a, "a first", 1), (a, "a second", 2), (b, "b", 3), (b, "b more", 4))
    ]
    await hand.settle()
    assert len(hand.jobs) == 2
    for _ in jobs:
        await hand.finish()
        assert len(hand.jobs) <= 2
    await asyncio.gather(*jobs)
    assert order == ["a first", "b", "a second", "b more"]
    assert a.idle
    assert b.idle


async def test_a_camera_that_ends_takes_only_its_own_jobs_along() -> None:
    hand = Hand()
    lanes = Lanes(hand)
    a, b = DeviceWorker(lanes), DeviceWorker(lanes)
    first = asyncio.create_task(a.run(lambda: "done", due_ns=0))
    gone = asyncio.create_task(b.run(lambda: "never", due_ns=1))
    last = asyncio.create_task(a.run(lambda: "done", due_ns=2))
    await hand.settle()
    await b.join()
    await hand.finish()
    await hand.finish()
    assert await asyncio.gather(first, last) == ["done", "done"]
    assert gone.cancelled()
    assert hand.jobs == []


async def test_a_camera_that_holds_a_lane_does_all_its_jobs_in_it_and_the_others_wait() -> None:
    hand, order = Hand(), list[str]()
    lanes = Lanes(hand)
    a, b = DeviceWorker(lanes), DeviceWorker(lanes)
    async with a.turn(due_ns=5):
        other = asyncio.create_task(b.run(lambda: order.append("b"), due_ns=0))
        for name in ("first", "second"):
            job = asyncio.create_task(a.run(lambda name=name: order.append(name), due_ns=9))
            await hand.finish()
            await job
        await hand.settle()
        assert hand.jobs == []
    await hand.finish()
    await other
    assert order == ["first", "second", "b"]


async def test_a_camera_that_is_cancelled_while_it_waits_for_a_lane_keeps_none() -> None:
    hand = Hand()
    lanes = Lanes(hand)
    a, b = DeviceWorker(lanes), DeviceWorker(lanes)

    async def frame() -> None:
        async with b.turn(due_ns=1):
            raise AssertionError("it never had its turn")

    async with a.turn(due_ns=0):
        waiting = asyncio.create_task(frame())
        await hand.settle()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    job = asyncio.create_task(a.run(lambda: "done", due_ns=2))
    await hand.finish()
    assert await job == "done"


def test_ten_cameras_on_a_device_too_slow_for_ten_heads_are_answered_nearly_all_and_alike() -> None:
    """Ten heads of 25 ms and as many local answers of 18 would take 2.15 times what there is."""

    async def main(loop: VirtualLoop) -> list[tuple[Runner, list[FrameReport]]]:
        device = FakeDevice()
        lanes = Lanes(device)
        runs = []

        async def camera(i: int) -> None:
            engine: Any = FakeEngine(device, head_ms=25, local_ms=18)
            reports: list[FrameReport] = []
            frames = FakeFrames(loop, count=100, fps=5, live=True)
            parts = Parts(
                frames=frames, worker=DeviceWorker(lanes), clock=loop.clock, emit=reports.append, fetch=_no_bundle,
                controller=fake_controller,
            )  # fmt: skip
            runner = Runner(PipelineConfig(deadline_ms=500.0), parts, engine, LiveStrategy)
            runs.append((runner, reports))
            await asyncio.sleep(i * 0.013)
            await runner.run(FakeLink(loop, runner.exchange, tail_s=0.05))

        await asyncio.gather(*(camera(i) for i in range(10)))
        return runs

    shares = []
    for runner, reports in run_virtual(main):
        ledger = runner.pipeline.ledger
        assert ledger.balanced
        assert ledger.captured == len(reports) == 100
        shares.append(sum(r.outcome in (Outcome.RESULT, Outcome.LOCAL) for r in reports) / 100)
    assert sum(shares) / len(shares) >= 0.9
    assert jain(shares) >= 0.99


async def _no_bundle(_sha256: str) -> Any:
    raise AssertionError("the bundle does not change")


def test_every_cameras_counters_carry_its_name() -> None:
    metrics = CamerasMetrics()
    for name, frames in (("yard", 3), ("door", 1)):
        sink = metrics.camera(name, SimpleNamespace(up=True, reconnects=0))
        frame = CapturedFrame(index=0, image=None, captured_ns=0, captured_unix_ns=0, width_px=1, height_px=1)
        for _ in range(frames):
            sink.take(FrameReport(frame=frame, model="m", bundle_sha256="", outcome=Outcome.LOCAL))
    families = {family.name: family for family in metrics.collect()}
    counts = {s.labels["camera"]: s.value for s in families["headtail_client_frames"].samples if s.name.endswith("_total")}
    assert counts == {"yard": 3, "door": 1}
    assert {s.labels["camera"] for s in families["headtail_client_connected"].samples} == {"yard", "door"}
