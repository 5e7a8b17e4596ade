"""YOLOX-nano with our bottleneck: what is committed, and the bundle where the published weights are at hand."""

import json
from pathlib import Path

import pytest

from splitters.bundle.operating_point import load_points
from splitters.exporting.learned import POINTS_FILE, RECIPE_FILE, TABLES_FILE, WEIGHTS_FILE
from splitters.zoo.fetch import WEIGHTS_VARIABLE
from splitters.zoo.yolox_nano import WEIGHTS
from splitters.zoo.yolox_nano.export import export_yolox_nano


def test_what_is_committed_is_ours_measured_and_small() -> None:
    assert {f.name for f in WEIGHTS.iterdir()} == {POINTS_FILE, RECIPE_FILE, TABLES_FILE, WEIGHTS_FILE, "preprocess.json"}
    assert sum(f.stat().st_size for f in WEIGHTS.iterdir()) < 4_000_000
    points = load_points((WEIGHTS / POINTS_FILE).read_text(encoding="utf-8"))
    assert len(points) == 9
    assert all(p.measured and p.accuracy_metric == "ap" for p in points)
    recipe = json.loads((WEIGHTS / RECIPE_FILE).read_text(encoding="utf-8"))
    assert recipe["command"].startswith("splitters train any")
    assert 0.1 < recipe["score_min"] < 0.6


def test_the_bundle_carries_name_table_and_score(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(data_dir / "weights"))
    bundle = export_yolox_nano(tmp_path / "bundle")
    assert bundle.manifest.name == "yolox-nano"
    assert bundle.manifest.score_min == pytest.approx(0.2816)
    assert len(bundle.points) == 9
    prices = [p["price"] for p in json.loads(bundle.read_part(bundle.manifest.codec))["points"]]
    assert prices == pytest.approx([0.4] * 7 + [0.3, 0.2])
    assert bundle.manifest.labels[1] == "person"
