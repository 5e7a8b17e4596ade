"""`splitters adapt`: a bundle's codec fitted to one site's video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.codec.tables import read_tables
from splitters.runtime.head import open_codec
from tests.fakes.detector_bundle import write_cell_detector
from tests.unit.evaluation.test_video_evaluation import frames, write_clip

pytest.importorskip("av")


def test_a_sites_camera_costs_less_and_the_model_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", bits=(6, 4), learned=True)
    video = write_clip(tmp_path / "yard.mp4", frames(60, 128, 128), 10)
    arguments = ["adapt", str(bundle.path), "--video", str(video), "--until", "0.5", "--out", str(tmp_path / "yard"), "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    adapted = open_bundle(tmp_path / "yard")
    assert told["sha256"] == adapted.sha256 != bundle.sha256
    assert told["frames"] == 30
    assert [(t["what"], t["pays"]) for t in told["trials"]] == [("tables", True), ("scene", True)]
    assert told["trials"][0]["percent"] < -70
    assert told["trials"][1]["percent"] < -20
    assert open_codec(adapted).supports_reference
    assert not open_codec(open_bundle(bundle.path)).supports_reference  # the one given stays as it was
    same = [p for p in adapted.manifest.parts if p.path != "device/tables.bin"]
    assert same == [p for p in bundle.manifest.parts if p.path != "device/tables.bin"]
    assert adapted.points == bundle.points


def test_tables_alone_for_a_camera_that_moves(tmp_path: Path) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", bits=(6,), learned=True)
    video = write_clip(tmp_path / "yard.mp4", frames(30, 128, 128), 10)
    assert main(["adapt", str(bundle.path), "--video", str(video), "--no-scene", "--out", str(tmp_path / "yard")]) == 0
    assert open_codec(open_bundle(tmp_path / "yard")).supports_reference


@pytest.mark.parametrize(
    ("learned", "still", "told"), [(False, False, "only a learned one can be adapted"), (True, True, "in which more moves")]
)
def test_what_cannot_be_adapted_is_told_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], learned: bool, still: bool, told: str
) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", bits=(6,), learned=learned)
    pictures = [frames(1, 128, 128)[0]] * 12 if still else frames(12, 128, 128)
    video = write_clip(tmp_path / "yard.mp4", pictures, 10)
    assert main(["adapt", str(bundle.path), "--video", str(video), "--out", str(tmp_path / "yard")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "yard").exists()
    (tmp_path / "yard").mkdir()
    assert main(["adapt", str(bundle.path), "--video", str(video), "--out", str(tmp_path / "yard")]) == 2
    assert "choose another --out" in capsys.readouterr().err


def adapted(given: Path, video: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[str]]:
    """What the command says of its trials, by name, and all its lines."""
    assert main(["adapt", str(given), "--video", str(video), "--out", str(out), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {t["what"]: t for t in json.loads(lines[-1])["trials"]}, lines


def test_a_scene_that_is_gone_by_the_last_quarter_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", bits=(6, 4), learned=True)
    pictures = frames(40, 128, 128)
    turned = [np.ascontiguousarray(p[::-1]) for p in pictures[30:]]
    video = write_clip(tmp_path / "yard.mp4", pictures[:30] + turned, 10)
    trials, lines = adapted(bundle.path, video, tmp_path / "yard", capsys)
    assert trials["tables"]["pays"]
    assert trials["scene"]["percent"] >= 0
    assert any(line.startswith("scene: ") and line.endswith("left out") for line in lines)
    predicts = read_tables(open_bundle(tmp_path / "yard").read_part("device/tables.bin")).predicted
    assert predicts is not None
    assert predicts.scene is None


def test_where_nothing_is_found_the_scene_is_left_out_and_the_reason_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", bits=(6, 4), learned=True)
    video = write_clip(tmp_path / "yard.mp4", [p // 4 for p in frames(40, 128, 128)], 10)
    trials, lines = adapted(bundle.path, video, tmp_path / "yard", capsys)
    assert trials["tables"]["pays"]
    assert not trials["scene"]["pays"]
    assert any("no telling what it saves: the uncut model finds no box" in line for line in lines)


def test_tables_that_cost_more_on_the_last_quarter_stay_the_bundles_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cell_detector(tmp_path / "bundle", bits=(6, 4), learned=True)
    calm = frames(80, 128, 128)
    adapted(tmp_path / "bundle", write_clip(tmp_path / "calm.mp4", calm, 10), tmp_path / "yard", capsys)
    rng = np.random.default_rng(3)
    storm = [rng.integers(0, 255, p.shape).astype(np.uint8) for p in calm[:30]]
    trials, _ = adapted(tmp_path / "yard", write_clip(tmp_path / "storm.mp4", storm + calm[30:40], 10), tmp_path / "storm", capsys)
    assert trials["tables"]["percent"] > 0
    assert not trials["tables"]["pays"]
    assert not trials["scene"]["pays"]
    assert open_bundle(tmp_path / "storm").sha256 == open_bundle(tmp_path / "yard").sha256
