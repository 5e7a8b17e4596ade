"""``edge_client.Client`` in programs: under asyncio, in threads; nothing is printed, no signal is touched."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from edge_client import Client, ClientOptions, FrameReport, Outcome
from protos.errors import BundleError, ConfigError, SourceError, UnknownModelError, UnreachableError
from protos.messages import Classification
from tests.fakes.client_process import write_clip, write_photos


@pytest.fixture(scope="module")
def options(home: Path) -> ClientOptions:
    return ClientOptions(cache=home / "cache", wait_for_server_s=30)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(count)]


def answered(report: FrameReport) -> bool:
    return report.outcome is Outcome.RESULT and isinstance(report.answer, Classification)


def best(report: FrameReport) -> int:
    assert isinstance(report.answer, Classification)
    return report.answer.top[0].class_id


async def test_a_frame_in_an_answer_out(server: str, options: ClientOptions, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    async with Client.open(server=server, options=options) as client:
        report = await client.infer(pictures(1)[0])
        assert answered(report)
        assert report.operating_point in client.operating_points
        assert report.decision == f"split {report.operating_point}"
        assert report.payload_bytes > 0
        assert report.latency_ms == report.stages_ms["total"] > 0
        assert {"head", "codec", "network", "tail"} <= report.stages_ms.keys()
        assert client.labels == client._engine.labels
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr() == ("", "")


async def test_many_frames_at_a_time_each_get_their_own_answer(server: str, options: ClientOptions) -> None:
    async with Client.open(server=server, options=options) as client:
        one_by_one = [await client.infer(p) for p in pictures(8)]
        together = await asyncio.gather(*(client.infer(p) for p in pictures(8)))
    assert all(map(answered, [*one_by_one, *together]))
    assert [r.frame.index for r in together] == list(range(8, 16))
    assert [best(r) for r in one_by_one] == [best(r) for r in together]


async def test_a_point_set_by_hand_is_used(server: str, options: ClientOptions, home: Path) -> None:
    async with Client.open(server=server, options=options) as client:
        last = max(client.operating_points)
    by_hand = ClientOptions(cache=home / "cache", operating_point=last)
    async with Client.open(server=server, options=by_hand) as client:
        assert (await client.infer(pictures(1)[0])).operating_point == last
    with pytest.raises(BundleError, match="no operating point 999"):
        async with Client.open(server=server, options=ClientOptions(cache=home / "cache", operating_point=999)):
            pass


async def test_any_source(server: str, options: ClientOptions, home: Path) -> None:
    photos, clip = write_photos(home / "photos", count=5), write_clip(home / "clip.avi", frames=20)

    async def later() -> AsyncIterator[np.ndarray]:
        for picture in pictures(3):
            await asyncio.sleep(0)
            yield picture

    async with Client.open(server=server, options=options) as client:
        of_photos = [r async for r in client.run(photos)]
        of_clip = [r async for r in client.run(str(clip))]
        of_list = [r async for r in client.run(pictures(100))]
        of_generator = [r async for r in client.run(p for p in pictures(9))]
        of_later = [r async for r in client.run(later(), images=True)]
        first = [r async for r in client.run(pictures(9), frames=2)]
    for reports, count in ((of_photos, 5), (of_clip, 20), (of_list, 100), (of_generator, 9), (of_later, 3), (first, 2)):
        assert [r.frame.index for r in reports] == list(range(count))
        assert all(map(answered, reports))
    assert of_photos[0].frame.source == "photo-0.jpg"
    assert all(r.frame.image is not None for r in of_later)
    assert all(r.frame.image is None for r in of_list)


async def test_a_camera_that_is_left_early_ends_and_the_client_goes_on(server: str, options: ClientOptions) -> None:
    async with Client.open(server=server, options=options) as client:
        seen = 0
        async for report in client.run("synthetic:fps=30,size=64x48"):
            seen += report.frame.index >= 0
            if seen == 3:
                break
        assert answered(await client.infer(pictures(1)[0]))
    assert not [t for t in threading.enumerate() if t.name == "capture"]


async def test_who_takes_answers_slowly_is_told_of_the_frames_left_out(server: str, options: ClientOptions) -> None:
    async with Client.open(server=server, options=options) as client:
        reports = []
        async for report in client.run("synthetic:fps=500,size=64x48", frames=400):
            reports.append(report)
            await asyncio.sleep(0.005)
    assert [r.frame.index for r in reports] == list(range(400))
    assert any(r.reason == "superseded" for r in reports)


def test_in_a_thread_with_a_loop_of_its_own_and_blocking_from_several(server: str, options: ClientOptions) -> None:
    found: list[FrameReport] = []

    async def use() -> None:
        async with Client.open(server=server, options=options) as client:
            found.append(await client.infer(pictures(1)[0]))

    thread = threading.Thread(target=lambda: asyncio.run(use()))
    thread.start()
    thread.join()
    with Client.open(server=server, options=options) as client:
        threads = [threading.Thread(target=lambda p=p: found.append(client.infer(p))) for p in pictures(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found += list(client.run(pictures(5)))
        for report in client.run("synthetic:fps=30,size=64x48"):
            found.append(report)
            break
    assert len(found) == 11
    assert all(map(answered, found[:10]))
    assert not [t for t in threading.enumerate() if t.name in ("headtail", "capture")]


def test_what_cannot_be_had_is_one_clear_error(server: str, home: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{closed.getsockname()[1]}"
    patience = ClientOptions(cache=home / "empty", wait_for_server_s=0.2)
    with pytest.raises(UnreachableError), Client.open(server=nowhere, options=patience):
        pass
    with pytest.raises(UnknownModelError), Client.open(server=server, model="none such", options=patience):
        pass
    with pytest.raises(ConfigError, match="host:port"), Client.open(server="http://x", options=patience):
        pass
    with pytest.raises(ConfigError, match="deadline_ms"):
        ClientOptions(deadline_ms=-1)
    with Client.open(server=server, options=ClientOptions(cache=home / "cache")) as client:
        for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), "frame.jpg"):
            with pytest.raises(SourceError, match="frame"):
                client.infer(wrong)  # type: ignore[arg-type]
        with pytest.raises(SourceError):
            list(client.run("/no/such/file"))
        with pytest.raises(SourceError):
            list(client.run([pictures(1)[0], "no frame"]))
        assert answered(client.infer(pictures(1)[0])), "an error of one frame, or source, is its own"


async def test_frames_under_way_get_their_outcome_when_the_client_closes(server: str, options: ClientOptions) -> None:
    async with Client.open(server=server, options=options) as client:
        await client.infer(pictures(1)[0])
        waiting = [asyncio.create_task(client.infer(p)) for p in pictures(6)]
        await asyncio.sleep(0)
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(d, FrameReport | SourceError | UnreachableError) for d in done)


async def test_who_waits_no_longer_leaves_nothing_behind(server: str, options: ClientOptions) -> None:
    async with Client.open(server=server, options=options) as client:
        await client.infer(pictures(1)[0])
        task = asyncio.create_task(client.infer(pictures(1)[0]))
        await asyncio.sleep(0)
        task.cancel()
        assert answered(await client.infer(pictures(1)[0]))
        assert client._inference is not None
        assert not client._inference._waiting


def test_importing_the_package_is_light() -> None:
    bare = "import sys, edge_client; sys.exit(bool({'grpc', 'cv2', 'numpy', 'onnxruntime', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", bare], check=True)
    used = "import sys; from edge_client import Client, ClientOptions; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", used], check=True)
