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
from edge_client.cameras.worker import SharedWorker
from edge_client.config import ClientConfig
from edge_client.frames import CapturedFrame, FrameReport, Outcome
from protos.errors import ConfigError

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
        for _ in range(4):
            await asyncio.sleep(0)


async def test_the_earliest_deadline_goes_first_whoevers_it_is() -> None:
    hand, order = Hand(), list[str]()
    shared = SharedWorker(hand)
    a, b = shared.part(), shared.part()
    jobs = [
        asyncio.create_task(part.run(lambda name=name: order.append(name), due_ns=due_ns))
        for part, name, due_ns in ((a, "a last", 9), (a, "a late", 5), (b, "b early", 1), (a, "a middle", 3))
    ]
    for _ in jobs:
        await hand.finish()
    await asyncio.gather(*jobs)
    assert order == ["b early", "a middle", "a late", "a last"]


async def test_a_camera_that_ends_takes_only_its_own_jobs_along_and_an_overdue_job_is_its_owners() -> None:
    hand, told = Hand(), list[str]()
    shared = SharedWorker(hand)
    a, b = shared.part(), shared.part()
    a.overdue, b.overdue = lambda: told.append("a"), lambda: told.append("b")

    def work() -> str:
        shared._overdue()
        return "done"

    first = asyncio.create_task(a.run(work, due_ns=0))
    gone = asyncio.create_task(b.run(work, due_ns=1))
    last = asyncio.create_task(a.run(work, due_ns=2))
    await asyncio.sleep(0)
    gone.cancel()
    await b.join()
    await hand.finish()
    await hand.finish()
    assert await asyncio.gather(first, last) == ["done", "done"]
    assert told == ["a", "a"]
    assert hand.jobs == []


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
