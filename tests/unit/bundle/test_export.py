"""Default bundles: exported on first use, again when what they are made of has changed, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.errors import StorageError, UnknownModelError
from splitters import cli
from splitters.bundle import Bundle, exported_path
from splitters.zoo import defaults as module
from tests.unit.bundle.test_bundle import write


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """One default, ``tiny``, in a cache of its own: where it was exported to, each time."""
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path))
    found: list[Path] = []

    def exporter(out: Path) -> Bundle:
        found.append(out)
        return write(out)

    monkeypatch.setattr(module, "EXPORTERS", {"tiny": exporter})
    return found


def test_exported_once_and_again_when_the_source_changes(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.ensure_exported("tiny") == exported_path("tiny") == module.ensure_exported("tiny")
    assert len(made) == 1
    monkeypatch.setattr(module, "_source_sha256", lambda: "other weights")
    module.ensure_exported("tiny")
    assert len(made) == 2
    (exported_path("tiny") / "device" / "stem.onnx").unlink()
    module.ensure_exported("tiny")
    assert len(made) == 3


def test_what_was_exported_by_hand_is_not_exported_again(made: list[Path], tmp_path: Path) -> None:
    """A server's image is built with `splitters export NAME`, and its root is read-only."""
    assert cli.main(["export", "tiny"]) == 0
    assert cli.main(["export", "tiny", "--out", str(tmp_path / "elsewhere")]) == 0
    assert module.ensure_exported("tiny") == exported_path("tiny")
    assert made == [exported_path("tiny"), tmp_path / "elsewhere"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "exported"]


def test_where_nothing_can_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file, no directory")
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "EXPORTERS", {"tiny": write})
    with pytest.raises(StorageError, match="HEADTAIL_CACHE"):
        module.ensure_exported("tiny")
    assert cli.main(["export", "tiny"]) == StorageError.exit_code
    assert "cannot be written" in capsys.readouterr().err


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="efficientnet-lite0"):
        module.export("resnet-9000", tmp_path / "b")
