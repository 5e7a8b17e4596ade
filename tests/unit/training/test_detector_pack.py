"""The detector's training pictures in one file, and what two teachers say together."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from protos.errors import ConfigError, SourceError
from splitters.cli import main
from splitters.training.detector.data import Photo
from splitters.training.detector.pack import read_pack, write_pack
from splitters.training.detector.picodet import PicoDetTeacher, mean_of, merged
from splitters.training.detector.teacher import Dense
from splitters.zoo.onnx_detectors import IMAGENET_MEAN, IMAGENET_STD


def photos(count: int = 3, side: int = 320) -> list[Photo]:
    rng = np.random.default_rng(0)
    low = rng.integers(0, 255, (count, 8, 8, 3), np.uint8)
    pictures = np.repeat(np.repeat(low, side // 8, 1), side // 8, 2)
    return [(f"s{i}", p, np.array([[8, 16, 40, 80, i, 1.0]] * i, np.float32).reshape(-1, 6)) for i, p in enumerate(pictures)]


def test_a_pack_gives_back_pictures_boxes_and_sources(tmp_path: Path) -> None:
    quality = write_pack(photos(), tmp_path / "a.pack", longest_px=160)
    found = read_pack(tmp_path / "a.pack")
    assert quality == 90
    assert [(e.source, len(e.boxes), e.image.shape) for e in found] == [(f"s{i}", i, (160, 160, 3)) for i in range(3)]
    assert found[2].boxes.tolist() == [[4, 8, 20, 40, 2, 1]] * 2
    inner = found[1].image[5:15, 5:15].astype(int)
    assert np.abs(inner - photos()[1][1][10, 10].astype(int)).max() < 8, "RGB stays RGB"


def test_a_pack_keeps_its_budget_or_says_that_it_cannot(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    noisy: list[Photo] = [("n", rng.integers(0, 255, (256, 256, 3), np.uint8), np.zeros((0, 6), np.float32))] * 4
    quality = write_pack(noisy, tmp_path / "b.pack", budget_bytes=120_000)
    assert quality < 90
    assert (tmp_path / "b.pack").stat().st_size < 121_000
    with pytest.raises(ConfigError, match="do not fit"):
        write_pack(noisy, tmp_path / "c.pack", budget_bytes=10_000)
    assert not (tmp_path / "c.pack").exists()


def test_what_is_no_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.pack").write_bytes(b"no pack")
    with pytest.raises(SourceError, match="no pack"):
        read_pack(tmp_path / "d.pack")
    write_pack(photos(), tmp_path / "e.pack")
    data = bytearray((tmp_path / "e.pack").read_bytes())
    data[data.index(b"\xff\xd8\xff") :] = bytes(len(data) - data.index(b"\xff\xd8\xff"))
    (tmp_path / "e.pack").write_bytes(data)
    with pytest.raises(SourceError, match="no pack"):
        read_pack(tmp_path / "e.pack")


def test_two_teachers_share_the_scores_and_the_surest_draws_the_box() -> None:
    a = Dense(torch.tensor([[[0.8, 0.0], [0.1, 0.0]]]), torch.zeros(1, 2, 4))
    b = Dense(torch.tensor([[[0.2, 0.4], [0.0, 0.9]]]), torch.ones(1, 2, 4))
    both = mean_of([a, b])
    assert torch.allclose(both.scores, torch.tensor([[[0.5, 0.2], [0.05, 0.45]]]))
    assert both.boxes[0, :, 0].tolist() == [0, 1]


def test_the_coarsest_level_speaks_where_it_is_surer() -> None:
    fine = torch.full((1, 2, 2, 1), 0.5), torch.zeros(1, 2, 2, 4)
    fine[0][0, 1, 0] = 0.9
    scores, boxes = merged(fine, (torch.full((1, 1, 1, 1), 0.7), torch.ones(1, 1, 1, 4)))
    assert scores.flatten().tolist() == pytest.approx([0.7, 0.7, 0.9, 0.7])
    assert boxes[0, :, 0].tolist() == [1, 1, 0, 1]


@pytest.mark.skipif("HEADTAIL_DATA" not in os.environ, reason="needs HEADTAIL_DATA")
def test_picodet_says_at_its_own_size_what_the_published_file_says() -> None:
    path = Path(os.environ["HEADTAIL_DATA"]) / "weights" / "picodet_s_416_coco.onnx"
    image = np.random.default_rng(2).integers(0, 255, (2, 416, 416, 3), np.uint8)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    whole = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = ((image[:1].astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)
    published = whole.run(None, {"image": np.ascontiguousarray(x)})
    with pytest.raises(ValueError, match="64"):
        PicoDetTeacher(path)(image)
    at_384, at_320 = (PicoDetTeacher(path)(image[:, :s, :s]) for s in (384, 320))
    assert at_384.scores.shape == (2, 48**2 + 24**2 + 12**2, 80)
    # Far from the border a position sees the same pixels whatever the canvas; global pooling makes the rest of the difference.
    finest = at_384.scores[0, : 48**2].reshape(48, 48, 80)[4:20, 4:20].amax(-1)
    known = torch.from_numpy(published[0][0]).reshape(52, 52, 80)[4:20, 4:20].amax(-1)
    assert float((finest - known).abs().mean()) < 0.05
    assert at_320.boxes.shape == (2, 40**2 + 20**2 + 10**2, 4)


def test_the_recipe_detector_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["train", "detector", "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main(asked) == 2
    assert "yolox_nano_416.onnx is not in" in capsys.readouterr().err
    assert main([*asked, "--seconds", "0"]) == 2
    assert main(["train", "efficientnet-lite0", "--data", str(tmp_path), "--out", str(tmp_path), "--pack", "x"]) == 2
    assert "--pack belongs to the recipe detector" in capsys.readouterr().err
