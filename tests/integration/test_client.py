"""A real client against a real server, both as processes; one server for the whole module."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import ON_BOTH_TRANSPORTS, client, counted, over, run_client, standby, write_clip, write_photos


def test_every_photo_of_a_directory_is_a_result(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    pictures = tmp_path / "annotated"
    arguments = ["--camera", str(photos), "--server", server, "--json", "--save-video", str(pictures)]
    done = run_client(tmp_path, *arguments, cache=cache)
    assert done.code == 0, done.err
    assert done.summary["outcomes"]["result"] == done.summary["frames"] == 5
    assert [line["source"] for line in done.lines] == [f"photo-{i}.jpg" for i in range(5)]
    for line in done.lines:
        assert line["outcome"] == "result"
        assert line["reason"] is None
        assert line["model"] == "tiny"
        assert len(line["bundle_sha256"]) == 64
        assert line["captured_ns"] > 0
        assert line["captured_unix_ns"] > 1_600_000_000_000_000_000
        assert line["payload_bytes"] > 0
        assert line["operating_point"] == 0
        assert {"capture", "head", "codec", "network", "queue", "tail", "total"} <= set(line["latency_ms"])
        stages = sum(v for k, v in line["latency_ms"].items() if k != "total")
        assert stages <= line["latency_ms"]["total"] + 1
        assert len(line["predictions"]) == 5
        assert line["predictions"][0]["label"].startswith("class ")
    assert len(list(pictures.glob("*.jpg"))) == 5
    text = done.out
    for word in ("5 captured = result 5", "JPEG of the model's own input", "JPEG of the source frame", "network", "p99"):
        assert word in text
    assert done.summary["jpeg_samples"] == 5


def test_the_bundle_is_fetched_once(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    first = run_client(tmp_path, "--camera", str(photos / "photo-0.jpg"), "--server", server, "--log-level", "info")
    assert "fetched bundle" in first.err
    again = run_client(tmp_path, "--camera", str(photos / "photo-0.jpg"), "--server", server, "--log-level", "info", cache=cache)
    assert again.code == 0
    assert "fetched bundle" not in again.err


def test_an_altered_cache_is_fetched_again(tmp_path: Path, server: str, photos: Path) -> None:
    arguments = ["--camera", str(photos / "photo-0.jpg"), "--server", server, "--log-level", "info"]
    assert run_client(tmp_path, *arguments).code == 0
    stem = next((tmp_path / "cache" / "bundles").glob("*/device/stem.onnx"))
    stem.write_bytes(stem.read_bytes()[:-1])
    again = run_client(tmp_path, *arguments)
    assert again.code == 0
    assert "truncated or altered" in again.err
    assert "fetched bundle" in again.err


def test_results_on_standard_output_and_the_json_line_last(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--output", "-", "--json", cache=cache)
    lines = done.out.strip().splitlines()
    assert len(lines) == 6
    assert done.summary["exit_code"] == 0
    assert "captured" in done.err


def test_a_video_is_annotated_frame_by_frame(tmp_path: Path, server: str, cache: Path) -> None:
    clip = write_clip(tmp_path / "clip.avi", frames=20)
    out = tmp_path / "out.mp4"
    done = run_client(tmp_path, "--camera", str(clip), "--server", server, "--json", "--save-video", str(out), cache=cache)
    assert done.code == 0, done.err
    assert done.summary["outcomes"]["result"] == 20
    capture = cv2.VideoCapture(str(out))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 20


def test_loop_and_frames(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--json", "--loop", "--frames", "12", cache=cache)
    assert done.summary["outcomes"]["result"] == 12


def test_without_any_server_a_known_bundle_answers_locally(tmp_path: Path, home: Path, bundle: Bundle, photos: Path) -> None:
    cache = tmp_path / "cache"
    with standby(tmp_path, bundle.path) as s:
        address = s.serve()
        assert run_client(tmp_path, "--camera", str(photos), "--server", address, cache=cache).code == 0
    camera = ["--camera", "synthetic:fps=30,size=160x120", "--frames", "30", "--change-gate", "off"]
    done = run_client(tmp_path, *camera, "--server", address, "--json", cache=cache)
    assert done.code == 0, done.err
    assert done.outcomes().get("local", 0) >= 20
    done = run_client(tmp_path, "--camera", str(photos), "--server", address, "--wait-for-server-s", "0.5", "--json", cache=cache)
    assert done.code == 0, done.err
    assert done.outcomes() == {"local": 5}


@ON_BOTH_TRANSPORTS
def test_a_server_that_hangs_and_wakes_again(tmp_path: Path, home: Path, bundle: Bundle, cache: Path, transport: str) -> None:
    with standby(tmp_path, bundle.path) as s:
        address = s.serve()
        # One operating point: on a device that has no time the controller would rightly answer locally.
        camera = ["--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off", "--operating-point", "0"]
        with client(tmp_path, *camera, *over(transport), "--server", address, "--json") as edge:
            edge.wait_frame(59)
            s.signal(signal.SIGSTOP)
            edge.wait_for(counted("local", 20, after=65), "answers while the server hangs")
            s.signal(signal.SIGCONT)
            woken = max(line["frame"] for line in edge.lines())
            edge.wait_for(counted("result", 30, after=woken), "results of the server that woke")
            done = edge.interrupt()
    assert done.code == 0, done.err
    assert done.went_over(transport), done.err
    assert done.summary["balanced"]
    assert sum(done.outcomes().values()) == done.summary["frames"]
    for line in done.lines:
        if line["outcome"] in ("local", "result"):
            assert line["latency_ms"]["total"] <= 600


def test_files_wait_for_a_server_that_was_killed(tmp_path: Path, bundle: Bundle) -> None:
    clip = write_clip(tmp_path / "clip.avi", frames=60)
    with standby(tmp_path, bundle.path) as s:
        s.wait_ready()
        address = s.serve()
        with standby(tmp_path, bundle.path, listen=address) as second:
            second.wait_ready()
            arguments = ["--camera", str(clip), "--loop", "--frames", "2000", "--server", address, "--json"]
            with client(tmp_path, *arguments) as edge:
                edge.wait_frame(100)
                s.kill()
                time.sleep(0.5)
                second.serve()
                done = edge.finish()
    assert done.code == 0, done.err
    assert done.outcomes() == {"result": 2000}
    assert done.summary["reconnects"] >= 1


@ON_BOTH_TRANSPORTS
def test_a_server_that_returns_with_another_bundle(tmp_path: Path, bundle: Bundle, transport: str) -> None:
    other = write_tiny_bundle(tmp_path / "other", seed=7).path
    with standby(tmp_path, bundle.path) as s:
        s.wait_ready()
        address = s.serve()
        with standby(tmp_path, other, listen=address) as second:
            second.wait_ready()
            camera = ["--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off"]
            with client(tmp_path, *camera, *over(transport), "--server", address, "--json") as edge:
                edge.wait_for(counted("result", 1), "a result of the first bundle")
                old = edge.lines()[-1]["bundle_sha256"]
                s.kill()
                second.serve()
                edge.wait_for(
                    lambda lines: any(line["outcome"] == "result" and line["bundle_sha256"] != old for line in lines),
                    "a result of the second bundle",
                )
                done = edge.interrupt()
    assert done.code == 0, done.err
    assert done.went_over(transport), done.err
    assert done.summary["bundle_switches"] == 1
    hashes = [line["bundle_sha256"] for line in done.lines]
    assert len(set(hashes)) == 2
    assert hashes == sorted(hashes, key=hashes.index)
    assert sum(done.outcomes().values()) == done.summary["frames"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_flushes_and_ends_with_zero(tmp_path: Path, server: str, cache: Path, number: int) -> None:
    camera = ["--camera", "synthetic:fps=30,size=160x120"]
    with client(tmp_path, *camera, "--server", server, "--json", cache=cache) as edge:
        edge.wait_frame(20)
        edge.process.send_signal(number)
        done = edge.finish(timeout_s=20)
    assert done.code == 0, done.err
    assert done.summary["balanced"]
    assert sum(done.outcomes().values()) == done.summary["frames"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--interest", "persn"], 2),
        (["--prefilter", "on"], 2),
        (["--recall", "0.9"], 2),
        (["--prefilter", "off", "--recall", "0.9"], 2),
    ],
)
def test_gates_that_a_bundle_does_not_have_are_refused_for_files_too(
    tmp_path: Path, server: str, photos: Path, cache: Path, options: list[str], code: int
) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, *options, cache=cache)
    assert done.code == code, done.err
    assert_one_sentence(done.err, "prefilter")


def test_the_change_gate_works_for_files_where_it_is_asked_for(tmp_path: Path, server: str, cache: Path) -> None:
    clip = tmp_path / "still.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for i in range(70):  # seven seconds: after five a frame passes whatever it shows
        writer.write(np.full((48, 64, 3), 90 if i < 65 else 200, np.uint8))
    writer.release()
    done = run_client(tmp_path, "--camera", str(clip), "--server", server, "--change-gate", "on", "--json", cache=cache)
    assert done.code == 0, done.err
    passed = [line["frame"] for line in done.lines if line["outcome"] == "result"]
    assert passed[:1] == [0]
    assert 65 in passed
    assert any(50 <= frame <= 55 for frame in passed), "time is the clip's"
    assert done.outcomes()["unchanged"] >= 50
    assert all(line["predictions"] for line in done.lines)
    done = run_client(tmp_path, "--camera", str(clip), "--server", server, "--json", cache=cache)
    assert done.outcomes() == {"result": 70}


def test_the_answers_are_shown(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, cache=cache)
    lines = done.out.splitlines()
    assert [line.partition(":")[0] for line in lines[:5]] == [f"photo-{i}.jpg" for i in range(5)]
    assert all("class " in line for line in lines[:5])
    assert any(line.startswith("answers  class ") for line in lines)


def test_file_names_may_hold_what_means_something_in_a_url(
    tmp_path: Path, server: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones too: a camera writes 2024-01-01T12:00:00.avi, and nothing in it is a protocol."""
    monkeypatch.chdir(tmp_path)
    for name in ("2024-01-01T12:00:00.avi", "50% of #3?.avi"):
        write_clip(tmp_path / "clip.avi", frames=5).rename(name)
        outputs = ("--output", f"{name}:1.jsonl", "--save-video", f"{name}:1.mp4")
        done = run_client(tmp_path, "--camera", name, "--server", server, "--json", *outputs, cache=cache)
        assert done.code == 0, done.err
        assert done.summary["frames"] == len(Path(f"{name}:1.jsonl").read_text().splitlines()) == 5
        assert Path(f"{name}:1.mp4").stat().st_size > 0


def test_a_source_that_is_not_whole_is_told_and_with_strict_an_error(tmp_path: Path, server: str, cache: Path) -> None:
    clip = write_clip(tmp_path / "clip.avi", frames=40)
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    photos = write_photos(tmp_path / "mixed", count=2)
    (photos / "._photo.jpg").write_bytes(b"\0\5\x16\7")
    for source, words in ((clip, ("frames missing", "clip.avi")), (photos, ("._photo.jpg", "cannot be read"))):
        for options, code in (((), 0), (("--strict",), 3)):
            done = run_client(tmp_path, "--camera", str(source), "--server", server, "--json", *options, cache=cache)
            assert done.code == code, done.err
            assert done.summary["balanced"]
            assert done.summary["outcomes"]["result"] == done.summary["frames"] > 0
            for word in words:
                assert word in done.summary["source_faults"]
                assert word in done.err + done.out
            if code:
                assert_one_sentence(done.err, "--strict", *words)


# ---------------------------------------------------------------- the embedded server


def test_the_embedded_server_starts_and_ends_with_the_client(tmp_path: Path, bundle: Bundle, photos: Path) -> None:
    arguments = ["--camera", str(photos), "--loop", "--server", "embedded", "--model", str(bundle.path)]
    with client(tmp_path, *arguments) as edge:
        edge.wait_frame(5)
        child = children(edge.process.pid)
        assert len(child) == 1
        edge.process.send_signal(signal.SIGKILL)
        edge.process.wait()
        until = time.monotonic() + 20
        while alive(child[0]) and time.monotonic() < until:
            time.sleep(0.05)
        assert not alive(child[0]), "the embedded server outlived its client"
    done = run_client(tmp_path, "--camera", str(photos), "--server", "embedded", "--model", str(bundle.path), "--json")
    assert done.code == 0, done.err
    assert done.outcomes() == {"result": 5}


def test_an_embedded_server_that_cannot_start_says_why(tmp_path: Path, photos: Path) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", "embedded", "--model", str(tmp_path / "nothing"))
    assert done.code == 4
    assert_one_sentence(done.err, "embedded", "no bundle")


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(p) for p in text.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------- bad input


def assert_one_sentence(err: str, *words: str) -> None:
    assert "Traceback" not in err, err
    lines = [line for line in err.strip().splitlines() if line.startswith("edge-client: ")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0], err


@contextmanager
def listening() -> Iterator[str]:
    """A TCP port that accepts and says nothing."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(16)
        yield f"127.0.0.1:{s.getsockname()[1]}"


def test_nobody_listens(tmp_path: Path, photos: Path) -> None:
    with listening() as free:
        pass
    done = run_client(tmp_path, "--camera", str(photos), "--server", free, "--wait-for-server-s", "0")
    assert done.code == 7
    assert_one_sentence(done.err, free, "connection refused")


def test_a_port_that_says_nothing(tmp_path: Path, photos: Path) -> None:
    with listening() as address:
        done = run_client(tmp_path, "--camera", str(photos), "--server", address, "--wait-for-server-s", "0", timeout_s=30)
    assert done.code == 7
    assert_one_sentence(done.err, address, "did not answer")


def test_a_port_that_says_nothing_with_a_bundle_in_the_cache(tmp_path: Path, photos: Path, bundle: Bundle) -> None:
    with listening() as address:
        with standby(tmp_path, bundle.path, listen="127.0.0.1:0") as s:
            known = s.serve()
            assert run_client(tmp_path, "--camera", str(photos), "--server", known).code == 0
        memory = tmp_path / "cache" / "servers.json"
        memory.write_text(memory.read_text().replace(known, address))
        done = run_client(
            tmp_path, "--camera", str(photos), "--server", address, "--wait-for-server-s", "1", "--json", timeout_s=60
        )
    assert done.code == 0, done.err
    assert done.outcomes() == {"local": 5}


def test_a_web_server(tmp_path: Path, photos: Path) -> None:
    web = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"127.0.0.1:{web.server_port}"
        done = run_client(tmp_path, "--camera", str(photos), "--server", address, timeout_s=30)
    finally:
        web.shutdown()
        web.server_close()
    assert done.code == 7
    assert_one_sentence(done.err, address, "no headtail server")


def test_an_unknown_model(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--model", "nothing", cache=cache)
    assert done.code == 5
    assert_one_sentence(done.err, "nothing", "tiny")


def test_an_operating_point_that_does_not_exist(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--operating-point", "99", cache=cache)
    assert done.code == 4
    assert_one_sentence(done.err, "99")


@pytest.mark.parametrize("name", ["camera", "text", "empty", "broken.jpg", "no-photos"])
def test_sources_that_are_none(tmp_path: Path, server: str, cache: Path, name: str) -> None:
    (tmp_path / "text").write_text("no video")
    (tmp_path / "empty").touch()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (tmp_path / "no-photos").mkdir()
    source = "93" if name == "camera" else str(tmp_path / name)
    done = run_client(tmp_path, "--camera", source, "--server", server, cache=cache, timeout_s=60)
    assert done.code == 3, done.err
    assert_one_sentence(done.err, "93" if name == "camera" else name)


def test_a_directory_with_one_bad_picture_goes_on(tmp_path: Path, server: str, cache: Path) -> None:
    photos = write_photos(tmp_path / "mixed", count=2)
    (photos / "a-bad-one.jpg").write_bytes(b"no picture")
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--json", cache=cache)
    assert done.code == 0
    assert done.outcomes() == {"result": 2}
    assert done.summary["unreadable_files"] == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: str, photos: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache should be")
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--wait-for-server-s", "0", cache=blocked)
    assert done.code == 12
    assert_one_sentence(done.err, "HEADTAIL_CACHE")


def test_an_output_that_cannot_be_written(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--output", "/nowhere/r.jsonl", cache=cache)
    assert done.code == 2
    assert_one_sentence(done.err, "/nowhere/r.jsonl")


def test_display_without_a_screen(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    if os.environ.get("DISPLAY"):
        pytest.skip("there is a screen here")
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--display", cache=cache)
    assert done.code == 2
    assert_one_sentence(done.err, "--save-video")
