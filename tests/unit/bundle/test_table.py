"""A bundle's table: measured on photos before the bundle is in its place, or there is no bundle."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_client.device.choices import measured_points
from protos.errors import BundleError, SourceError
from splitters.bundle import Bundle, BundleWriter, Measured, open_bundle
from splitters.bundle.draft import Draft
from splitters.bundle.operating_point import UNMEASURED, UNMEASURED_METRIC
from splitters.runtime.pictures import read_picture
from splitters.runtime.table import measure_table
from tests.fakes.detector_bundle import write_cell_detector, write_cell_photos


@pytest.fixture
def frames(tmp_path: Path) -> list[Any]:
    write_cell_photos(tmp_path / "images")
    return [read_picture(f) for f in sorted((tmp_path / "images").iterdir())]


def bare(bundle: Bundle) -> list[Any]:
    return [replace(p, accuracy=0.0, accuracy_metric=UNMEASURED_METRIC, payload_bytes=UNMEASURED) for p in bundle.points]


def rewritten(out: Path, old: Bundle, **more: Any) -> Bundle:
    """The same bundle with a table that was not measured."""
    m = old.manifest
    kept = ("name", "task", "preprocess", "labels", "latent_shape", "head", "codec", "local", "tail", "postprocess", "licence")
    with BundleWriter(out) as writer:
        for part in m.parts:
            if part.path != "operating_points.json":
                writer.add(part.path, old.read_part(part.path), part.side)
        return writer.finish(points=bare(old), **{name: getattr(m, name) for name in kept}, **more)


@pytest.mark.parametrize("whole", [True, False])
def test_the_table_says_what_was_measured(tmp_path: Path, frames: list[Any], whole: bool) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", whole=whole)
    told: list[tuple[int, int, str]] = []
    found = measure_table(replace(bundle, points=tuple(bare(bundle))), frames, lambda *step: told.append(step))
    fine, coarse = found.points
    assert fine.accuracy == pytest.approx(1.0)
    assert coarse.accuracy < fine.accuracy
    assert 0 < coarse.payload_bytes.p50 < fine.payload_bytes.p50 <= fine.payload_bytes.p95
    assert fine.head_ms.p50 > 0
    assert all(p.measured and p.accuracy_metric == "agreement" for p in found.points)
    assert [done for done, _, _ in told] == list(range(1, len(frames) + 1))
    with pytest.raises(SourceError, match="--photos"):
        measure_table(bundle, [])


def test_a_bundle_without_a_measured_table_is_not_written(tmp_path: Path, frames: list[Any]) -> None:
    old = write_cell_detector(tmp_path / "old")
    with pytest.raises(BundleError, match="not measured"):
        rewritten(tmp_path / "new", old)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "instances.json", "old"], "nor is anything left of it"
    seen: list[Path] = []

    def measure(bundle: Bundle) -> Measured:
        seen.append(bundle.path)
        assert not (tmp_path / "new").exists(), "it is measured before it is there"
        return measure_table(bundle, frames)

    new = rewritten(tmp_path / "new", old, measure=measure)
    assert seen[0] != new.path
    assert open_bundle(new.path).points[0].accuracy == pytest.approx(1.0)


def test_what_was_never_measured_is_not_chosen_from(tmp_path: Path) -> None:
    bundle = write_cell_detector(tmp_path / "bundle")
    engine: Any = SimpleNamespace(bundle=bundle, model="cells")
    assert measured_points(engine) == bundle.points
    engine.bundle = replace(bundle, points=(bundle.points[0], bare(bundle)[1]))
    with pytest.raises(BundleError, match="never measured"):
        measured_points(engine)


def test_what_a_killed_export_left_is_removed_and_what_is_being_written_stays(tmp_path: Path) -> None:
    def made(name: str, age_s: float) -> Path:
        folder = tmp_path / f".bundle.headtail-draft-{name}"
        (folder / "device").mkdir(parents=True)
        then = folder.stat().st_mtime - age_s
        os.utime(folder, (then, then))
        return folder

    old, young, busy = made("old", 3600), made("young", 1), made("busy", 3600)
    theirs = tmp_path / ".bundle.headtail-draft"
    theirs.mkdir()
    lock = os.open(busy, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with Draft(tmp_path / "bundle") as draft:
        (draft.path / "part").write_text("x")
        assert not old.exists()
        assert young.exists()
        assert busy.exists()
        assert theirs.exists()
        draft.publish()
    assert (tmp_path / "bundle" / "part").read_text() == "x"
    os.close(lock)


def test_a_draft_that_is_left_is_gone(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Draft(tmp_path / "bundle") as draft:
            (draft.path / "part").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
