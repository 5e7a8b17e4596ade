"""Poor pictures: what they are made of, and what they cost a bundle beside its own whole model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from protos.errors import ConfigError
from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.evaluation.corruption import CORRUPTIONS, STRENGTHS, corrupted, evaluate_corrupted
from splitters.evaluation.measure import Photos
from splitters.evaluation.run import EvaluateConfig
from tests.fakes.detector_bundle import write_cell_detector, write_cell_photos

pytest.importorskip("pycocotools")


def photos() -> Photos:
    y, x = np.mgrid[0:64, 0:64]
    picture = np.stack([127 + 120 * np.sin(x / 3), 127 + 120 * np.sin(y / 5), 2 * x + 2 * y], axis=-1).clip(0, 255).astype(np.uint8)
    picture[40:] = 114
    return Photos(pictures=np.stack([picture] * 2), sizes_px=((64, 40),) * 2, content=((slice(0, 40), slice(0, 64)),) * 2)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_corruption_grows_with_its_strength_and_leaves_the_border(name: str) -> None:
    clean = photos()
    differences = []
    for strength in STRENGTHS:
        poor = corrupted(clean, name, strength)
        assert np.array_equal(poor.pictures[:, 40:], clean.pictures[:, 40:])
        assert np.array_equal(poor.pictures, corrupted(clean, name, strength).pictures), "the same photos every time"
        differences.append(float(np.abs(poor.pictures[:, :40].astype(int) - clean.pictures[:, :40]).mean()))
    assert 0 < differences[0] < differences[1] < differences[2]
    assert np.array_equal(clean.pictures, photos().pictures), "the photos themselves stay"


def test_darkness_is_less_light_not_less_contrast_alone() -> None:
    dark = corrupted(photos(), "dark", 3).pictures[0, :40]
    assert dark.max() < 110
    assert dark.min() == 0


def test_every_point_is_set_against_what_the_whole_model_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    labels = write_cell_photos(tmp_path / "images")
    bundle = open_bundle(write_cell_detector(tmp_path / "bundle").path)
    config = EvaluateConfig(images=tmp_path / "images", labels=labels, draws=20)
    report = evaluate_corrupted(bundle, config, ["dark", "noise"])
    assert [(r.corruption, r.strength) for r in report.rows] == [
        ("clean", 0),
        *((n, s) for n in ("dark", "noise") for s in (1, 2, 3)),
    ]
    clean, poor = report.rows[0], report.rows[3]
    assert clean.whole == pytest.approx(1.0)
    assert all(gap == (0, 0, 0) for gap in clean.more.values())
    assert poor.whole == pytest.approx(1.0), "this detector finds dark cells, too"
    assert poor.points[1] < clean.points[1], "its coarse point does not"
    assert poor.more[1][0] > 0
    for i, (value, low, high) in poor.more.items():
        assert value == pytest.approx((clean.points[i] - poor.points[i]) - (clean.whole - poor.whole))
        assert low <= value + 1e-9
        assert value <= high + 1e-9
    assert report.worst == {i: max(r.more[i][0] for r in report.rows) for i in clean.points}
    with pytest.raises(ConfigError, match="fog"):
        evaluate_corrupted(bundle, config, ["dark", "fog"])
    with pytest.raises(ConfigError, match="no operating point 77"):
        evaluate_corrupted(bundle, config, ["dark"], points=[77])


def test_the_command_tells_and_leaves_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    labels = write_cell_photos(tmp_path / "images")
    bundle = write_cell_detector(tmp_path / "bundle")
    asked = [
        "evaluate",
        str(bundle.path),
        "--images",
        str(tmp_path / "images"),
        "--labels",
        str(labels),
        "--corrupt",
        "jpeg",
        "--json",
    ]
    assert main([*asked, "--draws", "10", "--report", str(tmp_path / "report.json")]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [(r["corruption"], r["strength"]) for r in told["corrupted"]] == [("clean", 0), ("jpeg", 1), ("jpeg", 2), ("jpeg", 3)]
    assert told == json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert open_bundle(bundle.path).sha256 == bundle.sha256
