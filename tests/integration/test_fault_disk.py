"""The disk fills up: what is on it stays whole, every frame has its outcome, and the sentence at the end says which file."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest

from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import ON_BOTH_TRANSPORTS, Finished, client, over, run_client, write_clip
from tests.fakes.server_running import child, environment
from tests.fakes.small_disk import resize, small_disk


@pytest.fixture(scope="module")
def bundle(home: Path) -> Bundle:
    return write_tiny_bundle(home / "bundle", classes=4000)  # a device part of some 140 kB


@pytest.fixture(scope="module")
def server(home: Path, bundle: Bundle) -> Iterator[str]:
    with child(home, bundle.path) as s:
        yield s.address


CAMERA = ("--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off", "--json")


def assert_full(done: Finished, *words: str) -> None:
    assert done.code == 12, done.err
    assert "Traceback" not in done.err
    (sentence,) = [line for line in done.err.splitlines() if line.startswith("edge-client: ")]
    for word in words:
        assert word in sentence, sentence


def test_the_cache_is_full_at_first_contact_and_is_resumed_when_there_is_room(tmp_path: Path, server: str, photos: Path) -> None:
    with small_disk(tmp_path / "small", "64k") as disk:
        arguments = ("--camera", str(photos), "--server", server, "--json", "--log-level", "info")
        done = run_client(tmp_path, *arguments, cache=disk)
        assert_full(done, "No space left", str(disk), "HEADTAIL_CACHE")
        assert done.summary["frames"] == 0
        resize(disk, "4m")
        done = run_client(tmp_path, *arguments, cache=disk)
        assert done.code == 0, done.err
        assert done.outcomes() == {"result": 5}


def test_the_cache_is_full_when_a_running_camera_is_to_take_a_new_bundle(tmp_path: Path, server: str, photos: Path) -> None:
    old = write_tiny_bundle(tmp_path / "old", seed=3)
    with small_disk(tmp_path / "small", "64k") as disk:
        with child(tmp_path, old.path) as first:
            done = run_client(tmp_path, "--camera", str(photos), "--server", first.address, cache=disk)
            assert done.code == 0, done.err
        memory = disk / "servers.json"
        memory.write_text(memory.read_text().replace(first.address, server))
        done = run_client(tmp_path, *CAMERA, "--frames", "90", "--server", server, cache=disk)
    assert done.code == 0, done.err
    assert "cannot be had" in done.err
    assert "No space left" in done.err
    assert done.summary["bundle_switches"] == 0
    assert done.outcomes().get("local", 0) >= 60, done.outcomes()
    assert {line["bundle_sha256"] for line in done.lines} == {old.sha256}


def assert_whole(path: Path) -> int:
    """Every line is one; how many there are."""
    text = path.read_text()
    assert text.endswith("\n")
    frames = [json.loads(line)["frame"] for line in text.splitlines()]
    assert frames == list(range(len(frames)))
    return len(frames)


@ON_BOTH_TRANSPORTS
def test_the_results_fill_the_disk(tmp_path: Path, server: str, cache: Path, transport: str) -> None:
    with small_disk(tmp_path / "small", "32k") as disk:
        out = disk / "results.jsonl"
        done = run_client(
            tmp_path, *CAMERA, *over(transport), "--server", server, "--output", str(out), "--frames", "2000", cache=cache
        )
        kept = assert_whole(out)
    assert_full(done, "--output", str(out), "No space left", f"frame {kept}")
    assert 20 < kept < 200
    assert kept < done.summary["frames"] < 2000
    assert done.summary["balanced"]


def test_a_device_that_takes_nothing_at_all(tmp_path: Path, server: str, photos: Path, cache: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    done = run_client(tmp_path, "--camera", str(photos), "--server", server, "--output", "/dev/full", "--json", cache=cache)
    assert_full(done, "/dev/full", "No space left")
    assert done.summary["balanced"]


def test_a_clip_fills_the_disk_and_can_be_played_to_where_it_ends(tmp_path: Path, server: str, cache: Path) -> None:
    with small_disk(tmp_path / "small", "9m") as disk:
        out = disk / "out.avi"
        camera = ("--camera", "synthetic:fps=30,size=640x480", "--change-gate", "off", "--json")
        done = run_client(tmp_path, *camera, "--server", server, "--save-video", str(out), "--frames", "600", cache=cache)
        assert_full(done, "--save-video", str(out), "full")
        clip = cv2.VideoCapture(str(out))
        played = 0
        while clip.read()[0]:
            played += 1
    assert played >= 16
    assert done.summary["balanced"]
    assert len(done.lines) == done.summary["frames"]  # the other sink got every frame


def test_annotated_pictures_fill_the_disk_and_none_is_half(tmp_path: Path, server: str, cache: Path) -> None:
    with small_disk(tmp_path / "small", "400k") as disk:
        done = run_client(tmp_path, *CAMERA, "--server", server, "--save-video", str(disk / "out"), "--frames", "600", cache=cache)
        assert_full(done, "--save-video", "No space left")
        pictures = list((disk / "out").glob("*.jpg"))
        assert len(pictures) > 3
        assert all(cv2.imread(str(path)) is not None for path in pictures)
    assert len(done.lines) == done.summary["frames"]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_a_clip_whose_end_could_not_be_written_is_not_called_whole(tmp_path: Path, server: str, cache: Path, suffix: str) -> None:
    """No file may be longer than 20 kB here, which a clip reaches after some frames, and a disk would after hours."""
    out, source = tmp_path / f"out.{suffix}", write_clip(tmp_path / "clip.avi", frames=60, size=(640, 480))
    script = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, {resource.RLIM_INFINITY}));"
        "from edge_client.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", script, "--camera", str(source), "--server", server, "--json", "--save-video", str(out)]
    line += ["--loop", "--frames", "600"]
    env = {**environment(), "HEADTAIL_CACHE": str(cache)}
    finished = subprocess.run(line, capture_output=True, text=True, timeout=120, env=env, check=False)
    done = Finished(code=finished.returncode, out=finished.stdout, err=finished.stderr, lines=[])
    assert_full(done, str(out), "not whole", "File too large")
    assert done.summary["balanced"]
    assert 0 < done.summary["outcomes"]["result"] < 600, "it is noticed when it happens, not at the end"


def test_a_clip_that_was_written_whole_is_believed(tmp_path: Path, server: str, cache: Path) -> None:
    source = write_clip(tmp_path / "clip.avi", frames=23)
    for suffix in ("mp4", "avi", "mkv"):
        out = tmp_path / f"out.{suffix}"
        done = run_client(tmp_path, "--camera", str(source), "--server", server, "--save-video", str(out), cache=cache)
        assert done.code == 0, (suffix, done.err)


@ON_BOTH_TRANSPORTS
def test_whoever_reads_standard_output_goes_away(tmp_path: Path, server: str, cache: Path, transport: str) -> None:
    with client(tmp_path, *CAMERA, *over(transport), "--server", server, "--output", "-", "--frames", "3000", cache=cache) as edge:
        assert edge.process.stdout is not None
        for _ in range(10):
            assert edge.process.stdout.readline(), edge.process.communicate()
        edge.process.stdout.close()
        assert edge.process.wait(30) == 12
        assert edge.process.stderr is not None
        err = edge.process.stderr.read()
    assert "closed it" in err
    assert "Traceback" not in err
    assert "Exception ignored" not in err
