"""Nothing calls home: a library that would is told not to before it is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = ("edge_client", "edge_server", "splitters", "deploy", "protos")


@pytest.mark.parametrize("module", ["splitters", "splitters.runtime.head"])
def test_onnx_runtime_leaves_no_device_id_and_no_reports(tmp_path: Path, module: str) -> None:
    """With its telemetry on, importing it writes an identifier of the device and a queue of reports below the home."""
    # CI alone switches it off as well.
    environment = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "CI") and not k.startswith("XDG_")}
    subprocess.run(
        [sys.executable, "-c", f"import {module}; import onnxruntime"],
        env={**environment, "HOME": str(tmp_path)}, cwd=ROOT, check=True, timeout=120,
    )  # fmt: skip
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_whoever_loads_onnx_runtime_has_loaded_splitters() -> None:
    loaders = {
        f.relative_to(ROOT)
        for package in PACKAGES
        for f in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(import|from) onnxruntime", f.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert Path("splitters/runtime/head.py") in loaders
    for path in loaders:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert path.parts[0] == "splitters" or re.search(r"^from splitters\.", text, re.MULTILINE), path


def test_one_module_opens_onnx_runtime() -> None:
    """So that device, server, training and evaluation run the same graphs under the same settings."""
    openers = [
        str(f.relative_to(ROOT))
        for package in PACKAGES
        for f in (ROOT / package).rglob("*.py")
        if "InferenceSession(" in f.read_text(encoding="utf-8")
    ]
    assert openers == ["splitters/runtime/sessions.py"]
