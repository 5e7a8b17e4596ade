"""Learning from neighbouring frames: pairs, the predicted frame's cost, what the codec would really send, colours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protos.errors import ConfigError
from splitters.bottleneck.bottleneck import GainQuantiser
from splitters.cli import main
from splitters.exporting.learned_any import load_run
from splitters.training.config import TrainConfig, VideoLearning
from splitters.training.loop import StepReport, Trainer
from splitters.training.pictures.photos import Crops, PhotoCache, drawn, list_photos
from splitters.training.video import Pairs, checked, clip_frames, predict, still_cells
from tests.unit.evaluation.test_video_evaluation import frames, write_clip
from tests.unit.training.test_train_learned import CONFIG, net

pytest.importorskip("av")

CROPS = Crops(size_px=32, area=0.9, mean=(0.5,) * 3, std=(0.25,) * 3, letterbox=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    write_clip(folder / "yard.mp4", frames(24, 64, 96), 10)
    return folder


def cached(data: Path) -> PhotoCache:
    return PhotoCache(list_photos([data]), data.parent / "cache", short_px=36)


def test_the_first_part_of_a_clip_is_taken_at_a_cameras_pace(data: Path) -> None:
    half = clip_frames(data / "yard.mp4", 10.0, 0.5, 48)
    assert len(half) == 12
    assert half[0].shape == (32, 48, 3)
    assert len(clip_frames(data / "yard.mp4", 5.0, 1.0, 48)) == 12


def test_both_frames_of_a_pair_are_shown_alike_and_draws_repeat(data: Path) -> None:
    pairs = Pairs(VideoLearning(clips=("yard.mp4",)), data, cached(data), CROPS)
    before, now = pairs.draw(6, np.random.default_rng(1))
    assert before.shape == now.shape == (6, 3, 32, 32)
    again = pairs.draw(6, np.random.default_rng(1))
    assert torch.equal(before, again[0])
    assert torch.equal(now, again[1])
    strangers = (now - now.roll(1, 0)).abs().mean((1, 2, 3))
    assert bool(((now - before).abs().mean((1, 2, 3)) < 0.6 * strangers).all())
    (piece,) = pairs.pieces()
    assert piece.shape == (12, 3, 32, 32)


def test_still_cells_are_those_without_motion_whatever_the_noise() -> None:
    before = torch.zeros(1, 3, 64, 64)
    now = before + 0.05 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    now[:, :, :16, :16] += 2.0
    found = still_cells(before, now, (0.25,) * 3, (4, 4))
    assert found[0, 0, 0, 0] == 0
    assert found.sum() == 15


def test_what_the_choice_leaves_stays_behind_and_motion_costs_bits() -> None:
    quantiser = GainQuantiser(4, (0.25, 1.0))
    before = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    now = before + 0.01
    now[1, :, 2:4, 2:4] += 8.0
    now.requires_grad_()
    gain, still = torch.tensor([0, 0]), torch.ones(2, 1, 6, 6)
    told = predict(quantiser, before, now, gain, still, 0.4)
    reference = quantiser.restore(quantiser.symbols(before, gain).round(), gain)
    assert torch.allclose(told.restored[0], reference[0])  # nothing but noise: the receiver keeps what it has
    assert told.bits[0] == 0
    assert told.bits[1] > 4 * 4
    assert (told.restored[1] - now[1])[:, 2:4, 2:4].abs().max() < 0.5
    told.restored.sum().backward()  # type: ignore[no-untyped-call]
    assert now.grad is not None
    assert torch.allclose(now.grad, torch.ones_like(now))  # straight through the choice


def run(data: Path, out: Path, config: TrainConfig, finer: float = 0.0) -> tuple[Trainer, list[StepReport]]:
    base, student = net()
    for tier in range(len(config.target_bytes)):
        student.quantiser.shift(tier, finer)
    photos = cached(data)
    crops = replace(CROPS, mean=config.mean, std=config.std)
    pairs = Pairs(config.video, data, photos, crops) if config.video else None
    trainer = Trainer(
        config, base, student, photos, out=out, device=torch.device("cpu"), clock_s=lambda: 0.0, pairs=pairs
    )  # fmt: skip
    told: list[StepReport] = []
    trainer.run(told.append)
    return trainer, told


def test_flicker_is_how_far_still_cells_lie_from_what_the_receiver_holds() -> None:
    quantiser = GainQuantiser(2, (0.5,))
    before = torch.randint(-5, 6, (1, 2, 4, 4), generator=torch.Generator().manual_seed(2)) / 2
    now = (before + 0.1).requires_grad_()
    still = torch.zeros(1, 1, 4, 4)
    still[..., :2, :] = 1
    told = predict(quantiser, before, now, torch.tensor([0]), still, 0.4)
    assert told.flicker.item() == pytest.approx((2 * 0.1) ** 2, rel=1e-3)  # a step of one half: two steps to the unit
    told.flicker.backward()  # type: ignore[no-untyped-call]
    assert now.grad is not None
    assert now.grad[..., :2, :].min() > 0
    assert not now.grad[..., 2:, :].any()


def test_flicker_and_the_predicted_frames_bits_are_in_the_loss(data: Path, tmp_path: Path) -> None:
    stage = replace(CONFIG.stages[0], steps=1, tiers=(0.0, 1.0))

    def first_loss(**weights: float) -> float:
        video = VideoLearning(clips=("yard.mp4",), **{"flicker": 0.0, "bits": 0.0, **weights})
        name = "-".join(weights) or "none"
        return run(data, tmp_path / name, replace(CONFIG, stages=(stage,), video=video), finer=4.0)[1][0].loss

    none = first_loss()
    assert first_loss(flicker=1e4) > 1.001 * none
    assert first_loss(bits=1e4) > 1.001 * none


def test_photos_alone_steer_the_bytes_and_a_batch_may_be_all_pairs(data: Path, tmp_path: Path) -> None:
    stage = replace(CONFIG.stages[0], tiers=(0.0, 1.0))
    video = VideoLearning(clips=("yard.mp4",), share=1.0)
    trainer, told = run(data, tmp_path / "all", replace(CONFIG, stages=(stage,), video=video))
    assert told[-1].tier_bytes == CONFIG.target_bytes  # not one photo was coded alone
    alone, told = run(data, tmp_path / "alone", replace(CONFIG, stages=(stage,)))
    assert told[-1].tier_bytes != CONFIG.target_bytes
    assert not torch.equal(trainer.steering.log_lambda, alone.steering.log_lambda)


def test_a_model_that_takes_blue_first_is_shown_blue_first() -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[..., 0] = 200
    seen = [drawn(picture, replace(CROPS, bgr=bgr), np.random.default_rng(0)) for bgr in (False, True)]
    assert seen[0][5, 5].tolist() == [200, 0, 0]
    assert seen[1][5, 5].tolist() == [0, 0, 200]
    assert replace(CONFIG, serving={"preprocess": {"channel_order": "bgr"}}).bgr
    assert not CONFIG.bgr


def test_what_cannot_be_learned_from_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        checked([data / "nothing.mp4"], data)
    assert checked([data / "yard.mp4"], data) == ("yard.mp4",)
    with pytest.raises(ConfigError, match="until"):
        VideoLearning(until=0.0)


def test_train_any_learns_from_video_and_goes_on_from_a_run(data: Path, tmp_path: Path) -> None:
    options = [
        "--model", "py:tests.fakes.any_models:resnet", "--weights", "random", "--at", "layer2.0.conv1", "--channels", "8",
        "--data", str(data), "--steps", "2", "--batch", "4", "--hold-out", "1", "--fit", "4", "--video", str(data / "yard.mp4"),
    ]  # fmt: skip
    assert main(["train", "any", *options, "--out", str(tmp_path / "first")]) == 0
    recipe = json.loads((tmp_path / "first" / "recipe.json").read_text())
    assert recipe["config"]["video"]["clips"] == ["yard.mp4"]
    assert main(["train", "any", *options, "--start", str(tmp_path / "first"), "--out", str(tmp_path / "second")]) == 0
    first, second = (load_run(tmp_path / name)[1].state_dict() for name in ("first", "second"))
    far = max(float((first[k].float() - second[k].float()).abs().max()) for k in first if k.startswith("decoder."))
    assert 0 < far < 0.05  # two steps from the start, not a bottleneck of its own
    (tmp_path / "empty").mkdir()
    assert main(["train", "any", *options, "--start", str(tmp_path / "empty"), "--out", str(tmp_path / "third")]) == 4
