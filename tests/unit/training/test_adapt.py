"""`splitters adapt`: a bundle's codec fitted to one site's video."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitters.bundle import open_bundle
from splitters.cli import main
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
