"""A bottleneck from photographs to a served bundle: train two steps, export, reload, and the bundle computes what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from protos.messages import Classification, Detection
from splitters.bundle import Bundle, open_bundle
from splitters.cli import main
from splitters.codec import codec_from_spec
from splitters.exporting.learned_any import load_run
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import preprocess

CASES = [
    ("resnet", ["--at", "layer2.0.conv1"]),
    ("resnet", ["--at", "layer2", "--stem-at", "act1"]),
    ("densenet", ["--at", "features.denseblock2.denselayer2"]),
    ("vit", ["--at", "blocks.0", "--match", "blocks.1"]),
    ("detector", ["--at", "c4", "--task", "detection", "--output", "yolox", "--score-min", "0.02", "--amp"]),
    ("tokens", ["--at", "blocks.0", "--task", "detection", "--output", "detr", "--score-min", "0.02"]),
    ("queries", ["--at", "layers.0", "--task", "detection", "--output", "rtdetr", "--score-min", "0.02"]),
]
BOXES = {"detector": ("letterbox", "yolox"), "tokens": ("stretch", "declared"), "queries": ("stretch", "declared")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(10):
        small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 72), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{n}-{a[1]}" for n, a in CASES])
def test_a_trained_bottleneck_is_what_its_bundle_runs(name: str, arguments: list[str], photos: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    first = 1 if name == "detector" else 0
    labels.write_text(json.dumps({str(first + i): told for i, told in enumerate(("one", "two", "three"))}))
    run, out = tmp_path / "run", tmp_path / "bundle"
    options = ["--model", f"py:tests.fakes.any_models:{name}", "--weights", "random", *arguments, "--channels", "8"]
    options += ["--data", str(photos), "--out", str(run), "--steps", "3", "--batch", "4", "--hold-out", "2", "--fit", "4"]
    if name in BOXES:
        options += ["--labels", str(labels)]
    assert main(["train", "any", *options, "--bundle", str(out)]) == 0
    bundle = open_bundle(out)
    _, student, recipe = load_run(run)
    assert all(p.measured and p.accuracy_metric == "agreement" and p.head_ms.p50 > 0 for p in bundle.points)
    assert any(p.pareto for p in bundle.points)
    frame = np.asarray(Image.open(photos / "0.png"))[..., ::-1].copy()
    image = preprocess(frame, bundle.manifest.preprocess)
    tiers = len(student.ensemble.tiers)
    dearest_first = bundle.points[:: len(bundle.points) // tiers]
    latents = [_on_device(bundle, point.graphs, image) for point in dearest_first]
    for tier, latent in zip(reversed(range(tiers)), latents, strict=True):
        with torch.no_grad():
            wanted = student.latent(torch.from_numpy(image), tier).numpy()
        assert latent.shape == wanted.shape
        assert np.abs(latent - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert len({latent.shape for latent in latents}) == 1, "the latent's shape depends on no operating point"
    codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
    payload = codec.encode(codec.quantise([latents[0][0]], bundle.points[0].codec_point))
    (restored,) = codec.dequantise(codec.decode(payload))
    with torch.no_grad():
        answers = [t.numpy() for t in student.answer(torch.from_numpy(restored[None]))]
    session = ort.InferenceSession(str(out / "server/tail.onnx"), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"latent_0": restored[None]})
    for served, trained in zip(outputs, answers[-len(outputs) :], strict=True):
        assert np.abs(served - trained).max() < 1e-3 * np.abs(trained).max()
    (answer,) = load_tail(bundle).run([restored[None]], [(96, 72)])
    detects = name in BOXES
    assert isinstance(answer, Detection if detects else Classification)
    if detects:
        spec = bundle.manifest
        assert (spec.task, spec.preprocess.resize, spec.postprocess.get("kind")) == ("detection", *BOXES[name])
        assert spec.postprocess["score_min"] == 0.02
        assert spec.labels == {first: "one", first + 1: "two", first + 2: "three"}
        assert recipe["config"]["amp"] == ("--amp" in arguments)


def _on_device(bundle: Bundle, graphs: tuple[str, ...], image: np.ndarray) -> np.ndarray:
    head = bundle.manifest.head
    stem_map = _run(bundle, head.stem, image)
    return np.sum([_run(bundle, head.graphs[g], stem_map) for g in graphs], axis=0)


def _run(bundle: Bundle, part: str, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(bundle.part_path(part)), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]
