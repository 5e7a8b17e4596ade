"""The training loop on a tiny model: it learns, it is deterministic, it resumes exactly; photos, shares, steering, recipes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from protos.errors import ConfigError, SourceError
from splitters.bottleneck.bottleneck import Decoder, GainQuantiser
from splitters.bottleneck.ensemble import EncoderEnsemble, OwnEncoder, SmallEncoder, SmallEncoderConfig, Tier
from splitters.bottleneck.learned import LearnedSplit, StagedModel, run_stages
from splitters.bottleneck.learned_any import AnyCutConfig, build_any
from splitters.cli import main
from splitters.training.config import LossWeights, Stage, TrainConfig
from splitters.training.loop import StepReport, Trainer, shares
from splitters.training.losses import BitrateSteering, arrived, distortion, divergence, relative_error
from splitters.training.pictures.photos import Crops, PhotoCache, hold_out, list_photos
from splitters.training.recipes import RECIPES, any_cut, recipe

CONFIG = TrainConfig(
    model="tiny", size_px=32, batch=6, target_bytes=(60.0, 20.0), prefixes=(2,), groups=(0, 2),
    lost_layers=0.2, ema=0.9, hold_out=2,
    loss=LossWeights(stages=(1.0,)), stages=(Stage(steps=6, lr=3e-3, tiers=(0.5, 0.5), lr_tail=1e-3, lr_own=1e-3, warmup_steps=2),),
)  # fmt: skip


def net() -> tuple[StagedModel, LearnedSplit]:
    torch.manual_seed(3)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
    body = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
    stages = (
        nn.Sequential(nn.Conv2d(12, 12, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7)),
    )
    base = StagedModel(stem=stem, body=body, stages=stages)
    import copy

    small = SmallEncoder(SmallEncoderConfig(channels=(8,), strides=(2,), kernels=(3,), depth=0), 8, 4)
    ensemble = EncoderEnsemble(
        [small, OwnEncoder(copy.deepcopy(body), 12, 4)], (Tier(name="s", runs=((0, 1.0),)), Tier(name="own", runs=((1, 1.0),)))
    )
    student = LearnedSplit(copy.deepcopy(stem), ensemble, GainQuantiser(4, (0.1, 0.4)), Decoder(4, 12, 8, 1), copy.deepcopy(stages))
    return base, student


@pytest.fixture
def photos(tmp_path: Path) -> PhotoCache:
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return PhotoCache(list_photos([folder]), tmp_path / "cache", short_px=36)


@pytest.fixture
def make(photos: PhotoCache, tmp_path: Path) -> Callable[..., Trainer]:
    def build(name: str, config: TrainConfig = CONFIG) -> Trainer:
        base, student = net()
        ticks = itertools.count()
        return Trainer(
            config, base, student, photos, out=tmp_path / name, device=torch.device("cpu"), clock_s=lambda: float(next(ticks))
        )

    return build


def test_training_lowers_the_distortion_and_leaves_the_teacher(make: Callable[..., Trainer]) -> None:
    trainer = make("a", replace(CONFIG, stages=(replace(CONFIG.stages[0], steps=60, lr=5e-3),)))
    before = [p.clone() for p in trainer.base.modules().parameters()]
    stem = [p.clone() for p in trainer.student.stem.parameters()]
    told: list[StepReport] = []
    trainer.run(told.append)
    assert [r.step for r in told] == list(range(1, 61))
    assert np.mean([r.distortion for r in told[-10:]]) < 0.8 * np.mean([r.distortion for r in told[:10]])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.base.modules().parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(stem, trainer.student.stem.parameters(), strict=True))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(make: Callable[..., Trainer]) -> None:
    runs = [make("a"), make("b"), make("c", replace(CONFIG, seed=1))]
    for trainer in runs:
        trainer.run()
    first, second, other = (torch.cat([v.flatten().float() for v in t.ema.values()]) for t in runs)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_stopped_run_goes_on_exactly_where_it_was(make: Callable[..., Trainer]) -> None:
    whole = make("whole")
    whole.run()
    part = make("part")
    part.run(stop=lambda: part.step >= 3)
    assert part.step == 3
    resumed = make("part")
    assert resumed.step == 3
    resumed.run()
    assert resumed.step == 6
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name
    assert torch.equal(whole.steering.log_lambda, resumed.steering.log_lambda)


def test_a_training_ends_by_time_and_its_learning_rate_follows(make: Callable[..., Trainer]) -> None:
    config = replace(CONFIG, stages=(replace(CONFIG.stages[0], steps=1000, warmup_steps=1),), seconds=8.0)
    trainer = make("a", config)  # the clock says a second more whenever it is asked, once a step
    told: list[StepReport] = []
    rates: list[float] = []

    def on_step(report: StepReport) -> None:
        told.append(report)
        rates.append(trainer.optimiser.param_groups[0]["lr"])

    trainer.run(on_step, stop=lambda: trainer.step == 3)
    assert (trainer.step, trainer.spent_s) == (3, 3.0)
    trainer = make("a", config)
    assert trainer.spent_s == 3.0, "the checkpoint keeps it"
    trainer.run(on_step)
    assert (trainer.step, trainer.progress) == (8, 1.0)
    assert [r.progress for r in told] == [n / 8 for n in range(1, 9)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1 * rates[0]
    longer = make("a", replace(config, seconds=16.0))
    assert longer.progress == 0.5, "a run may be given more time"


def test_the_largest_encoder_learns_from_its_own_samples(make: Callable[..., Trainer]) -> None:
    stage = Stage(steps=1, lr=1e-2, lr_own=1e-2, tiers=(0.5, 0.5), warmup_steps=1)
    trainer = make("a", replace(CONFIG, stages=(stage,)))
    trainer._prepare(stage, 0)
    images = trainer.photos.batch(range(6), trainer.crops, np.random.default_rng(0))
    latent, mismatch, tiers = trainer._latents(images, stage, np.random.default_rng(0))
    assert tiers.tolist() == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        assert torch.allclose(latent[:3], trainer.student.latent(images[:3], 0), atol=1e-5)
        assert torch.allclose(latent[3:], trainer.student.latent(images[3:], 1), atol=1e-5)
    own = trainer.groups["own"][0]
    cheap = torch.autograd.grad(latent[:3].sum() + mismatch, own, allow_unused=True, retain_graph=True)[0]
    assert cheap is None or float(cheap.abs().max()) == 0, "to the cheap ones it is an example"
    assert float(torch.autograd.grad(latent[3:].sum(), own)[0].abs().max()) > 0
    assert float(mismatch.detach()) > 0


def test_every_operating_point_counts_alike_and_a_checkpoint_keeps_what_is_usual(make: Callable[..., Trainer]) -> None:
    trainer = make("a", replace(CONFIG, even=True))
    wrong, tiers, gain = torch.tensor([8.0, 8.0, 0.5, 0.5]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
    counted = wrong * trainer._share(wrong, tiers, gain)
    assert torch.allclose(counted, torch.full((4,), 4.25)), "each as much as the mean of the points"
    harder = torch.tensor([8.0, 8.0, 1.0, 1.0])
    assert float((harder * trainer._share(harder, tiers, gain))[2]) > 8, "what is unusual there counts more"
    trainer.run(stop=lambda: trainer.step == 1)
    usual = trainer.usual.clone()
    assert torch.equal(make("a", replace(CONFIG, even=True)).usual, usual)


def test_a_checkpoint_of_another_model_is_refused(make: Callable[..., Trainer], tmp_path: Path) -> None:
    make("a").run()
    trainer = make("b")
    trainer.student.decoder = Decoder(4, 12, 16, 1)
    trainer.out = tmp_path / "a"
    from splitters.training.checkpoint import load_checkpoint

    with pytest.raises(ConfigError, match="another recipe"):
        load_checkpoint(trainer)


def test_frozen_parts_stay_as_they_were(make: Callable[..., Trainer]) -> None:
    trainer = make("a", replace(CONFIG, stages=(replace(CONFIG.stages[0], lr_own=0.0, lr_tail=0.0),)))
    own, tail = (torch.cat([p.detach().flatten() for p in trainer.groups[g]]) for g in ("own", "tail0"))
    decoder = torch.cat([p.detach().flatten() for p in trainer.student.decoder.parameters()])
    trainer.run()
    assert torch.equal(own, torch.cat([p.detach().flatten() for p in trainer.groups["own"]]))
    assert torch.equal(tail, torch.cat([p.detach().flatten() for p in trainer.groups["tail0"]]))
    assert not torch.equal(decoder, torch.cat([p.detach().flatten() for p in trainer.student.decoder.parameters()]))


def test_half_precision_runs_the_student_and_leaves_quantiser_and_losses_alone(make: Callable[..., Trainer]) -> None:
    seen: dict[str, set[torch.dtype]] = {"decoder": set(), "tail": set(), "quantiser": set()}

    def watched(amp: bool) -> list[StepReport]:
        trainer = make(f"amp {amp}", replace(CONFIG, amp=amp))
        trainer.student.decoder.linear.register_forward_hook(lambda _m, _x, y: seen["decoder"].add(y.dtype))
        trainer.student.stages[1][2].register_forward_hook(lambda _m, _x, y: seen["tail"].add(y.dtype))
        trainer.student.quantiser.register_forward_hook(
            lambda _m, x, y: seen["quantiser"].update({x[0].dtype, y[0].dtype, y[1].dtype})
        )
        told: list[StepReport] = []
        trainer.run(told.append)
        assert all(p.dtype == torch.float32 for p in trainer.student.parameters())
        return told

    half = watched(True)
    assert seen == {"decoder": {torch.bfloat16}, "tail": {torch.bfloat16}, "quantiser": {torch.float32}}
    whole = watched(False)
    assert all(abs(a.loss - b.loss) < 0.05 * b.loss for a, b in zip(half, whole, strict=True)), (
        "the same training, a little coarser"
    )


def test_the_latent_only_stage_teaches_the_cheap_encoder_alone(make: Callable[..., Trainer]) -> None:
    stage = Stage(steps=40, lr=1e-2, tiers=(1.0, 0.0), latent_only=True, warmup_steps=1)
    trainer = make("a", replace(CONFIG, stages=(stage,)))
    decoder = [p.clone() for p in trainer.student.decoder.parameters()]
    told: list[StepReport] = []
    trainer.run(told.append)
    assert told[-1].latent < 0.7 * told[0].latent
    assert all(torch.equal(a, b) for a, b in zip(decoder, trainer.student.decoder.parameters(), strict=True))


def test_gains_follow_the_target() -> None:
    quantiser = GainQuantiser(2, (1.0, 2.0))
    steering = BitrateSteering([1000.0, 100.0], [0.1, 0.1])
    before = quantiser.log_gain.detach().clone()
    steering.observe(torch.tensor([0, 0, 1]), torch.tensor([2000.0, 2000.0, 10.0]), quantiser)
    assert float(quantiser.log_gain[0, 0]) < float(before[0, 0])
    assert float(quantiser.log_gain[1, 0]) > float(before[1, 0])
    weights = steering.weight(torch.tensor([0, 1])) * 1000
    assert weights[0] > 0.1 > weights[1]


def test_losses_are_zero_for_a_perfect_student_and_positive_else() -> None:
    torch.manual_seed(0)
    teacher = [torch.randn(3, 4, 2, 2), torch.randn(3, 5, 2, 2), torch.randn(3, 9)]
    student = [t + 0.5 for t in teacher[:2]] + [teacher[2].flip(1)]
    assert float(distortion(teacher, teacher, LossWeights(), logits=True).abs().max()) < 1e-6
    assert float(distortion(student, teacher, LossWeights(), logits=True).min()) > 0.1
    assert float(divergence(teacher[2] + 3.0, teacher[2]).abs().max()) < 1e-5, "a shift of all logits is no difference"
    assert relative_error(student[0], teacher[0]).shape == (3,)


@pytest.mark.parametrize("n", [1, 7, 32])
def test_shares_use_every_sample(n: int) -> None:
    fractions = (0.25, 0.125, 0.125, 0.5)
    drawn = [shares(fractions, n, np.random.default_rng(i)) for i in range(50)]
    assert all(sum(d) == n for d in drawn)
    assert np.allclose(np.mean(drawn, axis=0), np.array(fractions) * n, atol=0.35)
    assert sum(shares(fractions, n, None)) == n


def test_photos_are_cropped_normalised_and_cached(photos: PhotoCache, tmp_path: Path) -> None:
    crops = Crops(size_px=32, area=0.25, mean=(0.5,) * 3, std=(0.25,) * 3)
    first = photos.batch([0, 1, 2], crops, np.random.default_rng(5))
    again = photos.batch([0, 1, 2], crops, np.random.default_rng(5))
    assert first.shape == (3, 3, 32, 32)
    assert torch.equal(first, again)
    assert float(first.min()) >= -2.01
    assert float(first.max()) <= 2.01
    assert all(min(photos.photo(i).shape[:2]) == 36 for i in range(len(photos)))


def test_the_held_out_photos_are_the_same_each_time(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(30)]
    train, dev = hold_out(files, 10, seed=0)
    assert hold_out(list(reversed(files)), 10, seed=0) == (train, dev)
    assert len(dev) == 10
    assert not set(train) & set(dev)
    assert set(train) | set(dev) == set(files)
    assert hold_out(files, 10, seed=1)[1] != dev


def test_detectors_see_whole_photos_letterboxed(photos: PhotoCache) -> None:
    crops = Crops(size_px=32, area=1.0, mean=(0.0,) * 3, std=(1.0,) * 3, letterbox=True)
    batch = photos.batch([0, 1, 2, 3], crops, np.random.default_rng(5))
    assert batch.shape == (4, 3, 32, 32)
    for image, index in zip(batch, range(4), strict=True):
        h, w = photos.photo(index).shape[:2]
        rows = round(32 * h / w)
        assert torch.allclose(image[:, rows:], torch.tensor(114 / 255)), "grey below the photo"
        assert float(image[:, :rows].std()) > 0.05
    again = photos.batch([0, 1, 2, 3], crops, np.random.default_rng(5))
    assert torch.equal(batch, again)


def test_a_cache_of_whole_photos_cuts_nothing_off(tmp_path: Path) -> None:
    file = tmp_path / "wide.png"
    Image.fromarray(np.zeros((40, 160, 3), np.uint8)).save(file)
    assert PhotoCache([file], tmp_path / "c", longest_px=80).photo(0).shape == (20, 80, 3)


def test_detection_without_a_way_to_read_the_boxes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["train", "any", "--model", "py:tests.fakes.any_models:detector", "--at", "c4", "--task", "detection"]
    assert main([*options, "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "--output yolox" in capsys.readouterr().err


def test_an_empty_folder_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no images"):
        list_photos([tmp_path])
    with pytest.raises(SourceError, match="does not exist"):
        list_photos([tmp_path / "no"])


def test_every_recipe_is_a_valid_configuration() -> None:
    for name in RECIPES:
        config = recipe(name)
        assert config.steps > 0
        assert config.seed == 0
    with pytest.raises(ConfigError, match="nonsense"):
        recipe("nonsense")
    config = any_cut("timm:resnet18", AnyCutConfig(at="layer2", stem_at="act1"), steps=90)
    assert config.steps == 90
    assert config.cut is not None
    assert config.cut.at == "layer2"


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        Stage(steps=1, tiers=(0.5, 0.4))
    with pytest.raises(ConfigError, match="finest"):
        replace(CONFIG, target_bytes=(10.0, 20.0))


class Net(nn.Module):
    """A little residual classifier with named parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.one = nn.Conv2d(8, 16, 3, 2, 1)
        self.two = nn.Conv2d(16, 16, 3, 2, 1)
        self.last = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.two(torch.relu(self.one(self.stem(x)))))
        logits: torch.Tensor = self.last(y.mean((2, 3)))
        return logits


def test_a_bottleneck_fits_any_cut_and_the_teacher_is_the_model() -> None:
    torch.manual_seed(0)
    model, sample = Net().eval(), torch.randn(4, 3, 32, 32)
    config = AnyCutConfig(at="one", stem_at="stem", match=("two",), channels=6, small=(8, 8), width=8)
    base, student = build_any(model, sample, config, sample)
    with torch.no_grad():
        cut, *outputs = (c := base.body(base.stem(sample))), *run_stages(base.stages, c)
        assert torch.allclose(outputs[-1], model(sample), atol=1e-6)
        latents = [student.eval().latent(sample, tier) for tier in range(len(student.ensemble.tiers))]
        answered = student.answer(latents[-1])
    assert len(latents) == 3
    assert {tuple(z.shape) for z in latents} == {(4, 6, 8, 8)}
    assert [t.shape for t in answered] == [cut.shape, *(t.shape for t in outputs)]
    assert len(outputs) == 2, "the matched layer, then the logits"


def test_a_match_before_the_cut_is_refused() -> None:
    sample = torch.randn(2, 3, 32, 32)
    with pytest.raises(ConfigError, match="after 'one'"):
        build_any(Net().eval(), sample, AnyCutConfig(at="one", match=("stem",)), sample)


def test_slices_are_lost_as_the_codec_cuts_them_and_never_all() -> None:
    mask = arrived(torch.zeros(400, 3, 14, 14), 0.4, np.random.default_rng(0))
    assert mask.shape == (400, 1, 14, 14)
    corners = mask[:, 0, [0, 0, 8, 8], [0, 8, 0, 8]]
    for row, column, corner in ((slice(0, 8), slice(0, 8), 0), (slice(8, 14), slice(8, 14), 3)):
        assert bool((mask[:, 0, row, column] == corners[:, corner, None, None]).all())
    assert float(corners.sum(1).min()) >= 1
    assert float(corners.mean()) == pytest.approx(0.7, abs=0.05)  # three of four may be lost
    assert bool((arrived(torch.zeros(3, 2, 4, 4), 0.9, np.random.default_rng(0)) == 1).all())


def test_a_share_of_lost_slices_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="lost_slices"):
        replace(CONFIG, lost_slices=1.0)
