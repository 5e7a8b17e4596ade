"""The shipped bottleneck: weights load, graphs are the same function, gains interpolate, payloads carry the symbols."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from protos.errors import BundleError, ConfigError
from splitters.bottleneck.ensemble import OwnEncoder
from splitters.bottleneck.learned import LearnedSplit
from splitters.bottleneck.narrow import narrow
from splitters.bundle.operating_point import load_points
from splitters.codec import LearnedCodec, learned_spec
from splitters.exporting.learned import TABLES_FILE, Rung, exportable, gains_at, operating_points, prices_at, tuned_state
from splitters.zoo.efficientnet_lite0 import WEIGHTS
from splitters.zoo.efficientnet_lite0.export import LearnedTail, load_student
from splitters.zoo.efficientnet_lite0.network import MBConv, load_efficientnet_lite0
from splitters.zoo.efficientnet_lite0.pruning import Pick, eliminate, prune_blocks
from splitters.zoo.efficientnet_lite0.split import C_LATENT, fuse_norms, staged
from tests.fakes.symbols import same

FOLDER = WEIGHTS


@pytest.fixture(scope="module")
def student() -> LearnedSplit:
    return load_student(FOLDER)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    return torch.stack([torch.stack([torch.sin(9 * x), y, x * y]), torch.stack([y, torch.cos(7 * y * x), x])])


def test_every_tier_gives_the_same_latent_shape(student: LearnedSplit, images: torch.Tensor) -> None:
    with torch.no_grad():
        shapes = {tuple(student.latent(images, tier).shape) for tier in range(len(student.ensemble.tiers))}
    assert shapes == {(2, C_LATENT, 14, 14)}


def test_exported_encoders_are_the_trained_ones(student: LearnedSplit, images: torch.Tensor) -> None:
    with torch.no_grad():
        stem_map = student.stem(images)
        for index, width in {run for tier in student.ensemble.tiers for run in tier.runs}:
            wanted = student.ensemble.run(index, width, stem_map)
            plain = exportable(student.ensemble.encoders[index], width)
            assert torch.allclose(plain(stem_map), wanted, atol=1e-3 * float(wanted.abs().max())), (index, width)
    own = student.ensemble.encoders[-1]
    assert isinstance(own, OwnEncoder)
    assert isinstance(exportable(own, 1.0).project, nn.Identity), "two linear layers became one"


def test_the_servers_part_answers_as_the_student(student: LearnedSplit, images: torch.Tensor) -> None:
    network = load_efficientnet_lite0()
    tail = LearnedTail(student).eval()
    with torch.no_grad():
        latent = student.latent(images, len(student.ensemble.tiers) - 1)
        logits = tail(latent)
        assert torch.allclose(student.answer(latent)[-1], logits, atol=1e-5)
        top, near = network(images).argmax(1), logits.topk(5).indices
    assert any(int(t) in n.tolist() for t, n in zip(top, near, strict=True)), "unquantised, it still sees what the model sees"


def test_weights_survive_saving_and_bad_ones_are_refused(student: LearnedSplit, tmp_path: Path) -> None:
    state = tuned_state(student, published=staged(load_efficientnet_lite0()).stages)
    save_file(state, tmp_path / "learned.safetensors")
    again = load_student(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in student.state_dict().items() if k in state)
    del state["decoder.linear.weight"]
    save_file(state, tmp_path / "learned.safetensors")
    with pytest.raises(BundleError, match="decoder"):
        load_student(tmp_path)
    with pytest.raises(BundleError, match="no usable weights"):
        load_student(tmp_path / "nowhere")


def test_a_tail_that_was_left_alone_is_not_shipped(student: LearnedSplit) -> None:
    published = staged(load_efficientnet_lite0()).stages
    assert not any(k.startswith("stages.") for k in tuned_state(student, published=published))
    other = copy.deepcopy(student)
    with torch.no_grad():
        next(other.stages[1].parameters()).mul_(1.01)
    shipped = {k.split(".")[1] for k in tuned_state(other, published=published) if k.startswith("stages.")}
    assert shipped == {"1"}


def test_gains_between_two_tiers_are_their_geometric_mean(student: LearnedSplit) -> None:
    gains, ungains = gains_at(student, [0.0, 0.5, 1.0])
    assert torch.allclose(gains[1], (gains[0] * gains[2]).sqrt(), rtol=1e-5)
    assert torch.allclose(gains[0], student.quantiser.log_gain[0].exp())
    assert torch.allclose(ungains[2], student.quantiser.log_ungain[1].exp())


def test_payloads_carry_exactly_the_symbols_and_coarser_is_smaller(student: LearnedSplit, images: torch.Tensor) -> None:
    import json

    recipe = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))
    levels = [r["gain"] for r in recipe["rungs"]]
    gains, ungains = gains_at(student, levels)
    points = {f"r{i}": (i, C_LATENT) for i in range(len(levels))}
    spec = learned_spec(shape=(C_LATENT, 14, 14), gains=gains.numpy(), ungains=ungains.numpy(), points=points, tables_path="t")
    codec = LearnedCodec(spec, (FOLDER / TABLES_FILE).read_bytes())
    sizes = []
    for tier in range(len(student.ensemble.tiers)):
        latent = student.latent(images[:1], tier).detach()[0].numpy()
        for name in ("r0", f"r{len(levels) - 1}"):
            symbols = codec.quantise([latent], name)
            layers = codec.encode(symbols)
            decoded = codec.decode(layers)
            assert same(decoded, symbols)
            sizes.append(sum(map(len, layers)))
        restored = codec.dequantise(symbols)[0]
        assert np.array_equal(restored, symbols.tensors[0] * np.asarray(ungains[-1], np.float32)[:, None, None])
    assert all(fine > 2 * coarse for fine, coarse in zip(sizes[::2], sizes[1::2], strict=True))


def test_operating_points_are_distinct_and_name_known_graphs(student: LearnedSplit) -> None:
    points = operating_points(student.ensemble, [Rung(gain=0.0, channels=48), Rung(gain=1.0, channels=48)])
    assert len({p.id for p in points}) == len(points) == 2 * len(student.ensemble.tiers)
    assert len({(p.graphs, p.codec_point) for p in points}) == len(points)


def test_fused_norms_are_the_same_function() -> None:
    block = load_efficientnet_lite0().blocks[1]
    x = torch.randn(1, 16, 12, 12)
    with torch.no_grad():
        assert torch.allclose(fuse_norms(block)(x), block(x), atol=1e-4)
    assert any(isinstance(m, nn.BatchNorm2d) for m in block.modules()), "the original keeps its norms"


def test_elimination_keeps_the_rows_that_matter() -> None:
    torch.manual_seed(0)
    rows = torch.randn(6, 500, dtype=torch.float64)
    target = torch.stack([2 * rows[1] - rows[4], rows[4]])
    kept, weights = eliminate(rows, target, 2)
    assert kept.tolist() == [1, 4]
    assert torch.allclose(weights, torch.tensor([[2.0, -1.0], [0.0, 1.0]], dtype=torch.float64), atol=1e-3)


def test_pruning_keeps_outputs_near_and_refuses_too_many() -> None:
    torch.manual_seed(0)
    model = load_efficientnet_lite0()
    blocks = narrow(copy.deepcopy(model.blocks[:2]), nn.Sequential)
    x = torch.randn(2, 32, 16, 16).clamp(0, 6)
    with torch.no_grad():
        full, slim = blocks(x), prune_blocks(blocks, {1: 80}, x)(x)
    assert float((full - slim).square().sum() / (full - full.mean((0, 2, 3), keepdim=True)).square().sum()) < 0.05
    with pytest.raises(ConfigError, match="97"):
        prune_blocks(blocks, {1: 97}, x)


def test_pruning_is_the_same_with_norms_already_in_the_convolutions() -> None:
    torch.manual_seed(0)
    blocks = narrow(copy.deepcopy(load_efficientnet_lite0().blocks[:2]), nn.Sequential)
    x = torch.randn(2, 32, 16, 16).clamp(0, 6)
    apart, fused = (prune_blocks(b, {1: 64}, x) for b in (blocks, narrow(fuse_norms(blocks), nn.Sequential)))
    with torch.no_grad():
        assert torch.allclose(apart(x), fused(x), atol=1e-3)


def test_a_block_without_expansion_takes_some_of_its_input() -> None:
    torch.manual_seed(0)
    blocks: nn.Sequential = narrow(copy.deepcopy(load_efficientnet_lite0().blocks[:1]), nn.Sequential)
    x = torch.randn(2, 32, 16, 16).clamp(0, 6)
    x[:, 20:] = 0
    with torch.no_grad():
        slim = prune_blocks(blocks, {0: 20}, x)
        kept = narrow(narrow(slim[0], MBConv).expand, Pick).kept
        assert len(kept) == 20
        assert float((blocks(x) - slim(x)).abs().max()) < 0.05 * float(blocks(x).abs().max()), "what is empty is not missed"
        assert narrow(slim[0], MBConv).depthwise[0].groups == 20


def test_points_that_fit_one_packet_travel_in_one_layer() -> None:
    import json

    rungs = json.loads((FOLDER / "recipe.json").read_text(encoding="utf-8"))["rungs"]
    single = {f"r{i}" for i, rung in enumerate(rungs) if rung["single_layer"]}
    points = load_points((FOLDER / "operating_points.json").read_text(encoding="utf-8"))
    largest = {name: max(p.payload_bytes.p95 for p in points if p.codec_point == name) for name in {p.codec_point for p in points}}
    assert single == {name for name, size in largest.items() if size < 1200}
    assert 0 < len(single) < len(rungs)


def test_a_bit_of_a_predicted_frame_is_worth_more_to_finer_tiers() -> None:
    rungs = [Rung(gain=g, channels=8) for g in (0.0, 1.0, 2.0, 2.5, 3.0)]
    assert prices_at(rungs) == pytest.approx({"r0": 0.4, "r1": 0.4, "r2": 0.4, "r3": 0.3, "r4": 0.2})
    assert prices_at(rungs[:1]) == pytest.approx({"r0": 0.2})
