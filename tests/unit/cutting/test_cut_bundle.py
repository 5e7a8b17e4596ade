"""A model cut by the command line becomes a bundle whose halves, through the codec, answer like the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from protos.errors import CutError, SourceError
from protos.messages import Classification
from splitters.bundle.manifest import Preprocess
from splitters.cli import main
from splitters.codec import codec_from_spec
from splitters.commands.cut import read_photos
from splitters.cutting.bundle import Serving, channel_axis, write_bundle
from splitters.cutting.graph.split import Cutter
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import preprocess

SIDE = 32
SOURCE = f"py:{__name__}:build"


class Small(nn.Module):
    """A residual classifier: two tensors cross after ``branch``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.branch = nn.Conv2d(8, 8, 3, 1, 1)
        self.classifier = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.classifier((x + self.branch(x).relu()).mean((2, 3)))


class FixedBatch(nn.Module):
    """Folds the batch into a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 4)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stem(x).reshape(1, 4, -1).mean(2))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Small()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures: what a photograph is to a codec."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(6):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (80, 60), interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(scope="module")
def serving() -> Serving:
    return Serving(
        name="small", task="classification", postprocess={"kind": "softmax"}, labels={}, licence="none", provenance={},
        preprocess=Preprocess(resize="shortest", size_px=(SIDE, SIDE), resize_px=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3),
        bits=(8, 2),
    )  # fmt: skip


def test_the_command_writes_a_bundle_that_answers_like_the_model(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    arguments = ["cut", SOURCE, "--size", f"{SIDE}x{SIDE}", "--at", "branch", "--out", str(out),
                 "--photos", str(photos), "--bits", "8", "4", "--name", "small", "--local", "--json"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    steps = [line for line in printed.err.splitlines() if line.startswith("cut: ")]
    assert steps[0].startswith("cut: 0 of 6  tracing the model")
    assert any("cut: 13 of 13" in step for step in steps)  # seven steps and six photographs
    said = json.loads(printed.out.strip().splitlines()[-1])
    assert said["relative_difference"] <= 1e-4
    assert said["onnx_difference"] <= 1e-3
    from splitters.bundle import open_bundle

    bundle = open_bundle(out)
    assert bundle.sha256 == said["sha256"]
    assert bundle.manifest.latent_shape == ((8, 16, 16), (8, 16, 16))
    assert [p.bits for p in bundle.points] == [8, 4]
    assert 0 < bundle.points[1].payload_bytes.p50 < bundle.points[0].payload_bytes.p50 < 2 * 8 * 256
    head = ort.InferenceSession(str(bundle.part_path(bundle.manifest.head.stem)))
    codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
    tail = load_tail(bundle)
    frames = read_photos(photos, 3)
    latents: list[Any] = []
    for frame in frames:
        run = head.run(None, {"image": preprocess(frame, bundle.manifest.preprocess)})
        payload = codec.encode(codec.quantise([t[0] for t in run], bundle.points[0].codec_point))
        latents.append(codec.dequantise(codec.decode(payload)))
    answers = tail.run([np.stack([latent[i] for latent in latents]) for i in range(2)], [(80, 60)] * 3)
    model = build().eval()
    for frame, answer in zip(frames, answers, strict=True):
        with torch.no_grad():
            wanted = model(torch.from_numpy(preprocess(frame, bundle.manifest.preprocess))).softmax(1)[0]
        assert isinstance(answer, Classification)
        assert answer.top[0].class_id == int(wanted.argmax())
        assert answer.top[0].score == pytest.approx(float(wanted.max()), abs=5e-3)
    assert tail.takes_images  # and so offload is possible
    assert bundle.manifest.local is not None


def test_a_fixed_batch_cannot_be_served(tmp_path: Path, photos: Path, serving: Serving) -> None:
    cutter = Cutter(FixedBatch(), torch.rand(1, 3, SIDE, SIDE))
    with pytest.raises(CutError, match=r"fixed batch of 1.*images of a batch are mixed.*Export the model with a free batch axis"):
        write_bundle(cutter, "stem", read_photos(photos, 2), serving, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Masked(nn.Module):
    """A boolean or whole-number tensor crosses after ``branch``; after ``join`` floats alone do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.branch = Branch(kind)
        self.join = Join()
        self.classifier = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.join(*self.branch(self.stem(x))).mean((2, 3)))


class Branch(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, {"bool": x > 0, "int64": x.argmax(1, keepdim=True), "float64": x.double(), "float16": x.half()}[self.kind]


class Join(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x.relu() * other.float()


@pytest.mark.parametrize("kind", ["bool", "int64", "float64", "float16"])
def test_what_a_payload_cannot_carry_exactly_is_refused_by_name(tmp_path: Path, photos: Path, serving: Serving, kind: str) -> None:
    torch.manual_seed(0)
    cutter = Cutter(Masked(kind).eval(), torch.rand(1, 3, SIDE, SIDE))
    name = cutter.split("branch").latent_names[-1]
    with pytest.raises(CutError, match=rf"{name!r} crosses the cut at 'branch' as {kind}.*nearest cuts are stem and join"):
        write_bundle(cutter, "branch", read_photos(photos, 2), serving, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_photographs_there_are_no_scales(tmp_path: Path, serving: Serving) -> None:
    with pytest.raises(SourceError, match="give --photos DIR"):
        write_bundle(Cutter(build(), torch.rand(1, 3, SIDE, SIDE)), "branch", [], serving, tmp_path / "out")
    with pytest.raises(SourceError, match="holds no photographs"):
        read_photos(tmp_path, 3)


def test_channels_are_found_in_every_layout() -> None:
    assert channel_axis((64, 28, 28)) == 0
    assert channel_axis((28, 28, 96)) == 2
    assert channel_axis((196, 384)) == 1
    assert channel_axis((512,)) == 0


def test_an_onnx_file_with_a_fixed_batch_is_freed_and_cut(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.last = nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)[:, :, 1:15, ::2].relu()
            x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
            return self.last(x).reshape(1, 5, -1).transpose(1, 2)

    torch.manual_seed(0)
    path = tmp_path / "net.onnx"
    image = torch.rand(1, 3, 32, 32)
    program = torch.onnx.export(Net().eval(), (image,), dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    program.save(str(path), external_data=False)
    wanted = ort.InferenceSession(str(path)).run(None, {program.model.graph.inputs[0].name: image.numpy()})[0]
    from splitters.cutting.sources import load_source

    source = load_source(f"onnx:{path}")
    assert isinstance(source.model, nn.Module)
    cutter = Cutter(source.model, source.example)
    assert cutter.trace.dynamic_batch, cutter.trace.notes
    for cut in cutter.candidates():
        halves = cutter.split(cut)
        halves.verify(image)
        with torch.no_grad():
            np.testing.assert_allclose(halves.tail(*halves.head(image)).numpy(), wanted, atol=1e-5)


def test_without_at_the_fewest_bytes_with_little_work_are_taken_and_named(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["cut", SOURCE, "--size", f"{SIDE}x{SIDE}", "--out", str(tmp_path / "bundle"),
                 "--photos", str(photos), "--bits", "8", "--json"]  # fmt: skip
    assert main(arguments) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    at = json.loads(lines[-1])["at"]
    assert f"cut at {at} (the fewest bytes" in lines[0]
    assert at in dict.fromkeys(["stem", "stem.0", "stem.1", "stem.2"])  # the branch is most of the work
