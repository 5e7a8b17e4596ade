"""Default bundles: exported on first use, again when what they are made of has changed, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.errors import UnknownModelError
from splitters import export as module
from splitters.bundle import Bundle, exported_path
from tests.unit.test_bundle import write


def test_exported_once_and_again_when_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path))
    made: list[Path] = []

    def exporter(out: Path) -> Bundle:
        made.append(out)
        return write(out)

    monkeypatch.setattr(module, "EXPORTERS", {"tiny": exporter})
    assert module.ensure_exported("tiny") == exported_path("tiny") == module.ensure_exported("tiny")
    assert len(made) == 1
    monkeypatch.setattr(module, "_source_sha256", lambda: "other weights")
    module.ensure_exported("tiny")
    assert len(made) == 2
    (exported_path("tiny") / "device" / "stem.onnx").unlink()
    module.ensure_exported("tiny")
    assert len(made) == 3


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="efficientnet-lite0"):
        module.export("resnet-9000", tmp_path / "b")
