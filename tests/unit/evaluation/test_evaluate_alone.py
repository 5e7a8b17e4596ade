"""The whole model alone on the device at smaller inputs, beside what the heads cost: sizes, work, the command, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from protos.errors import ConfigError
from splitters.bundle import Bundle, open_bundle
from splitters.cli import main
from splitters.evaluation.alone import in_turns
from splitters.evaluation.run import EvaluateConfig, evaluate
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.detector_bundle import write_cell_detector, write_cell_photos
from tests.fakes.smooth_photos import write_smooth_photos

pytest.importorskip("onnx_ir")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_smooth_photos(tmp_path / "images", 12, seen_px=(5, 5), size_px=(48, 40))


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    return write_tiny_bundle(tmp_path / "bundle")


def test_smaller_inputs_cost_less_and_agree_less(bundle: Bundle, images: Path) -> None:
    counted: list[int] = []
    config = EvaluateConfig(images=images, against=(), draws=20, alone_px=(8, 16))
    report = evaluate(bundle, config, show=lambda done, total, _: counted.append(done if done < total else total))
    work = report.work
    assert work is not None
    assert [a.size_px for a in work.alone] == [32, 16, 8]
    full, half, quarter = work.alone
    assert (full.accuracy, full.gap) == (1.0, (0, 0, 0)), "against its own answers"
    assert quarter.accuracy < 1
    assert quarter.gap[0] == pytest.approx(quarter.accuracy - 1)
    assert full.macs > half.macs > quarter.macs
    assert half.macs == pytest.approx(full.macs / 4, rel=0.05), "all but the classifier is convolutions"
    assert list(work.heads_ms) == [()]
    told = work.to_json()
    assert told["alone"][0]["time_share"] == told["alone"][0]["macs_share"] == 1
    assert told["heads"][0]["time_share"] == pytest.approx(work.heads_ms[()] / full.ms)
    assert counted[-1] == max(counted)


def test_work_is_clocked_in_turns() -> None:
    order: list[str] = []
    ms = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order[:6] == ["a", "b"] * 3
    assert order.count("a") == order.count("b")
    assert all(value >= 0 for value in ms.values())


def test_what_cannot_run_alone_is_refused(bundle: Bundle, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 to 31 px, not 32"):
        evaluate(bundle, EvaluateConfig(images=images, against=(), draws=20, alone_px=(32,)))
    labels = write_cell_photos(tmp_path / "cells")
    detector = open_bundle(write_cell_detector(tmp_path / "detector").path)
    with pytest.raises(ConfigError, match="no whole classifier"):
        evaluate(detector, EvaluateConfig(images=tmp_path / "cells", labels=labels, against=(), draws=20, alone_px=(16,)))


def test_the_command_tells_and_draws(bundle: Bundle, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--images", str(images), "--against", "jpeg", "--alone", "16,8", "--draws", "20"]
    assert main(["evaluate", str(bundle.path), *options, "--plot", str(tmp_path / "p.png"), "--no-write", "--json"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  alone at ") for line in told) == 3
    assert sum(line.startswith("  split stem") for line in told) == 1
    assert [a["size_px"] for a in json.loads(told[-1])["device_work"]["alone"]] == [32, 16, 8]
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 600
    assert main(["evaluate", str(bundle.path), *options[:-3], "x", "--against", "none"]) == 2
    assert "--alone takes whole numbers" in capsys.readouterr().err
