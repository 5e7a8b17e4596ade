"""``--output FILE.json`` may name a task that another package registered, and ``tensors`` reads any model's outputs as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import splitters
from protos.errors import ConfigError
from protos.messages import Answer, Tensors
from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.tasks.base import TASKS, Floats, Labels, SizePx, Task, tensors_of
from splitters.tasks.canvas import Canvas
from splitters.tasks.decoding import read_other_task
from tests.fakes.bundles import tiny_models

SIDE = 32


class Mask(Task):
    """Where the first channel exceeds ``above``."""

    name: ClassVar[str] = "mask-of-another-package"

    def decode(self, outputs: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        above = float(self.spec["above"])
        return [Tensors(task=self.name, arrays={"mask": (o[0] > above).astype(np.uint8)}) for o in outputs[0][: len(sizes_px)]]

    def signature(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return {"mask": ("uint8", (-1, -1, -1))}

    @classmethod
    def agreement(cls, answer: Answer, wanted: Answer) -> tuple[float, float]:
        same = tensors_of(answer)["mask"] == tensors_of(wanted)["mask"]
        return float(same.sum()), float(same.size)

    @classmethod
    def to_json(cls, answer: Answer, labels: Labels) -> dict[str, Any]:
        return {"share": float(tensors_of(answer)["mask"].mean())}

    @classmethod
    def in_words(cls, answer: Answer, labels: Labels, *, more: bool = False) -> str:
        return f"{cls.to_json(answer, labels)['share']:.0%}"

    @classmethod
    def draw(cls, canvas: Canvas, answer: Answer, labels: Labels) -> None:
        canvas.line(cls.in_words(answer, labels))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 2, 3, 1, 1)).eval()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS._made, Mask.name, Mask)


def cut(tmp_path: Path, output: str, *more: str) -> int:
    (tmp_path / "pre.json").write_text('{"resize": "stretch"}')
    return main([
        "cut", f"py:{__name__}:build", "--size", f"{SIDE}x{SIDE}", "--at", "1", "--output", output, "--bits", "8", "2",
        "--preprocess", str(tmp_path / "pre.json"), "--out", str(tmp_path / "bundle"), *more,
    ])  # fmt: skip


def declaration(tmp_path: Path, **fields: Any) -> str:
    path = tmp_path / "output.json"
    path.write_text(json.dumps(fields))
    return str(path)


def test_a_model_cut_for_a_task_of_another_package(tmp_path: Path) -> None:
    assert cut(tmp_path, declaration(tmp_path, task=Mask.name, above=0.1)) == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert (bundle.manifest.task, dict(bundle.manifest.postprocess)) == (Mask.name, {"above": 0.1})
    assert 0.9 < bundle.points[0].accuracy <= 1  # its own agreement, measured
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    answer = splitters.load(str(bundle.path))(picture).answer
    assert tensors_of(answer)["mask"].shape == (SIDE // 4, SIDE // 4)


def test_an_onnx_file_for_that_task(tmp_path: Path) -> None:
    onnx.save(tiny_models(size_px=SIDE)["whole"], str(tmp_path / "tiny.onnx"))
    output = declaration(tmp_path, task=Mask.name, above=-1e9)
    assert main(["cut", f"onnx:{tmp_path / 'tiny.onnx'}", "--at", "r1", "--output", output, "--out", str(tmp_path / "bundle")]) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.task, dict(manifest.postprocess)) == (Mask.name, {"above": -1e9})


def test_a_task_that_nobody_registered_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cut(tmp_path, declaration(tmp_path, task="forground")) == 2
    told = capsys.readouterr().err
    assert "task 'forground' is unknown; there are classification, " in told
    assert "headtail.tasks" in told
    assert not (tmp_path / "bundle").exists()


def test_settings_that_do_not_fit_the_task_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cut(tmp_path, declaration(tmp_path, task=Mask.name)) != 0
    assert f"the task {Mask.name} fails on the model's outputs: KeyError" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_tensors_of_a_torch_model(tmp_path: Path) -> None:
    assert cut(tmp_path, "tensors") == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.task, dict(manifest.postprocess)) == ("tensors", {"names": ["output_0"]})


def test_a_declaration_of_ours_is_no_other_task(tmp_path: Path) -> None:
    assert read_other_task("yolox") is None
    assert read_other_task(declaration(tmp_path, task="segmentation", scores={"axes": "chw"})) is None
    with pytest.raises(ConfigError, match="cannot be read"):
        read_other_task(str(tmp_path / "none.json"))
