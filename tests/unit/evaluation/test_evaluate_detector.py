"""``splitters evaluate`` on a detector: a bundle whose AP is known, through the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from protos.errors import ConfigError
from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.evaluation.measure import load_photos
from splitters.evaluation.run import EvaluateConfig, evaluate
from tests.fakes.detector_bundle import write_cell_detector, write_cell_photos

pytest.importorskip("pycocotools")
pytest.importorskip("torch")


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    labels = write_cell_photos(tmp_path / "images")
    return write_cell_detector(tmp_path / "bundle").path, tmp_path / "images", labels


def test_the_command_measures_ap_beside_image_codecs_and_rewrites_the_table(
    cells: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, images, labels = cells
    arguments = ["evaluate", str(bundle), "--images", str(images), "--labels", str(labels), "--draws", "50", "--json"]
    assert main([*arguments, "--against", "jpeg,webp", "--plot", str(tmp_path / "rd.png")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["accuracy_metric"] == "ap"
    assert told["whole_model"] == pytest.approx(1.0), "boxes below the bundle's own .25 count too"
    fine, coarse = told["points"]
    assert fine["accuracy"] == pytest.approx(1.0)
    assert fine["gap"] == pytest.approx([0, 0, 0])
    assert coarse["accuracy"] < 0.9
    assert coarse["gap"][2] < 0
    assert coarse["payload_bytes"]["p50"] < fine["payload_bytes"]["p50"]
    assert told["top_point"] == {"id": 0, "gap": fine["gap"]}
    assert {c: len(rows) for c, rows in told["baselines"].items()} == {"jpeg": 16, "webp": 16}
    bar = told["jpeg95"]
    assert bar["point"] is not None
    assert bar["point_bytes"] <= 0.28 * bar["jpeg_bytes"]
    assert bar["lost"][1] <= bar["lost"][0] <= bar["lost"][2]
    assert (tmp_path / "rd.png").stat().st_size > 5000
    table = open_bundle(bundle).points
    assert [p.accuracy_metric for p in table] == ["ap", "ap"]
    assert table[0].accuracy == pytest.approx(fine["accuracy"])
    assert table[0].pareto
    assert open_bundle(bundle).manifest.score_min == pytest.approx(told["score_min"], abs=1e-4), "that of the best F1"
    assert open_bundle(bundle).manifest.postprocess["score_min"] == 0.25, "what the server reports stays"


def test_only_a_letterboxs_content_is_compressed(cells: tuple[Path, Path, Path]) -> None:
    bundle, images, _ = cells
    photos = load_photos(sorted(images.iterdir()), open_bundle(bundle))
    rows, columns = photos.content[0]
    assert (rows, columns) == (slice(0, 48), slice(0, 64))
    assert photos.pictures[:, 48:].max() == 0


def test_the_score_threshold_is_a_choice(cells: tuple[Path, Path, Path]) -> None:
    bundle, images, labels = cells
    config = {"images": images, "labels": labels, "against": (), "draws": 20}
    everything = evaluate(open_bundle(bundle), EvaluateConfig(**config))  # type: ignore[arg-type]
    strict = evaluate(open_bundle(bundle), EvaluateConfig(**config, score_min=0.5))  # type: ignore[arg-type]
    assert strict.whole < everything.whole
    assert everything.jpeg95 is None


def test_fewer_photos_are_the_same_for_every_figure(cells: tuple[Path, Path, Path]) -> None:
    bundle, images, labels = cells
    report = evaluate(open_bundle(bundle), EvaluateConfig(images=images, labels=labels, against=("jpeg",), limit=5, draws=20))
    assert report.photos == 5
    assert all(curve.sizes.shape[1] == 5 for curve in report.curves)


def test_image_codecs_are_not_run_again_for_the_same_photos_and_model(
    cells: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, images, labels = cells
    config = EvaluateConfig(images=images, labels=labels, against=("jpeg",), draws=20, cache=tmp_path / "results")
    first = evaluate(open_bundle(bundle), config)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("splitters.evaluation.run.run_image_codec", refuse)
    monkeypatch.setattr("splitters.evaluation.choices._run", refuse)
    again = evaluate(open_bundle(bundle), config)
    assert again.to_json()["baselines"] == first.to_json()["baselines"]
    with pytest.raises(AssertionError, match="measured again"):
        evaluate(open_bundle(bundle), replace(config, score_min=0.2))  # other boxes count: another result


def test_what_cannot_be_measured_is_said(cells: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, images, labels = cells
    tail_only = write_cell_detector(tmp_path / "tail-only", whole=False)
    with pytest.raises(ConfigError, match="no whole model"):
        evaluate(tail_only, EvaluateConfig(images=images, labels=labels))
    report = evaluate(tail_only, EvaluateConfig(images=images, labels=labels, against=(), draws=20))
    assert report.points[0].accuracy == pytest.approx(1.0)
    assert not report.gaps
