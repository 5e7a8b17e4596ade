"""The splitter: what crosses, what is refused, and what it says then."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import splitters
from protos.errors import CutError, ModelError
from splitters import api
from splitters.cutting.graph.split import Cutter, split
from splitters.cutting.sources import load_source

IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """A residual block, a pyramid of two outputs, nested in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.one = conv(4, 4)
        self.two = conv(4, 4)
        self.down = conv(4, 6, 2)
        self.up = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        x = self.stem(x)
        x = x + self.two(self.one(x))
        low = self.down(x)
        fine = x + nn.functional.interpolate(self.up(low), size=x.shape[-2:])
        return {"maps": [fine, low], "mean": fine.mean((2, 3))}


class Tokens(nn.Module):
    """Constants that grow with the batch, and windows folded into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.start = nn.Parameter(torch.rand(1, 1, 8))
        self.first = nn.Linear(8, 8)
        self.window = nn.Linear(8, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = self.first(tokens) + torch.arange(16.0)[None, :, None] / 16
        folded = self.window(tokens.reshape(batch * 4, 4, 8)).reshape(batch, 16, 8)
        full = torch.cat([self.start.expand(batch, -1, -1), folded], dim=1)
        return self.last(full.mean(1))


class InPlace(nn.Module):
    """A view of a tensor that is changed in place afterwards: the simple way to make it functional is not allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        half = y[:, :2]
        y.add_(1.0)
        return self.b(half) + y


class Branching(nn.Module):
    """Decides on values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.stem(x))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


def test_splitters_offers_split_and_profile_lazily() -> None:
    assert splitters.split is api.split
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = splitters.nothing


def test_every_cut_of_a_residual_pyramid_verifies_with_all_its_tensors() -> None:
    cutter = Cutter(Residual(), IMAGE)
    cuts = cutter.candidates()
    crossing = {c.name: len(c.crossing) for c in cuts}
    assert crossing["stem"] == 1
    assert crossing["one"] == 2  # the branch and the residual
    assert crossing["down"] == 2  # the coarse map and the fine one it will be added to
    assert crossing["up"] == 3  # and here the coarse map is an output as well
    for cut in cuts:
        found = cutter.split(cut).verify(IMAGE)
        assert found.relative_difference <= 1e-6
        assert found.batches == (1, 3)
        assert not found.warnings
        assert len(found.sensitivity) == len(cut.crossing)


def test_the_output_keeps_its_nesting_and_the_batch_is_free() -> None:
    model = Residual().eval()
    halves = split(model, "one", IMAGE)
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        wanted, got = model(images), halves.tail(*halves.head(images))
    assert set(got) == {"maps", "mean"}
    assert [tuple(t.shape) for t in got["maps"]] == [(5, 4, 16, 16), (5, 6, 8, 8)]
    torch.testing.assert_close(got["mean"], wanted["mean"])


def test_what_needs_no_image_does_not_cross() -> None:
    cutter = Cutter(Tokens(), IMAGE)
    for at in ("patch", "first", "last"):
        if at == "last":
            with pytest.raises(CutError, match="end of the model"):
                cutter.split(at)
            continue
        halves = cutter.split(at)
        assert len(halves.latent_names) == 1  # neither the start token nor the positions travel
        halves.verify(IMAGE)


def test_a_tensor_without_the_batch_first_is_no_cut_and_the_neighbours_are_named() -> None:
    with pytest.raises(CutError, match=r"first axis is not the batch.*nearest cuts are first"):
        split(Tokens(), "window", IMAGE)


def test_views_of_what_is_changed_in_place_stay_right() -> None:
    torch.manual_seed(0)
    cutter = Cutter(InPlace(), IMAGE)
    assert cutter.candidates()
    for cut in cutter.candidates():
        cutter.split(cut).verify(IMAGE)


@pytest.mark.parametrize("method", ["export", "fx"])
def test_both_tracers_give_the_same_cuts(method: str) -> None:
    halves = split(Residual(), "one", IMAGE, method=method)  # type: ignore[arg-type]
    assert halves.method == method
    assert len(halves.latent_names) == 2
    halves.verify(IMAGE)


def test_training_mode_is_left_as_it_was() -> None:
    model = Residual().train()
    model.one.eval()
    split(model, "stem", IMAGE).verify(IMAGE)
    assert model.training
    assert model.two.training
    assert not model.one.training


def test_an_exported_program_is_cut_as_dynamically_as_it_was_exported() -> None:
    batch = torch.export.Dim("batch")
    model = Residual().eval()
    free = torch.export.export(model, (IMAGE.repeat(2, 1, 1, 1),), dynamic_shapes=({0: batch},))
    assert split(free, "two", IMAGE).dynamic_batch
    split(free, "two", IMAGE).verify(IMAGE)
    fixed = split(torch.export.export(model, (IMAGE,)), "two", IMAGE)
    assert not fixed.dynamic_batch
    assert "fixed batch of 1" in fixed.notes[0]
    fixed.verify(IMAGE)


class Faint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x).relu() + 1e-6 * x


def test_a_dropped_branch_is_refused_however_little_it_matters() -> None:
    halves = split(Faint(), "b", IMAGE)
    graph = halves.tail.graph
    addition = next(n for n in graph.nodes if "add" in n.name)
    addition.replace_all_uses_with(addition.all_input_nodes[0])
    graph.erase_node(addition)
    wrong = dataclasses.replace(halves, tail=fx.GraphModule(halves.tail, graph))
    with pytest.raises(CutError, match="equality proves nothing about it"):
        wrong.verify(IMAGE)


def test_a_tensor_that_hardly_matters_is_a_warning_where_the_halves_are_exactly_the_model() -> None:
    halves = split(Faint(), "b", IMAGE)
    found = halves.verify(IMAGE)
    assert found.max_difference == 0.0
    (warning,) = found.warnings
    assert repr(halves.latent_names[0]) in warning
    assert "exactly equal" in warning


def test_a_tensor_matters_that_one_percent_would_not_show() -> None:
    class Saturated(nn.Module):
        """Its map is squashed: 1 % of it moves nothing, another picture's much."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).sign().mean((2, 3))

    assert min(split(Saturated(), "a", IMAGE).verify(IMAGE).sensitivity) > 0.1


class Stateful(nn.Module):
    """``kind``: how it fails to be a function of one picture."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=kind != "batch statistics")
        self.b = nn.Conv2d(4, 5, 3)
        self.register_buffer("seen", torch.zeros(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        if self.kind == "running mean":
            self.seen.mul_(0.5).add_(y.mean((0, 2, 3), keepdim=True) * 0.5)
            y = y - self.seen
        if self.kind == "dropout":
            y = nn.functional.dropout(y, 0.2, training=True)
        if self.kind == "weak mixing":
            y = y - 0.01 * y.mean(0, keepdim=True)
        return self.b(y).flip(0) if self.kind == "other order" else self.b(y)


@pytest.mark.parametrize("kind", ["batch statistics", "weak mixing", "other order"])
def test_a_model_that_mixes_the_pictures_of_a_batch_is_refused(kind: str) -> None:
    with pytest.raises(CutError, match=r"mixes the pictures of a batch: picture 1 of 3"):
        split(Stateful(kind).eval(), "norm", IMAGE).verify(IMAGE)


@pytest.mark.parametrize("kind", ["running mean", "dropout"])
def test_a_model_that_remembers_or_draws_numbers_is_refused(kind: str) -> None:
    with pytest.raises(CutError, match=r"the model remembers, or draws random numbers"):
        split(Stateful(kind).eval(), "a", IMAGE).verify(IMAGE)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_changes_its_input_in_place_is_cut_right_and_the_input_is_kept(whole: bool) -> None:
    class Normalises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, 2, 1)
            self.b = nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            if whole:
                x.sub_(0.5).div_(0.25)
            else:
                x[:, 0] *= 2
            return self.b(self.a(x).relu())

    given = IMAGE.clone()
    halves = split(Normalises(), "a", given)
    assert len(halves.latent_names) == 1  # what was written back into the input does not cross
    found = halves.verify(given)
    assert found.relative_difference <= 1e-6
    assert torch.equal(given, IMAGE)


def test_a_whole_number_that_crosses_is_replaced_without_an_error() -> None:
    class Index(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, 2, 1)
            self.where = Where()
            self.table = nn.Embedding(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(self.where(self.a(x))).mean((1, 2))

    halves = split(Index(), "where", IMAGE)
    assert min(halves.verify(IMAGE).sensitivity) > 1e-3


class Where(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


def test_a_wrong_tail_is_refused() -> None:
    halves = split(Residual(), "one", IMAGE)
    halves.verify(IMAGE)
    graph = halves.tail.graph
    addition = next(n for n in graph.nodes if "add" in n.name)
    addition.replace_input_with(addition.all_input_nodes[0], addition.all_input_nodes[1])  # the residual is lost
    wrong = dataclasses.replace(halves, tail=fx.GraphModule(halves.tail, graph))
    with pytest.raises(CutError, match="head and tail differ from the model"):
        wrong.verify(IMAGE)


def test_a_tensor_matters_of_which_the_output_sees_only_the_mean() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            return x.flatten(1).mean(1, keepdim=True) * torch.linspace(1, 2, 5)

    assert min(split(Mean(), "a", IMAGE).verify(IMAGE).sensitivity) > 1e-3


def test_control_flow_on_values_names_the_module_and_the_way_out(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CutError, match=r"module 'gate' \(Gate.*torch.where or torch.cond") as error:
        split(Branching(), "stem", IMAGE)
    assert "torch.export failed" in error.value.message
    assert "torch.fx failed" in error.value.message
    assert capfd.readouterr() == ("", ""), "one sentence stands for the pages that tracers print"


@functools.lru_cache
def _kept(batch: int) -> Tensor:
    return torch.full((batch, 1, 1, 1), 0.5)


class Caching(nn.Module):
    """What is computed once for each size is kept, as RT-DETR keeps its anchors: a symbolic size cannot be a key."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 1:
            raise ValueError("an empty batch")
        return self.body(self.stem(x) * _kept(x.shape[0])).mean((2, 3))


def test_strict_export_frees_a_batch_that_the_other_tracers_do_not() -> None:
    cutter = Cutter(Caching(), IMAGE)
    assert cutter.trace.dynamic_batch
    assert [n.split(" failed")[0] for n in cutter.trace.notes] == ["torch.export", "torch.fx"]
    cutter.split("stem").verify(IMAGE)


class Beyond(nn.Module):
    """Inputs beyond those that have a name land in ``*others``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = self.stem(x)
        for other in others:
            x = x + other[:, :, None, None]
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_inputs_beyond_the_named_ones_land_in_args(count: int) -> None:
    given = (IMAGE, *(torch.randn(IMAGE.shape[0], 4) for _ in range(count)))
    cutter = Cutter(Beyond(), given)
    assert (cutter.trace.method, cutter.trace.dynamic_batch) == ("export", True)
    cutter.split("stem").verify(given)


def test_an_unknown_name_suggests_those_nearby() -> None:
    with pytest.raises(CutError, match=r"'sten' is no cut of this model; did you mean stem"):
        split(Residual(), "sten", IMAGE)
    with pytest.raises(CutError, match="it has stem"):
        split(Residual(), "completely_else", IMAGE)


def test_a_wrong_example_shape_names_the_module_that_failed() -> None:
    with pytest.raises(CutError, match=r"module 'stem.0' \(Conv2d, input \(1, 4, 16, 16\)\).*give an example of the shape"):
        split(Residual(), "stem", torch.rand(1, 4, 16, 16))
    with pytest.raises(CutError, match="one tensor or a tuple of tensors, got str"):
        split(Residual(), "stem", "image")
    with pytest.raises(CutError, match="batch axis first"):
        split(Residual(), "stem", torch.tensor(1.0))


def test_a_model_on_another_device_names_the_module() -> None:
    model = Residual()
    model.two.to("meta")
    with pytest.raises(CutError, match=r"module 'two.0' has its 'weight' on meta.*model.to\('cpu'\)"):
        split(model, "stem", IMAGE)


def test_an_exported_program_with_another_example_says_what_it_was_exported_for() -> None:
    program = torch.export.export(Residual().eval(), (IMAGE,))
    with pytest.raises(CutError, match=r"exported for \(1, 3, 16, 16\)"):
        split(program, "stem", torch.rand(1, 5, 16, 16))


def test_ordered_outputs_of_a_backbone_keep_their_names() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3, 4), conv(4, 4, 2)

        def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
            x = self.a(x)
            return OrderedDict([("0", x), ("pool", self.b(x))])

    halves = split(Backbone(), "a", IMAGE)
    halves.verify(IMAGE)
    assert list(halves.tail(*halves.head(IMAGE))) == ["0", "pool"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('as if')", "importing broken raised ValueError: as if"),
        ("import sys; sys.exit('away')", "importing broken raised SystemExit: away"),
        ("def build():\n    raise KeyError('as if')", r"build\(\) of broken raised KeyError"),
        ("def build():\n    raise SystemExit(3)", r"build\(\) of broken raised SystemExit"),
    ],
)
def test_a_module_that_raises_is_a_models_error(body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(ModelError, match=said):
        load_source("py:broken:build")
