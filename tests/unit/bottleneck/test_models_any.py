"""Bottlenecks at any cut: what crosses becomes one map and comes back; what the outputs feel; where detectors are matched."""

from __future__ import annotations

import math

import pytest
import torch

from protos.errors import ConfigError
from splitters.bottleneck.bottleneck import GainQuantiser
from splitters.bottleneck.crossing import Gather, Scatter, describe, latent_grid
from splitters.bottleneck.learned import run_stages
from splitters.bottleneck.learned_any import AnyCutConfig, build_any
from splitters.bottleneck.raw_outputs import RawOutput, Scores
from splitters.bottleneck.token_grids import token_grids
from splitters.cutting.graph.split import Cutter
from splitters.training.losses import detection_mismatch
from tests.fakes import any_models


@pytest.mark.parametrize(
    ("shapes", "shrink", "grid"),
    [
        ([(6, 8, 8)], 1, (8, 8)),
        ([(6, 8, 8)], 2, (4, 4)),
        ([(4, 16, 16), (6, 8, 8), (5, 4, 4)], 1, (4, 4)),
        ([(4, 13, 13), (3, 7, 7)], 1, (7, 7)),
        ([(3, 13, 17)], 2, (7, 9)),
        ([(8, 8, 6)], 1, (8, 8)),
        ([(65, 12)], 1, (8, 8)),
        ([(4, 6, 10), (60, 5)], 1, (6, 10)),
        ([(16, 8, 8), (32,)], 2, (4, 4)),
        ([(6, 4, 4), (37, 5)], 1, (4, 4)),
        ([(300, 12), (8, 6, 10)], 2, (3, 5)),
    ],
)
def test_what_crosses_becomes_one_map_and_comes_back(shapes: list[tuple[int, ...]], shrink: int, grid: tuple[int, int]) -> None:
    crossings = describe(shapes, "here")
    assert latent_grid(crossings, shrink) == grid
    gather = Gather(crossings, grid)
    tensors = [10.0**i * torch.randn(3, *shape) for i, shape in enumerate(shapes)]
    gather.measure(tensors)
    fused = gather(*tensors)
    assert fused.shape == (3, gather.channels, *grid)
    back = Scatter(gather)(fused)
    for given, got in zip(tensors, back, strict=True):
        assert torch.allclose(given, got, rtol=1e-4, atol=1e-5 * float(given.abs().max()))


def test_no_tensor_drowns_in_another() -> None:
    crossings = describe([(4, 8, 8), (4, 8, 8)], "here")
    gather = Gather(crossings, (8, 8))
    tensors = [torch.randn(2, 4, 8, 8), 1000 * torch.randn(2, 4, 8, 8)]
    gather.measure(tensors)
    fused = gather(*tensors)
    assert 0.5 < float(fused[:, :4].std() / fused[:, 4:].std()) < 2


@pytest.mark.parametrize("shapes", [[(7, 12)], [(2, 3, 4, 5)], [(64,)]])
def test_what_lies_on_no_grid_is_refused_with_a_way_out(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match=r"at|crosses|earlier") as told:
        describe(shapes, "blocks.1")
    assert "blocks.1" in str(told.value)
    assert "choose" in str(told.value)


def test_tokens_lie_where_the_graph_puts_them() -> None:
    model, example = any_models.tokens()
    cutter = Cutter(model, example)
    known = token_grids(cutter.trace)
    assert known[1 + 64 + 24] == (1, (8, 8))
    shapes = cutter.split("blocks.0").latent_shapes
    assert shapes == ((89, 24),)
    (crossing,) = describe(shapes, "blocks.0", known)
    assert (crossing.extra, crossing.height, crossing.width, crossing.trailing) == (1, 8, 8, 24)
    gather = Gather((crossing,), (4, 4))
    tensor = torch.randn(3, 89, 24)
    assert gather.channels == 24 * 4 + 24 * 2, "25 tokens beside 16 cells: two to a cell, not 25"
    patch = torch.zeros(1, 89, 24)
    patch[0, 1 + 8 * 2 + 6] = 1  # the third row, the seventh column
    assert torch.nonzero(gather(patch).amax(1)[0]).tolist() == [[1, 3]]
    assert torch.equal(Scatter(gather)(gather(tensor))[0], tensor)


CASES = [
    ("resnet", AnyCutConfig(at="layer2.0.conv1", channels=24), 2),
    ("densenet", AnyCutConfig(at="features.denseblock2.denselayer2", channels=16), 3),
    ("vit", AnyCutConfig(at="blocks.0", channels=16), 1),
    ("detector", AnyCutConfig(at="c4", channels=16, task="detection"), 2),
    ("tokens", AnyCutConfig(at="blocks.0", channels=16, task="detection", scores="softmax"), 1),
    ("queries", AnyCutConfig(at="layers.0", channels=16, task="detection", scores="sigmoid"), 2),
]


@pytest.mark.parametrize(("name", "config", "crossing"), CASES, ids=[c[0] for c in CASES])
def test_a_bottleneck_fits_cuts_crossed_by_several_tensors(name: str, config: AnyCutConfig, crossing: int) -> None:
    model, example = getattr(any_models, name)()
    sample = torch.randn(6, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    base, student = build_any(model, example, config, sample)
    student.eval()
    assert base.cuts == crossing
    with torch.no_grad():
        cut = base.body(base.stem(sample))
        cuts = cut if isinstance(cut, tuple) else (cut,)
        teacher = [*cuts, *run_stages(base.stages, cut)]
        whole = model(sample)
        outputs = whole if isinstance(whole, tuple) else (whole,)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(teacher[-len(outputs) :], outputs, strict=True))
        latent = student.latent(sample, 0)
        answer = student.answer(latent)
    assert latent.shape[:2] == (6, config.channels)
    assert [t.shape for t in answer] == [t.shape for t in teacher]
    assert base.taps >= 2, "matched at places of its own choice"


def test_with_all_channels_the_untrained_bottleneck_is_the_model() -> None:
    model, example = any_models.detector()
    sample = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(2))
    _, student = build_any(model, example, AnyCutConfig(at="c4", channels=24 + 64, task="detection"), sample)
    with torch.no_grad():
        answer = student.eval().answer(student.latent(sample, 0))[-1]
        wanted = model(sample)
    assert float((answer - wanted).abs().max()) < 1e-3 * float(wanted.std())


def test_the_start_keeps_what_the_outputs_feel() -> None:
    """Of two crossing maps the outputs read one; the latent's few channels go to that one, though the other varies as much."""

    class Deaf(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.heard = torch.nn.Conv2d(3, 16, 4, 4), torch.nn.Conv2d(3, 16, 4, 4)
            self.last = torch.nn.Linear(16, 40)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = self.loud(x), self.heard(x)
            return self.last((1e-3 * a + b).mean((2, 3)))

    torch.manual_seed(0)
    sample = torch.randn(8, 3, 32, 32)
    config = AnyCutConfig(at="heard", channels=16, match=("mean",))
    _, student = build_any(Deaf().eval(), sample[:1], config, sample)
    with torch.no_grad():
        loud, heard = student.stem(sample)
        again = student.decoder(student.latent(sample, 0))
    error = [float((x - y).square().mean() / x.var()) for x, y in zip((loud, heard), again, strict=True)]
    assert error[1] < 0.1 * error[0]


def test_gains_are_aimed_at_the_targets() -> None:
    torch.manual_seed(0)
    latent = torch.randn(16, 12, 8, 8) * torch.linspace(3, 0.1, 12)[:, None, None] + 1.0
    quantiser = GainQuantiser(12, (0.4, 0.7, 1.2))
    targets = [4000.0, 1500.0, 500.0]
    quantiser.aim(latent, targets)
    for number, target in enumerate(targets):
        tier = torch.full((16,), number)
        bits = quantiser(latent, tier, torch.ones(16, 12))[1].detach().mean()
        assert math.isclose(float(bits), target, rel_tol=0.05)


RAW = (
    RawOutput(node="boxes", probability=False, channel_axis=1, cells=(4, 4)),
    RawOutput(node="present", probability=True, channel_axis=1, cells=(4, 4)),
    RawOutput(node="classes", probability=True, channel_axis=1, cells=(4, 4)),
)


def test_detectors_are_compared_where_the_teacher_sees_something() -> None:
    torch.manual_seed(0)
    present = torch.full((2, 1, 4, 4), -9.0)
    present[:, :, 1, 1] = 4.0
    teacher = [torch.randn(2, 4, 4, 4), present, torch.randn(2, 3, 4, 4)]
    assert float(detection_mismatch(teacher, teacher, RAW).abs().max()) < 1e-5

    def off(branch: int, row: int) -> float:
        student = [t.clone() for t in teacher]
        student[branch][:, :, row, 1] += 1.0
        return float(detection_mismatch(student, teacher, RAW).mean())

    for branch in (0, 2):
        assert off(branch, 1) > 0.05
        assert off(branch, 2) < 0.01 * off(branch, 1), "an empty cell's boxes and classes have no say"
    worse = [t.clone() for t in teacher]
    worse[1][:, :, 3, 3] = 5.0
    assert float(detection_mismatch(worse, teacher, RAW).mean()) > 1.0, "an object where there is none does"


def test_raw_outputs_are_found_before_sigmoid_and_table() -> None:
    model, example = any_models.detector()
    sample = torch.randn(4, *example.shape[1:])
    base, _ = build_any(model, example, AnyCutConfig(at="c3", channels=8, task="detection"), sample)
    assert [r.probability for r in base.raw] == [False, True, True] * 3
    assert [r.cells for r in base.raw] == [(8, 8)] * 3 + [(4, 4)] * 3 + [(2, 2)] * 3
    with torch.no_grad():
        outputs = run_stages(base.stages, base.body(base.stem(sample)))
    present = outputs[base.taps + 1].sigmoid()
    assert torch.allclose(outputs[-1][:, :64, 4], present.flatten(1), atol=1e-6)


@pytest.mark.parametrize(("name", "at", "scores"), [("tokens", "blocks.0", "softmax"), ("queries", "layers.0", "sigmoid")])
def test_queries_are_compared_by_what_the_teacher_sees_in_them(name: str, at: str, scores: Scores) -> None:
    model, example = getattr(any_models, name)()
    base, _ = build_any(model, example, AnyCutConfig(at=at, channels=8, task="detection", scores=scores), torch.randn(4, 3, 64, 64))
    logits, boxes = base.raw
    assert (logits.probability, logits.softmax) == (scores == "sigmoid", scores == "softmax")
    assert not boxes.probability, "a squashed box is no probability"
    torch.manual_seed(0)
    queries, classes = logits.cells[0], 4 if logits.softmax else 3
    told = torch.full((2, queries, classes), -9.0)
    if logits.softmax:
        told[..., -1] = 0.0  # nothing, but for the first query
        told[:, 0, -1] = -18.0
    told[:, 0, 1] = 4.0
    teacher = [told, torch.randn(2, queries, 4)]
    assert float(detection_mismatch(teacher, teacher, base.raw).abs().max()) < 1e-5

    def off(branch: int, query: int) -> float:
        student = [t.clone() for t in teacher]
        student[branch][:, query, 0] += 8.0
        return float(detection_mismatch(student, teacher, base.raw).mean())

    assert off(1, 0) > 0.05
    assert off(1, 3) < 0.01 * off(1, 0), "boxes of a query that found nothing have no say"
    assert off(0, 3) > 1e-3, "an object where there is none does"
