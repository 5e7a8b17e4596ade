"""The facade of splitters: each call does what its command does, and nothing is imported before it is needed."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import splitters
from protos.errors import BundleError, ConfigError, PayloadError, UnknownModelError
from splitters.bundle import Bundle, open_bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.middle(self.stem(image).relu()).relu().mean((2, 3)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def with_example() -> tuple[nn.Module, torch.Tensor]:
    return build(), torch.zeros(1, 3, 64, 64)


def test_importing_splitters_imports_neither_torch_nor_onnx_runtime() -> None:
    code = "import sys, splitters, splitters.api; splitters.load; assert not {'torch', 'onnxruntime', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in splitters.__all__:
        assert getattr(splitters, name).__doc__


def test_a_bundle_is_loaded_and_answers_as_device_and_server_do(bundle: Bundle) -> None:
    model, device, frame = splitters.load(bundle.path), Device(bundle), picture(3)
    for point in model.points:
        done = model(frame, point=point.id)
        assert done.payloads == tuple(device.payloads(frame, point.id))
        assert done.payload_bytes == sum(map(len, done.payloads))
        assert done.point == point
        assert done.answer == model.decode(done.payloads, (48, 40))
        assert len(done.answer.top) == 5
    assert model(frame).point == max(model.points, key=lambda p: p.accuracy)
    assert model.whole(frame).top[0].class_id == model(frame).answer.top[0].class_id


@pytest.mark.parametrize(
    "frame",
    [
        None,
        "frame.jpg",
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_frame_is_refused_in_words(bundle: Bundle, frame: object) -> None:
    with pytest.raises(ConfigError, match="blue first"):
        splitters.load(bundle.path)(frame)


def test_a_damaged_payload_and_an_unknown_point_or_bundle_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    model = splitters.load(str(bundle.path))
    with pytest.raises(PayloadError):
        model.decode([b"nonsense"], (48, 40))
    with pytest.raises(BundleError):
        model(picture(), point=99)
    with pytest.raises(UnknownModelError):
        splitters.load("no-such-model")
    with pytest.raises(BundleError):
        splitters.load(tmp_path)


def test_split_takes_a_module_or_a_name() -> None:
    images = torch.rand(3, 3, 64, 64)
    for halves in (splitters.split(build(), "middle", images[:1]), splitters.split(f"py:{__name__}:with_example", "middle")):
        assert halves.verify(images).relative_difference < 1e-4
    with pytest.raises(ConfigError, match="example_inputs"):
        splitters.split(build(), "middle")
    with pytest.raises(ConfigError, match="names no model"):
        splitters.split("resnet18", "layer2")


def test_profile_takes_a_module_or_a_name(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "photo.png"), picture(width=90, height=80))
    named = splitters.profile(f"py:{__name__}:with_example", picture=tmp_path / "photo.png", budget_s=0.5)
    given = splitters.profile(build(), torch.rand(1, 3, 64, 64), name="mine", budget_s=0.5)
    assert (named.model, given.model) == ("with_example", "mine")
    assert [row.name for row in named.rows] == [row.name for row in given.rows] != []
    assert [row.head_macs for row in named.rows] == [row.head_macs for row in given.rows]


def test_evaluate_measures_and_writes_only_when_asked(bundle: Bundle, tmp_path: Path) -> None:
    for number in range(4):
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture(number))
    mine = write_tiny_bundle(tmp_path / "mine")
    report = splitters.evaluate(mine.path, tmp_path, against=(), limit=3, draws=20)
    assert report.photos == 3
    assert open_bundle(mine.path).sha256 == mine.sha256
    assert tuple(open_bundle(mine.path).points) == tuple(mine.points)
    splitters.evaluate(mine.path, tmp_path, against=(), limit=3, draws=20, write=True)
    written = open_bundle(mine.path).points
    assert {p.id: p.accuracy for p in written} == {p.id: p.accuracy for p in report.points}


def test_training_says_which_option_it_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no option 'stepz'"):
        splitters.train("efficientnet-lite0", tmp_path, tmp_path / "run", stepz=3)
    with pytest.raises(ConfigError, match="--steps must be at least 1"):
        splitters.train("efficientnet-lite0", tmp_path, tmp_path / "run", steps=0)


def test_export_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="efficientnet-lite0"):
        splitters.export("no-such-model", tmp_path / "out")
