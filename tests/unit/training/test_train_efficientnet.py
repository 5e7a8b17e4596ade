"""Recipes that go on from the shipped weights: late blocks, slow shared parts, held-out classes, a single operating point."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from protos.errors import BundleError, ConfigError
from splitters.bottleneck.ensemble import OwnEncoder, SmallEncoder, SmallEncoderConfig
from splitters.bottleneck.learned import LearnedSplit
from splitters.bottleneck.narrow import narrow
from splitters.evaluation.bdrate import Curve, resample
from splitters.exporting.learned import WEIGHTS_FILE, exportable
from splitters.training.loop import parameter_groups
from splitters.training.pictures.photos import hold_out_evenly
from splitters.training.recipes import RECIPES, recipe
from splitters.training.single import estimated_bytes, parse_point, single_from, single_point
from splitters.zoo.efficientnet_lite0 import WEIGHTS
from splitters.zoo.efficientnet_lite0.export import load_student, with_stem
from splitters.zoo.efficientnet_lite0.split import TIERS, build_learned_efficientnet
from tests.bench.penalty import penalty, read_at

FOLDER = WEIGHTS


@pytest.fixture(scope="module")
def shipped() -> LearnedSplit:
    return load_student(FOLDER)


def test_late_blocks_start_as_the_identity_and_then_learn() -> None:
    torch.manual_seed(0)
    config = SmallEncoderConfig(channels=(8, 12), strides=(2, 2), kernels=(3, 3), widths=(0.5, 1.0), deep=2)
    encoder = SmallEncoder(config, 4, 5)
    x = torch.randn(3, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(x), encoder.project(encoder.body(x)))
    optimiser = torch.optim.SGD(encoder.deep.parameters(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        encoder.train()(x).square().mean().backward()
        optimiser.step()
    assert all(
        p.grad is not None and float(p.grad.abs().max()) > 0 for n, p in encoder.deep.named_parameters() if "norms.0" not in n
    )
    with torch.no_grad():
        assert not torch.allclose(encoder.eval()(x), encoder.project(encoder.body(x)))


def test_an_untrained_student_begins_near_its_model() -> None:
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(12, 3, 12, 12), size=(96, 96), mode="bicubic")
    base, student = build_learned_efficientnet(smooth[:8], (900.0, 90.0))
    with torch.no_grad():
        wanted = base.body(base.stem(smooth[8:]))
        spread = (wanted - wanted.mean(0)).square().mean()
        latents = [student.latent(smooth[8:], tier) for tier in range(len(TIERS))]
        errors = [float((student.decoder(latent) - wanted).square().mean() / spread) for latent in latents]
        sizes = [estimated_bytes(student, smooth[:8], len(TIERS) - 1, gain) for gain in (0, 1)]
    assert 0 < errors[3] < errors[2] < errors[1] < errors[0] < 1, "the more is kept the nearer"
    assert sizes == [pytest.approx(900, rel=0.02), pytest.approx(90, rel=0.02)]
    weights = [sum(p.numel() for p in e.parameters()) for e in student.ensemble.encoders]
    assert weights == sorted(weights)


def test_a_head_with_a_stem_of_its_own_is_stem_and_encoder(shipped: LearnedSplit) -> None:
    images = torch.rand(2, 3, 64, 64)
    for tier, encoder in enumerate(shipped.ensemble.encoders):
        head = with_stem(shipped.stem, exportable(encoder, 1.0)).eval()
        with torch.no_grad():
            torch.testing.assert_close(head(images), shipped.latent(images, tier), rtol=1e-4, atol=1e-4)


def test_weights_of_other_encoders_are_refused(tmp_path: Path) -> None:
    state = load_file(FOLDER / WEIGHTS_FILE)
    save_file({k: v for k, v in state.items() if ".encoders.1." not in k}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(BundleError, match="missing"):
        load_student(tmp_path)


def test_every_trainable_parameter_has_one_role(shipped: LearnedSplit) -> None:
    groups = parameter_groups(shipped)
    assert set(groups) == {"shared", "new", "bridge", "quantiser", "own", "tail0", "tail1", "tail2"}
    ids = [id(p) for params in groups.values() for p in params]
    assert len(ids) == len(set(ids))
    fixed = {id(p) for n, p in shipped.named_parameters() if n.startswith("stem.")}
    own = {id(p) for p in narrow(shipped.ensemble.encoders[-1], OwnEncoder).body.parameters()}
    assert {id(p) for p in groups["own"]} == own, "the cheaper encoders are of the same build, but new"
    assert {id(p) for p in shipped.parameters()} == fixed | set(ids)


def test_photos_are_held_out_evenly_of_one_folder() -> None:
    photos = [Path(f"/d/{part}/{k}/{i}.jpg") for part in ("a", "b") for k in "xyz" for i in range(9)]
    train, dev = hold_out_evenly(photos, 6, 0, Path("/d/a"))
    assert [p.parent.name for p in dev] == list("xxyyzz")
    assert all(Path("/d/a") in p.parents for p in dev)
    assert sorted(train + dev) == sorted(photos)
    assert hold_out_evenly(list(reversed(photos)), 6, 0, Path("/d/a")) == (train, dev)
    assert hold_out_evenly(photos, 6, 1, Path("/d/a"))[1] != dev
    assert len(hold_out_evenly(photos, 6, 0, Path("/nowhere"))[1]) == 6


def test_a_single_point_keeps_one_gain_tier_and_shows_one_encoder_tier(shipped: LearnedSplit, tmp_path: Path) -> None:
    config = recipe("efficientnet-lite0-joint")
    images = torch.rand(2, 3, 64, 64)
    single = single_from(config, "s:4", images, tmp_path)
    start = load_student(Path(single.start))
    assert torch.equal(start.quantiser.log_gain[0], shipped.quantiser.log_gain[4])
    assert len(single.target_bytes) == 1
    assert single.target_bytes[0] == pytest.approx(estimated_bytes(shipped, images, 0, 4))
    assert estimated_bytes(start, images, 0, 0) == pytest.approx(single.target_bytes[0])
    assert [stage.tiers for stage in single.stages] == [(1.0, 0.0, 0.0, 0.0)]
    assert (single.truncate, single.rungs, single.steps) == (0.0, (0.0,), config.steps)


def test_impossible_single_points_are_refused(tmp_path: Path) -> None:
    config = recipe("efficientnet-lite0-joint")
    assert parse_point("own:3") == (3, 3)
    for bad in ("huge:3", "s", "s:x"):
        with pytest.raises(ConfigError, match="TIER:GAIN"):
            parse_point(bad)
    with pytest.raises(ConfigError, match="no tier 9"):
        single_from(config, "s:9", torch.zeros(1, 3, 64, 64), tmp_path)
    with pytest.raises(ConfigError, match="--start"):
        single_point(replace(config, start=""), 0, 0, 100.0, tmp_path)


def test_recipes_that_go_on_name_weights_that_are_there() -> None:
    going_on = [r for r in map(recipe, RECIPES) if r.start]
    assert len(going_on) == 1
    assert all((Path(r.start) / WEIGHTS_FILE).exists() for r in going_on)


def curve(sizes: list[float], right: list[list[int]]) -> Curve:
    marks = np.array(right, np.float64)
    counts = resample(marks.shape[1], 200)
    return Curve(
        name="c", labels=tuple(map(str, sizes)), sizes=np.repeat(np.array(sizes)[:, None], marks.shape[1], 1), counts=counts,
        accuracy=marks.mean(1), drawn=marks @ counts.T / counts.sum(1),
    )  # fmt: skip


def test_the_penalty_is_read_at_equal_bytes() -> None:
    rng = np.random.default_rng(0)
    low, high = (rng.random(400) < 0.4).astype(int), (rng.random(400) < 0.8).astype(int)
    slim = curve([100.0, 400.0], [low.tolist(), high.tolist()])
    assert read_at(slim.points(), 200.0) == pytest.approx((low.mean() + high.mean()) / 2)
    assert read_at(slim.points(), 10.0) == pytest.approx(low.mean())
    same = penalty(slim, curve([400.0], [high.tolist()]))
    assert same["penalty"] == pytest.approx(0)
    assert np.allclose(same["interval"], 0), "paired: the same photos are right"
    better = penalty(slim, curve([200.0], [high.tolist()]))
    assert better["penalty"] == pytest.approx((high.mean() - low.mean()) / 2)
    assert better["interval"][0] > 0  # type: ignore[index]
