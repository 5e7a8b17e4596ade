"""A training run as its user sees it: stopped, resumed with other settings, on broken photos, on a device that is not there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from protos.errors import ConfigError, SourceError
from splitters.bottleneck.learned_any import AnyCutConfig, build_any, fused_channels
from splitters.cli import main
from splitters.training import run as training
from splitters.training.config import TrainConfig, share_out
from splitters.training.devices import chosen_device
from splitters.training.pictures.photos import PhotoCache, list_photos
from splitters.training.recipes import any_cut, recipe
from tests.fakes import any_models
from tests.fakes.smooth_photos import write_smooth_photos


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_smooth_photos(tmp_path / "photos", 8, seen_px=(8, 6), size_px=(96, 72))


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*more: str) -> int:
        options = ["--model", "py:tests.fakes.any_models:resnet", "--weights", "random", "--at", "layer2", "--channels", "8"]
        options += ["--data", str(data), "--out", str(tmp_path / "run"), "--batch", "2", "--hold-out", "2", "--fit", "2"]
        return main(["train", "any", *options, "--steps", "2", *more])

    return run


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 40, 41, 299])
@pytest.mark.parametrize("stem", ["", "stem"])
def test_as_many_steps_are_trained_as_were_asked_for(steps: int, stem: str) -> None:
    assert any_cut("timm:x", AnyCutConfig(at="a", stem_at=stem), steps=steps).steps == steps
    assert recipe("efficientnet-lite0").scaled(steps).steps == steps


def test_shares_sum_up() -> None:
    assert share_out(40, (500, 350, 326, 1020)) == [9, 6, 6, 19]
    assert share_out(1, (1, 1)) == [1, 0]
    with pytest.raises(ConfigError):
        share_out(0, (1, 1))


def test_a_run_that_was_stopped_says_how_far_it_came(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = training.build

    def interrupted(config: TrainConfig, sample: torch.Tensor) -> object:
        os.kill(os.getpid(), signal.SIGINT)  # before the first step
        return build(config, sample)

    monkeypatch.setattr(training, "build", interrupted)
    assert train("--json") == 130
    told = capsys.readouterr().out.splitlines()
    assert "stopped after 0 of 2 steps" in told[-2]
    assert json.loads(told[-1])["steps"] == 0
    assert not json.loads(told[-1])["complete"]
    assert not (tmp_path / "run" / "recipe.json").exists()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]) == 4, "half a training is no bundle"
    monkeypatch.setattr(training, "build", build)
    assert train() == 0
    assert "2 of 2 steps" in capsys.readouterr().out


OTHER = {
    "seed is 0 there and 1 here": ["--seed", "1"], "steps": ["--steps", "3"], "batch is 2": ["--batch", "3"],
    "target_bytes": ["--bytes", "900", "300"],
}  # fmt: skip


def test_other_settings_and_other_photos_with_the_same_out_are_refused(
    train: Callable[..., int], tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    recipe_file = tmp_path / "run" / "recipe.json"
    before = recipe_file.read_bytes()
    for named, more in OTHER.items():
        assert train(*more) == 2
        assert named in capsys.readouterr().err
    Image.new("RGB", (60, 60), "red").save(data / "more.png")
    assert train() == 2
    assert "photos" in capsys.readouterr().err
    assert recipe_file.read_bytes() == before
    (data / "more.png").unlink()
    assert train() == 0, "the same settings go on"


def test_broken_photos_are_named_counted_and_left_out(
    train: Callable[..., int], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (data / "0.png").read_bytes()
    (data / "cut.png").write_bytes(whole[: len(whole) // 3])
    (data / "._0.png").write_bytes(b"\x00\x05\x16\x07Mac OS X" + bytes(4000))
    (data / "empty.jpg").write_bytes(b"")
    (data / "folder.jpg").mkdir()
    assert train("--hold-out", "0", "--json") == 0
    told = capsys.readouterr().out.splitlines()
    assert json.loads(told[-1])["unreadable"] == 3
    assert "3 photos could not be read" in "\n".join(told)
    made = json.loads((tmp_path / "run" / "recipe.json").read_text(encoding="utf-8"))
    assert (made["photos"], sorted(made["unreadable"])) == (8, ["._0.png", "cut.png", "empty.jpg"])


def test_no_readable_photo_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(SourceError, match="not one of 1 photos"):
        PhotoCache(list_photos([tmp_path]), tmp_path / "cache")


def test_a_changed_photo_is_decoded_again(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    assert PhotoCache(list_photos([tmp_path]), tmp_path / "cache").photo(0)[0, 0].tolist() == [255, 0, 0]
    Image.new("RGB", (64, 48), "lime").save(tmp_path / "a.png")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert PhotoCache(list_photos([tmp_path]), tmp_path / "cache").photo(0)[0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("device", ["cuda:3", "gpu", "", "cpu:x", "meta", "xpu"])
def test_a_device_that_is_not_there_is_one_sentence(device: str) -> None:
    if device == "cuda:3" and torch.cuda.device_count() > 3:
        pytest.skip("this machine has four GPUs")
    with pytest.raises(ConfigError, match="--device"):
        chosen_device(device, "--device")
    assert chosen_device("cpu", "--device") == torch.device("cpu")


@pytest.mark.parametrize(
    "more", [["--steps", "0"], ["--batch", "-1"], ["--seed", "-1"], ["--fit", "0"], ["--channels", "0"], ["--hold-out", "-2"]]
)
def test_impossible_numbers_are_refused(train: Callable[..., int], more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*more) == 2
    assert more[0] in capsys.readouterr().err


def test_a_latent_has_no_more_channels_than_cross(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--channels", "64", "--shrink", "1") == 0
    assert "24 channels cross" in capsys.readouterr().err
    made = json.loads((tmp_path / "run" / "recipe.json").read_text(encoding="utf-8"))
    assert made["config"]["cut"]["channels"] == 24
    assert made["layers"][-1] == 24


def test_a_bottleneck_can_be_wider_than_what_crosses() -> None:
    model, _ = any_models.resnet()
    sample = torch.randn(4, 3, 64, 64)
    config = AnyCutConfig(at="layer2", shrink=1, channels=40)
    assert fused_channels(model, sample[:1], config) == 24
    base, student = build_any(model, sample[:1], config, sample)
    assert isinstance(base.stem, nn.Module)
    with torch.no_grad():
        latent = student.eval().latent(sample, 0)
        finest = student.quantiser(latent, torch.zeros(4, dtype=torch.long), torch.ones(4, 40))[1]
    assert latent.shape[1] == 40
    assert torch.isfinite(finest).all()
    assert not latent[:, 24:].any()


def test_the_start_of_a_run_is_part_of_what_it_is(tmp_path: Path) -> None:
    from splitters.training.checkpoint import describe_run

    config = replace(recipe("efficientnet-lite0-joint"), start=str(tmp_path))
    (tmp_path / "learned.safetensors").write_bytes(b"one")
    one = describe_run(config, "photos")
    (tmp_path / "learned.safetensors").write_bytes(b"two")
    assert describe_run(config, "photos") != one
