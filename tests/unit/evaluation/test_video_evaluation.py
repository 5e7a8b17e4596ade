"""Video: frames at a camera's pace, video codecs, fidelity to the uncut model, and the comparison."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protos.errors import ConfigError, SourceError
from protos.messages import Box, Classification, ClassScore, Detection
from splitters.evaluation.video import run as video_run
from splitters.evaluation.video.clips import Part, read_clip
from splitters.evaluation.video.codecs import CODECS, VideoSetting, code_clip, video_ladder
from splitters.evaluation.video.fidelity import Fidelity, resample_segments
from splitters.evaluation.video.report import plot_video
from splitters.evaluation.video.run import VideoConfig, evaluate_video
from tests.fakes.bundles import tiny_preprocess
from tests.fakes.detector_bundle import write_cell_detector

av = pytest.importorskip("av")


def frames(count: int, height: int = 72, width: int = 96) -> list[np.ndarray]:
    """A still scene through which a bright square moves."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(40, 120, (height // 8, width // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    out = []
    for t in range(count):
        picture = scene.copy()
        x = (4 + 3 * t) % (width - 20)
        picture[20:36, x : x + 16] = 230
        out.append(picture)
    return out


def write_clip(path: Path, pictures: list[np.ndarray], fps: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "preset": "ultrafast"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(("fps", "count", "taken"), [(30, 30, 10), (10, 20, 20), (24, 48, 20), (5, 10, 10)])
def test_a_clip_is_read_at_a_cameras_pace(tmp_path: Path, fps: int, count: int, taken: int) -> None:
    clip = read_clip(write_clip(tmp_path / "c.mp4", frames(count), fps), tiny_preprocess(32))
    assert len(clip) == taken
    assert clip.frames.pictures.shape == (taken, 32, 32, 3)
    assert clip.frames.sizes_px[0] == (96, 72)


def test_a_part_of_a_clip_and_what_is_none(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "c.mp4", frames(20), 10)
    whole = read_clip(path, tiny_preprocess(32))
    second = read_clip(path, tiny_preprocess(32), part=Part(start=0.5), limit=4)
    assert np.array_equal(second.frames.pictures, whole.frames.pictures[10:14])
    (tmp_path / "no.mp4").write_bytes(b"no video at all")
    with pytest.raises(SourceError, match="cannot be read as video"):
        read_clip(tmp_path / "no.mp4", tiny_preprocess(32))
    with pytest.raises(SourceError, match="cannot be read as video"):
        read_clip(tmp_path / "absent.mp4", tiny_preprocess(32))
    with pytest.raises(SourceError, match="1 frames are left"):
        read_clip(path, tiny_preprocess(32), limit=1)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Part(start=0.7, stop=0.2)


@pytest.mark.parametrize("codec", list(CODECS))
def test_video_codecs_code_frame_by_frame_with_one_key_frame(codec: str) -> None:
    pictures = frames(8)
    fine, coarse, small = (
        code_clip(pictures, VideoSetting(codec=codec, crf=crf, share=share), 10)
        for crf, share in ((video_ladder(codec)[0].crf, 1.0), (video_ladder(codec)[5].crf, 1.0), (video_ladder(codec)[0].crf, 0.75))
    )
    assert fine.sizes.sum() > coarse.sizes.sum()
    assert fine.sizes[0] > 2 * fine.sizes[1:].max()  # one key frame, at the start
    errors = []
    for coded in (fine, coarse, small):
        assert len(coded.pictures) == 8
        assert {p.shape for p in coded.pictures} == {(72, 96, 3)}
        errors.append(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(pictures, coded.pictures, strict=True)]))
    assert errors[0] < errors[1]
    assert errors[0] < errors[2]


def test_what_x264_writes_about_itself_is_not_counted() -> None:
    coded = code_clip([np.zeros((64, 64, 3), np.uint8)] * 2, VideoSetting(codec="h264", crf=40, share=1.0), 10)
    assert coded.sizes[0] < 200  # the encoder's own account of its settings has some 700 bytes


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(ConfigError, match="'vp8' is unknown; there are h264, h265, av1"):
        video_ladder("vp8")


def boxes(*rows: tuple[float, float, int]) -> Detection:
    """(x, score, class) of boxes of 10 x 10 px."""
    return Detection(boxes=tuple(Box(class_id=c, score=s, box_px=(x, 0.0, x + 10.0, 10.0)) for x, s, c in rows))


def test_fidelity_is_average_precision_against_the_uncut_models_boxes() -> None:
    whole = [boxes((0, 0.9, 1), (50, 0.5, 2), (90, 0.2, 1)), boxes((0, 0.8, 1))]
    judge, none = Fidelity.to(whole), np.ones((1, 2), np.int32)
    assert judge.score(whole, none).value == pytest.approx(1.0)
    assert judge.score([boxes((0, 0.9, 1), (50, 0.5, 1)), whole[1]], none).value == pytest.approx(2 / 3, abs=0.02)
    # A false box that is less sure than every right one costs nothing; one that is surer does.
    unsure = [boxes((0, 0.9, 1), (50, 0.5, 2), (150, 0.05, 1)), whole[1]]
    sure = [boxes((0, 0.9, 1), (50, 0.5, 2), (150, 0.99, 1)), whole[1]]
    assert judge.score(unsure, none).value == pytest.approx(1.0)
    assert judge.score(sure, none).value == pytest.approx(0.75, abs=0.01)
    # Two boxes on one object: the second is wrong.
    assert judge.score([boxes((0, 0.9, 1), (1, 0.85, 1), (50, 0.5, 2)), whole[1]], none).value < 1
    with pytest.raises(ConfigError, match="finds no box"):
        Fidelity.to([boxes((0, 0.1, 1))])


def test_classifications_agree_or_not() -> None:
    first, other = (Classification(top=(ClassScore(class_id=c, score=0.5),)) for c in (3, 4))
    judge = Fidelity.to([first, first, other, other])
    assert judge.metric == "agreement"
    assert judge.score([first, other, other, other], np.array([[0, 2, 1, 1]], np.int32)).value == 0.75
    assert judge.score([first, other, other, other], np.array([[0, 2, 1, 1]], np.int32)).drawn[0] == 0.5


def test_segments_are_drawn_whole() -> None:
    counts = resample_segments([7, 5], 3, 50)
    assert counts.shape == (50, 12)
    for start, stop in ((0, 3), (3, 6), (6, 7), (7, 10), (10, 12)):
        assert (counts[:, start:stop] == counts[:, start : start + 1]).all()


def test_a_bundle_is_compared_on_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_cell_detector(tmp_path / "bundle")
    rng = np.random.default_rng(1)
    colours = rng.integers(0, 256, (8, 8, 3))
    clips = []
    for name in ("a", "b"):
        pictures = [np.kron(np.roll(colours, t // 2, axis=1), np.ones((16, 16, 1))).astype(np.uint8) for t in range(8)]
        clips.append(write_clip(tmp_path / f"{name}.mp4", pictures, 10))
    config = VideoConfig(
        clips=tuple(clips), against=("h264",), crfs=(20, 51), draws=20, segment_s=0.2, ages=(1, 3), cache=tmp_path / "known"
    )
    report = evaluate_video(bundle, config)
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert set(told["video"]) == {"a", "b"}
    assert set(told["video_bd_rate_percent"]) == {"h264"}
    clip = told["video"]["a"]
    assert [(p["id"], p["reference_age"]) for p in clip["points"]] == [(p.id, a) for a in (1, 3) for p in bundle.points]
    assert clip["points"][0]["accuracy"] > 0.9
    assert clip["points"][0]["bytes_mean"] > 0
    assert len(clip["baselines"]) == 6
    assert set(clip["bd_rate_percent"]) == {"h264"}
    plot_video(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    # The whole model has answered: the same clips, coded again, need it no more, and another setting does.
    monkeypatch.setattr(video_run, "run_whole", lambda *_: pytest.fail("the whole model ran again"))
    again = evaluate_video(bundle, config)
    for before, after in zip(report.clips, again.clips, strict=True):
        assert [(t.bytes_mean, t.accuracy) for t in before.theirs] == [(t.bytes_mean, t.accuracy) for t in after.theirs]
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        evaluate_video(bundle, replace(config, crfs=(30, 51)))
    with pytest.raises(ConfigError, match="no operating point 99"):
        evaluate_video(bundle, VideoConfig(clips=tuple(clips), points=(99,), against=()))
    with pytest.raises(ConfigError, match="names of their own"):
        VideoConfig(clips=(clips[0], clips[0]))
