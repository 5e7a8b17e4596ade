"""Nothing of the user's is destroyed: outputs that are the source, that others write, or that were rotated away."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from edge_client.capture.sources import parse_source
from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.sinks import open_json_file, open_video
from edge_client.sinks.output_file import refuse_overwriting
from protos.errors import ConfigError, StorageError

PICTURE = np.full((48, 64, 3), 90, np.uint8)


def report(index: int, *, image: Any = None, position_s: float | None = None) -> FrameReport:
    position_ns = None if position_s is None else round(position_s * 1e9)
    frame = CapturedFrame(
        index=index,
        image=image,
        captured_ns=1,
        captured_unix_ns=1,
        source="a.jpg",
        position_ns=position_ns,
        width_px=64,
        height_px=48,
    )
    return FrameReport(frame=frame, model="m", bundle_sha256="c" * 64, outcome=Outcome.RESULT)


def frames_in(path: Path) -> list[int]:
    return [json.loads(line)["frame"] for line in path.read_text().splitlines()]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        cv2.imwrite(str(tmp_path / "photos" / name), PICTURE)
    return tmp_path / "photos"


@pytest.mark.parametrize("how", ["same", "other spelling", "symbolic link", "hard link"])
@pytest.mark.parametrize("option", ["--output", "--save-video"])
def test_an_output_that_is_the_source_is_refused(photos: Path, tmp_path: Path, how: str, option: str) -> None:
    source = photos / "a.png"
    target = tmp_path / "out.png"
    match how:
        case "same":
            target = source
        case "other spelling":
            target = photos / "sub" / ".." / "a.png"
        case "symbolic link":
            target.symlink_to(source)
        case _:
            target.hardlink_to(source)
    for camera in (source, photos):  # the picture itself, and the directory that it is an entry of
        with pytest.raises(ConfigError, match="would be overwritten"):
            refuse_overwriting(option, str(target), parse_source(str(camera)))
    assert np.array_equal(cv2.imread(str(source)), PICTURE)


def test_outputs_beside_the_source_are_fine_and_those_that_would_be_read_again_are_not(photos: Path, tmp_path: Path) -> None:
    source = parse_source(str(photos))
    (photos / "results.jsonl").write_text("{}\n")
    for target in (photos / "results.jsonl", tmp_path / "new.mp4", tmp_path / "annotated"):
        refuse_overwriting("--output", str(target), source)
    for target in (photos, photos / "annotated"):
        with pytest.raises(ConfigError):
            refuse_overwriting("--save-video", str(target), source)
    with pytest.raises(ConfigError, match="--output"):
        refuse_overwriting("--save-video", str(tmp_path / "x"), source, [("--output", str(tmp_path / "x"))])


def test_two_clients_never_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = open_json_file(path, dict)
    first.take(report(0))
    for append in (False, True):
        with pytest.raises(ConfigError, match="another program"):
            open_json_file(path, dict, append=append)
    clip = open_video(tmp_path / "a.mp4", dict, fps=lambda: 5.0, pictures=False, many=True)
    with pytest.raises(ConfigError, match="another program"):
        open_video(tmp_path / "a.mp4", dict, fps=lambda: 5.0, pictures=False, many=True)
    clip.close()
    first.take(report(1))
    first.close()
    assert frames_in(path) == [0, 1]
    open_json_file(path, dict, append=True).close()


def test_results_that_are_removed_renamed_or_cut_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    sink = open_json_file(path, dict)
    sink.take(report(0))
    path.rename(tmp_path / "old.jsonl")
    sink.take(report(1))
    assert (frames_in(tmp_path / "old.jsonl"), frames_in(path)) == ([0], [1])
    path.unlink()
    sink.take(report(2))
    assert frames_in(path) == [2]
    os.truncate(path, 0)  # logrotate's copytruncate
    sink.take(report(3))
    assert frames_in(path) == [3]
    path.rename(tmp_path / "older.jsonl")
    path.touch()  # logrotate's create
    sink.take(report(4))
    assert frames_in(path) == [4]
    assert len(caplog.records) == 4
    path.unlink()
    path.write_text("a letter to grandmother")
    with pytest.raises(StorageError, match="left as it is"):
        sink.take(report(5))
    assert path.read_text() == "a letter to grandmother"


def test_results_are_rotated_at_their_size_and_every_line_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    sink = open_json_file(path, dict, max_bytes=1000)
    for index in range(30):
        sink.take(report(index))
    sink.close()
    files = [path, *(path.with_name(f"results.jsonl.{n}") for n in range(1, 5))]
    assert all(0 < file.stat().st_size <= 1000 for file in files)
    kept = [frame for file in reversed(files) for frame in frames_in(file)]
    assert kept == list(range(30 - len(kept), 30)), "in order, the oldest are the ones that went"
    assert not path.with_name("results.jsonl.5").exists()


# ---------------------------------------------------------------- clips


def play(path: Path) -> tuple[list[float], str, str]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [float(frame.time or 0) for frame in container.decode(stream)]
        return times, stream.codec_context.name, str(stream.codec_context.pix_fmt)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_clip_lasts_as_long_as_its_scene(tmp_path: Path, suffix: str) -> None:
    """Every third frame was replaced by a newer one; a pause of the camera; 10 frames a second, which nobody said beforehand."""
    path = tmp_path / f"out:1?#%03d{suffix}"
    sink = open_video(path, dict, fps=lambda: 10.0, pictures=False, many=True)
    times = [0.1 * i + (2.0 if i >= 20 else 0.0) for i in range(30)]
    for i, at_s in enumerate(times):
        sink.take(report(i, image=None if i % 3 == 1 else PICTURE, position_s=5 + at_s))
    sink.close()
    shown, codec, pixels = play(path)
    assert (codec, pixels) == ("h264", "yuv420p")
    assert shown == pytest.approx(times, abs=0.01)


def test_pictures_of_other_sizes_and_odd_sides_are_fitted(tmp_path: Path) -> None:
    sink = open_video(tmp_path / "out.mp4", dict, fps=lambda: 0.0, pictures=True, many=True)
    for i, (height, width) in enumerate(((721, 1283), (48, 64), (900, 3), (3, 900))):
        sink.take(report(i, image=np.full((height, width, 3), 90, np.uint8)))
    sink.close()
    assert play(tmp_path / "out.mp4")[0] == pytest.approx([0.0, 0.5, 1.0, 1.5])


def test_a_clip_that_was_removed_is_not_called_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    sink = open_video(path, dict, fps=lambda: 10.0, pictures=False, many=True)
    sink.take(report(0, image=PICTURE, position_s=0.0))
    path.unlink()
    with pytest.raises(StorageError, match="lost"):
        sink.close()


def test_a_run_without_frames_leaves_no_empty_clip(tmp_path: Path) -> None:
    old = tmp_path / "old.mp4"
    old.write_bytes(b"kept")
    for path in (tmp_path / "new.mp4", old):
        open_video(path, dict, fps=lambda: 10.0, pictures=False, many=True).close()
    assert not (tmp_path / "new.mp4").exists()
    assert old.read_bytes() == b"kept"


def test_an_annotated_picture_is_never_written_through_a_link(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "annotated"
    out.mkdir()
    (out / "000000-a.jpg").symlink_to(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    sink = open_video(out, dict, fps=lambda: 0.0, pictures=True, many=True)
    sink.take(report(0, image=PICTURE))
    sink.close()
    assert (photos / "a.png").read_bytes() == before
    assert not (out / "000000-a.jpg").is_symlink()
