"""What ``--camera`` can be, without opening anything that blocks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_client.capture.capture import CaptureConfig
from edge_client.capture.sources import PictureCamera, Source, SyntheticCamera, open_camera, parse_source
from protos.errors import ConfigError, SourceError


def test_kinds_of_sources(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((4, 5, 3), np.uint8))
    (tmp_path / "a.jpg").rename(tmp_path / "a.JPG")
    (tmp_path / "a.JPG").with_name("noext").write_bytes((tmp_path / "a.JPG").read_bytes())
    (tmp_path / "clip.mp4").touch()
    assert parse_source("0").kind == "device"
    assert parse_source("rtsp://camera/1").kind == "url"
    assert parse_source("http://camera/stream.mjpg").kind == "url"
    assert parse_source(str(tmp_path)).kind == "directory"
    assert parse_source(str(tmp_path / "a.JPG")).kind == "picture"
    assert parse_source(str(tmp_path / "noext")).kind == "picture"
    assert parse_source(str(tmp_path / "clip.mp4")).kind == "video"
    assert parse_source("synthetic:").kind == "synthetic"
    for text in ("nowhere", "/dev/video977"):
        with pytest.raises(SourceError):
            parse_source(text)
    with pytest.raises(ConfigError):
        parse_source("")


@pytest.mark.parametrize(
    "text", ["synthetic:fps=0", "synthetic:size=3", "synthetic:size=axb", "synthetic:colour=red", "synthetic:fps=nan"]
)
def test_bad_synthetic_options(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_source(text)


def test_what_is_live() -> None:
    assert CaptureConfig(source=parse_source("synthetic:")).live
    assert CaptureConfig(source=parse_source("3")).live
    video = Source(kind="video", target="x.mp4")
    assert not CaptureConfig(source=video).live
    assert CaptureConfig(source=video, realtime=True).live


def test_the_test_pattern_moves_or_stands_still() -> None:
    moving, still = SyntheticCamera("size=64x48"), SyntheticCamera("still=1,size=64x48,fps=5")
    a, b = moving.read(), moving.read()
    c, d = still.read(), still.read()
    assert a is not None
    assert b is not None
    assert c is not None
    assert d is not None
    assert a.image.shape == (48, 64, 3)
    assert not np.array_equal(a.image, b.image)
    assert np.array_equal(c.image, d.image)
    assert still.fps == 5


def test_a_directory_in_order_with_its_subdirectories(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((4, 5, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "aa.png").write_bytes(b"broken")
    camera = open_camera(parse_source(str(tmp_path)))
    assert isinstance(camera, PictureCamera)
    names = []
    while (shot := camera.read()) is not None:
        names.append(shot.name)
    assert names == ["a.png", "b.png", "sub/c.png"]
    assert [p.name for p in camera.faults().unreadable] == ["aa.png"]
    assert [p.name for p in camera.faults().left_out] == ["notes.txt"]


def test_a_directory_without_pictures_and_a_broken_picture(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no pictures"):
        open_camera(parse_source(str(tmp_path))).read()
    (tmp_path / "x.png").write_bytes(b"broken")
    with pytest.raises(SourceError, match="no picture"):
        open_camera(parse_source(str(tmp_path / "x.png"))).read()


def test_a_file_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(SourceError, match="no video"):
        open_camera(parse_source(str(tmp_path / "x.mp4")))
