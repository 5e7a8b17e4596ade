"""The detector's bottleneck: one latent whatever the tier, a cheap device, a tail that is the student's, the bundle that ships."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edge_client.device.engine import Engine
from edge_server.frames.decode import decode_image
from protos.errors import BundleError
from protos.messages import Detection
from splitters.bottleneck.learned import LearnedSplit, StagedModel, run_stages
from splitters.bundle import Bundle
from splitters.codec import codec_from_spec
from splitters.exporting.learned import WEIGHTS_FILE, exportable, graph_name, tuned_state
from splitters.runtime.sessions import open_graph
from splitters.runtime.tail import load_tail
from splitters.training.config import LossWeights
from splitters.training.losses import staged_distortion
from splitters.zoo.defaults import find
from splitters.zoo.detector.export import (
    FOLDER,
    LATENT_SHAPE,
    LearnedDetectorTail,
)
from splitters.zoo.detector.export_plain import WholeDetector
from splitters.zoo.detector.network import Detector, load_detector
from splitters.zoo.detector.split import C_LATENT, TIERS, build_learned_detector, load_learned_detector
from splitters.zoo.detector.staged import joined, staged_detector

SIZE = 128


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    waves = [torch.stack([torch.sin((5 + i) * x), y * torch.cos(i * x), x * y]) for i in range(4)]
    noise = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return torch.stack(waves) + 0.5 * noise


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


@pytest.fixture(scope="module")
def both(detector: Detector, images: torch.Tensor) -> Iterator[tuple[StagedModel, LearnedSplit]]:
    with torch.no_grad():
        base, student = build_learned_detector(images, (8000.0, 4000.0, 2000.0), detector)
        yield base, student.eval()


def test_pieces_are_the_detector(detector: Detector, images: torch.Tensor) -> None:
    base = staged_detector(detector, SIZE)
    with torch.no_grad():
        cut = base.body(base.stem(images))
        found = run_stages(base.stages, cut)
        for mine, theirs in zip(joined(tuple(found[base.taps :])), detector(images), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
    assert len(found) == base.taps + len(base.raw)
    for tensor, raw in zip(found[base.taps :], base.raw, strict=True):
        assert tuple(tensor.shape[2:]) == raw.cells
        assert raw.probability == (tensor.shape[1] == 80)


def test_every_tier_gives_the_same_latent_shape(both: tuple[StagedModel, LearnedSplit], images: torch.Tensor) -> None:
    shapes = {tuple(both[1].latent(images, tier).shape) for tier in range(len(TIERS))}
    assert shapes == {(4, C_LATENT, SIZE // 16, SIZE // 16)}


def test_untrained_bottleneck_already_keeps_most_of_the_cut(both: tuple[StagedModel, LearnedSplit], images: torch.Tensor) -> None:
    base, student = both
    with torch.no_grad():
        cut = base.body(base.stem(images))
        restored = student.answer(student.latent(images, len(TIERS) - 1))[0]
    assert float((restored - cut).square().mean() / cut.var()) < 0.5


def test_a_student_with_the_teachers_cut_costs_nothing(both: tuple[StagedModel, LearnedSplit], images: torch.Tensor) -> None:
    base, student = both
    weights = LossWeights(stages=(1.0,))
    with torch.no_grad():
        cut = base.body(base.stem(images))
        teacher = [cut, *run_stages(base.stages, cut)]
        same = staged_distortion([cut, *run_stages(list(student.stages), cut)], teacher, weights, base)
        coarse = staged_distortion(student.answer(student.latent(images, len(TIERS) - 1)), teacher, weights, base)
    assert float(same.abs().max()) < 1e-4
    assert float(coarse.min()) > 1e-3


def test_device_work_stays_within_its_shares() -> None:
    def macs(module: nn.Module, x: torch.Tensor) -> tuple[int, torch.Tensor]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = module(x)
        return counter.get_total_flops() // 2, y

    detector = Detector().eval()
    with torch.no_grad():
        _, student = build_learned_detector(torch.randn(2, 3, SIZE, SIZE), (800.0, 400.0), detector)
    student.eval()
    image = torch.zeros(1, 3, 320, 320)
    whole, _ = macs(detector, image)
    stem, stem_map = macs(student.stem, image)
    shares = {}
    for tier in student.ensemble.tiers:
        encoders = sum(macs(exportable(student.ensemble.encoders[i], w), stem_map)[0] for i, w in tier.runs)
        shares[tier.name] = (stem + encoders) / whole
    assert shares["s"] <= 0.12
    assert shares["s"] < shares["m"] < shares["own"] <= 0.35


def test_weights_reload_and_wrong_ones_are_refused(
    both: tuple[StagedModel, LearnedSplit], detector: Detector, images: torch.Tensor, tmp_path: object
) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / WEIGHTS_FILE
    save_file(tuned_state(both[1]), path)
    _, again = load_learned_detector(path, SIZE, detector)
    for tier in range(len(TIERS)):
        wanted, got = both[1].latent(images, tier), again.latent(images, tier)
        assert float((wanted - got).abs().max()) < 0.01 * float(wanted.abs().max())
    save_file({"quantiser.log_gain": torch.zeros(2, 64), "surprise": torch.zeros(1)}, path)
    with pytest.raises(BundleError, match="fit"):
        load_learned_detector(path, SIZE, detector)
    with pytest.raises(BundleError, match="no usable"):
        load_learned_detector(path.with_name("absent.safetensors"), SIZE, detector)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """As it is exported once in a run."""
    if not (FOLDER / WEIGHTS_FILE).exists():
        pytest.skip("no trained bottleneck in this tree")
    return find("detector")


def test_shipped_bundle_answers_through_every_point(bundle: Bundle) -> None:
    import onnxruntime as ort

    def run(path: str, name: str, x: np.ndarray) -> np.ndarray:
        session = ort.InferenceSession(str(bundle.part_path(path)), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {name: x})
        return np.asarray(y)

    rng = np.random.default_rng(0)
    picture = rng.normal(0, 0.6, (1, 3, 10, 10)).astype(np.float32).repeat(32, axis=2).repeat(32, axis=3)
    head, codec = bundle.manifest.head, codec_from_spec(json.loads(bundle.read_part("device/codec.json")), bundle.read_part)
    assert head.prefilter is not None
    assert bundle.manifest.local is not None
    stem_map = run(head.stem, "image", picture)
    latents = {name: run(path, "stem_map", stem_map) for name, path in head.graphs.items()}
    _, student = load_learned_detector(FOLDER / WEIGHTS_FILE, 320)
    for index, width in {r for tier in TIERS for r in tier.runs}:
        with torch.no_grad():
            wanted = student.ensemble.run(index, width, torch.from_numpy(stem_map)).numpy()
        assert np.abs(latents[graph_name(index, width)] - wanted).max() < 2e-3 * np.abs(wanted).max()
    tail = load_tail(bundle)
    sizes: dict[str, list[int]] = {}
    for point in bundle.points:
        latent = np.sum([latents[g] for g in point.graphs], axis=0)
        assert latent.shape[1:] == LATENT_SHAPE
        layers = codec.encode(codec.quantise([latent[0]], point.codec_point))
        sizes.setdefault("+".join(point.graphs), []).append(sum(map(len, layers)))
        (restored,) = codec.dequantise(codec.decode(layers))
        (answer,) = tail.run([restored[None]], [(480, 360)])
        assert isinstance(answer, Detection)
    assert len(sizes) == len(TIERS)
    for row in sizes.values():
        assert row == sorted(row, reverse=True)
        assert row[0] > 1.5 * row[-1]


def test_the_servers_graphs_are_the_students_tail_and_the_whole_detector(bundle: Bundle) -> None:
    spec = bundle.manifest.tail
    _, student = load_learned_detector(FOLDER / WEIGHTS_FILE, 320)
    latent = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(5))
    image = 0.5 * torch.randn(2, 3, 320, 320, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        pairs = [
            (open_graph(bundle.part_path(spec["path"]))([latent.numpy()]), LearnedDetectorTail(student)(latent)),
            (open_graph(bundle.part_path(spec["whole"]))([image.numpy()]), WholeDetector(load_detector())(image)),
        ]
    for ours, wanted in pairs:
        assert len(ours) == len(wanted) == 2
        for mine, theirs in zip(ours, wanted, strict=True):
            assert np.abs(mine - theirs.numpy()).max() < 1e-4 * float(theirs.abs().max())


def test_shipped_bundle_offers_pictures_and_a_local_model_with_what_they_are_worth(bundle: Bundle) -> None:
    engine, tail = Engine(bundle, clock=time.monotonic_ns), load_tail(bundle)
    frame = np.random.default_rng(3).integers(0, 255, (15, 20, 3), dtype=np.uint8).repeat(24, axis=0).repeat(24, axis=1)
    best = max(o.accuracy for o in bundle.offloads)
    assert {o.format for o in bundle.offloads} == {"jpeg", "webp"}
    assert any(o.size_px for o in bundle.offloads), "reduced pictures too"
    for o in bundle.offloads:
        (payload,) = engine.compress(engine.picture(frame), o.format, o.quality, o.size_px).payloads
        restored = decode_image(payload, bundle.manifest.preprocess.size_px, 1 << 20)
        (answer,) = tail.run_images([restored], [(480, 360)])
        assert isinstance(answer, Detection)
    local = bundle.manifest.local
    assert local is not None
    assert local.preprocess.size_px in ((128, 128), (160, 160))
    assert local.accuracy_metric == bundle.points[0].accuracy_metric
    assert 0.5 * best < local.accuracy < best


def test_shipped_bottleneck_fits_the_shipped_detector(bundle: Bundle) -> None:
    """The encoder's own blocks and the stem are the committed detector's, so the two were trained around one another."""
    _, student = load_learned_detector(FOLDER / WEIGHTS_FILE, 320)
    network = load_detector()
    own = student.ensemble.encoders[-1]
    body = dict(own.body.named_parameters())  # type: ignore[union-attr]
    for name, value in network.backbone.blocks[:5].named_parameters():
        assert torch.allclose(body[name], value, atol=2e-3 * float(value.abs().max()) + 1e-4), name
