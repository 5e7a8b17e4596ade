"""A network camera that is killed, comes back, stalls, is slow and changes its size; and a client that ends while it reads one."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from edge_client.cli import main
from tests.fakes.client_process import ClientProcess, client
from tests.fakes.rtsp_camera import RtspCamera


@pytest.fixture(scope="module")
def camera() -> Iterator[RtspCamera]:
    with RtspCamera() as running:
        yield running


def watch(home: Path, camera: RtspCamera, server: str, cache: Path, *arguments: str) -> Any:
    return client(home, "--camera", camera.url, "--server", server, "--change-gate", "off", "--json", *arguments, cache=cache)


def last(edge: ClientProcess) -> int:
    lines = edge.lines()
    return int(lines[-1]["frame"]) if lines else -1


def wait_silent(edge: ClientProcess) -> int:
    """Until no frame has come for longer than a camera may be silent, which is five seconds; the last frame."""
    before, since = last(edge), time.monotonic()
    while time.monotonic() - since < 7:
        time.sleep(0.1)
        if last(edge) != before:
            before, since = last(edge), time.monotonic()
    return before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_client_that_reads_a_camera(
    tmp_path: Path, camera: RtspCamera, server: str, cache: Path, number: signal.Signals
) -> None:
    clip = tmp_path / "clip.mp4"
    before = signal.signal(number, signal.SIG_DFL)  # tests may run in the background or under nohup, which a client would heed
    with watch(tmp_path, camera, server, cache, "--save-video", str(clip)) as edge:
        signal.signal(number, before)
        edge.wait_frame(20)
        edge.process.send_signal(number)
        done = edge.finish(timeout_s=30)
    assert done.code == 0, done.err
    assert "FATAL" not in done.err
    assert done.summary["balanced"]
    assert sum(done.outcomes().values()) == done.summary["frames"]
    assert {line["camera"] for line in done.lines} == {f"rtsp://127.0.0.1:{camera.port}/…"}
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    span_s = (done.lines[-1]["position_ms"] - done.lines[0]["position_ms"]) / 1000
    assert times[-1] - times[0] == pytest.approx(span_s, abs=0.2), "the clip lasts as long as the scene"


def test_a_camera_that_is_killed_comes_back_stalls_is_slow_and_changes_its_size(tmp_path: Path, server: str, cache: Path) -> None:
    clip = tmp_path / "clip.mkv"
    with RtspCamera() as camera, watch(tmp_path, camera, server, cache, "--save-video", str(clip)) as edge:
        edge.wait_frame(20)
        camera.kill()
        gone = last(edge)
        camera.start()
        edge.wait_frame(gone + 20)  # it is opened again, with back-off

        camera.tell("form 480 360 20")  # another size, without a word to the client
        edge.wait_frame(last(edge) + 30)

        camera.tell("form 480 360 2")
        slow = last(edge)
        time.sleep(2)
        edge.wait_frame(slow + 3)

        camera.tell("form 320 240 20")
        camera.tell("stall")
        stalled = wait_silent(edge)
        camera.tell("go")
        edge.wait_frame(stalled + 20)
        edge.process.send_signal(signal.SIGINT)
        done = edge.finish(timeout_s=30)
    assert done.code == 0, done.err
    assert done.summary["balanced"]
    assert [line["frame"] for line in done.lines] == list(range(done.summary["frames"]))
    assert "the camera vanished; opened again" in done.err
    assert "the camera stalled; opened again" in done.err
    with av.open(str(clip)) as container:  # pictures of another size are fitted into the clip
        assert sum(1 for _ in container.decode(video=0)) >= 60


def test_doctor_finds_the_path_that_an_address_lacks(
    tmp_path: Path, camera: RtspCamera, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--camera", f"rtsp://user:hunter2@127.0.0.1:{camera.port}", "--server", server, "--json"]) == 0
    printed = capsys.readouterr()
    (found,) = [f for f in json.loads(printed.out.splitlines()[-1])["findings"] if f["what"] == "camera"]
    assert "320x240" in found["said"]
    assert "with /stream1 behind it" in found["advice"]
    assert "hunter2" not in printed.out + printed.err


def test_a_camera_that_does_not_open_holds_nobody_up(tmp_path: Path, server: str, cache: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        url = f"rtsp://admin:Zq7secret@127.0.0.1:{silent.getsockname()[1]}/cam"
        with client(tmp_path, "--camera", url, "--server", server, "--log-level", "debug", cache=cache) as edge:
            connection, _ = silent.accept()  # the client's reader is inside FFmpeg now
            edge.process.send_signal(signal.SIGINT)
            done = edge.finish(timeout_s=4.5)  # FFmpeg itself would wait five seconds
            connection.close()
    assert done.code == 0, done.err
    assert "FATAL" not in done.err
    assert "Zq7secret" not in done.err + done.out
