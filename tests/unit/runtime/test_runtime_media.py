"""The readers of pictures and videos: content decides, everything is upright, and what is missing is told."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from protos.errors import SourceError
from splitters.runtime.pictures import content_of, files_below, read_picture, readable
from splitters.runtime.video import VideoReader

SCENE = np.zeros((40, 60, 3), np.uint8)
SCENE[:20, :30], SCENE[:20, 30:], SCENE[20:, :30], SCENE[20:, 30:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
_STORED = {  # how a camera stores an upright scene so that a viewer who obeys the tag sees it upright
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
    6: np.rot90, 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format_is_upright(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(_STORED[orientation](SCENE)))
    more = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    stored.save(tmp_path / "photo", form, exif=exif, **more)
    picture = read_picture(tmp_path / "photo")[..., ::-1]
    assert picture.shape == SCENE.shape
    # Away from the edges of the four fields, which JPEG blurs.
    for y, x in ((8, 12), (8, 48), (32, 12), (32, 48)):
        assert np.abs(picture[y, x].astype(int) - SCENE[y, x]).max() < 30


@pytest.mark.parametrize("name", ["a.jpg", "a.jpe", "a.mp4", "noext", "2024-01-01T12:00:00.png", "50%d?#.bin", "a.txt"])
def test_content_decides_what_a_file_is(tmp_path: Path, name: str) -> None:
    ok, data = cv2.imencode(".png", SCENE)
    (tmp_path / name).write_bytes(data.tobytes())
    assert ok
    assert content_of(tmp_path / name) == "picture"
    assert np.array_equal(read_picture(tmp_path / name), SCENE)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tiff", ".jp2"])
def test_half_a_picture_is_none(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    _, data = cv2.imencode(suffix, noise)
    (tmp_path / "half").write_bytes(data.tobytes()[: len(data) // 2])
    with pytest.raises(SourceError, match="half"):
        read_picture(tmp_path / "half")


def test_a_picture_that_claims_too_much_is_not_decoded(tmp_path: Path) -> None:
    _, data = cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))
    raw = bytearray(data.tobytes())
    raw[16:24] = (30_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bytes(raw))
    with pytest.raises(SourceError, match="megapixels"):
        read_picture(tmp_path / "bomb.png")


def test_bad_pictures_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "z.png"):
        cv2.imwrite(str(tmp_path / name), SCENE)
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7 Mac OS X")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    bad: list[Path] = []
    assert [path.name for path, _ in readable(files_below(tmp_path), unreadable=bad)] == ["a.png", "z.png"]
    assert sorted(path.name for path in bad) == ["._a.png", "empty.jpg", "gone.jpg"]
    assert all(path.name in caplog.text for path in bad)


# ---------------------------------------------------------------- video


def write_video(
    path: Path, *, codec: str = "libx264", frames: int = 40, stamps: Callable[[int], int] = lambda i: i, **options: str
) -> Path:
    """A clip of a moving scene, 10 frames a second where ``stamps`` counts tenths of a second."""
    background = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 160, 120
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = 10
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(background, 3 * i, 1), format="bgr24")
            frame.pts = stamps(i)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_all(path: Path) -> tuple[list[float], VideoReader]:
    reader = VideoReader(path, shown=path.name)
    times = []
    while (frame := reader.read()) is not None:
        times.append(frame[1])
    reader.close()
    return times, reader


FORMS = [("mp4", "libx264"), ("mov", "libx264"), ("mkv", "libx264"), ("avi", "mjpeg"), ("ts", "libx264"), ("flv", "libx264")]


@pytest.mark.parametrize(("suffix", "codec"), FORMS)
def test_a_whole_video_lacks_nothing(tmp_path: Path, suffix: str, codec: str) -> None:
    times, reader = read_all(write_video(tmp_path / f"whole:1?#%d.{suffix}".replace("%d", "%03d"), codec=codec))
    assert times == pytest.approx([i / 10 for i in range(40)], abs=0.002)
    assert not reader.faults, str(reader.faults)


def test_a_video_behind_its_index_is_read_too(tmp_path: Path) -> None:
    times, reader = read_all(write_video(tmp_path / "a.mp4", movflags="faststart"))
    assert len(times) == 40
    assert not reader.faults


@pytest.mark.parametrize(("suffix", "codec"), [f for f in FORMS if f[0] != "ts"])
def test_a_video_that_was_cut_off_says_so(tmp_path: Path, suffix: str, codec: str) -> None:
    options = {"movflags": "faststart"} if suffix in ("mp4", "mov") else {}
    path = write_video(tmp_path / f"cut.{suffix}", codec=codec, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    times, reader = read_all(path)
    assert 5 < len(times) < 35
    assert reader.faults.missing or reader.faults.promised_s, str(reader.faults)


@pytest.mark.parametrize(("suffix", "codec"), FORMS)
def test_a_hole_in_a_video_is_told(tmp_path: Path, suffix: str, codec: str) -> None:
    path = write_video(tmp_path / f"hole.{suffix}", codec=codec)
    data = bytearray(path.read_bytes())
    start = len(data) * 2 // 5
    data[start : start + len(data) // 5] = bytes(len(data) // 5)
    path.write_bytes(bytes(data))
    times, reader = read_all(path)
    assert len(times) < 40 or reader.faults.damaged
    assert reader.faults, "silent about the hole"
    assert times == sorted(times)


def test_a_video_without_its_index_is_an_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SourceError, match=r"a\.mp4 is no video"):
        VideoReader(path, shown="a.mp4")


def test_a_text_is_no_video_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("a.txt", "a.mp4", "a.nfo"):
        (tmp_path / name).write_text("no video\n" * 100)
        with pytest.raises(SourceError, match="no video"):
            VideoReader(tmp_path / name, shown=name)


def test_time_is_the_sources_own(tmp_path: Path) -> None:
    """A variable frame rate: half as many frames a second in the second half."""
    times, reader = read_all(write_video(tmp_path / "v.mp4", stamps=lambda i: i if i < 20 else 2 * i - 20))
    assert times == pytest.approx([i / 10 if i < 20 else (2 * i - 20) / 10 for i in range(40)], abs=0.002)
    assert not reader.faults


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int) -> None:
    path = tmp_path / "r.mp4"
    large = cv2.resize(SCENE, (240, 160), interpolation=cv2.INTER_NEAREST)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stored = np.ascontiguousarray(np.rot90(large, -degrees // 90))  # viewers turn it back counter-clockwise
        stream.width, stream.height = stored.shape[1], stored.shape[0]
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode(None))
    frame = VideoReader(path, shown="r").read()
    assert frame is not None
    picture = frame[0][..., ::-1]
    assert picture.shape == large.shape
    for y, x in ((40, 60), (40, 180), (120, 60), (120, 180)):
        assert np.abs(picture[y, x].astype(int) - large[y, x]).max() < 30
