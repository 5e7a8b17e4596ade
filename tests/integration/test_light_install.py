"""A plain ``pip install .`` in a clean venv runs the client: no torch, no ray, a small peak of memory.

It installs from the package index, so it runs where that is wanted: in CI, or with HEADTAIL_LIGHT_INSTALL=1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import write_photos
from tests.fakes.server_running import child

ROOT = Path(__file__).parents[2]
MAX_MEMORY_BYTES = 300 << 20


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (os.environ.get("CI") or os.environ.get("HEADTAIL_LIGHT_INSTALL")),
    reason="installs from the index: set HEADTAIL_LIGHT_INSTALL=1",
)
def test_a_plain_install_runs_the_client_against_a_server_in_another_venv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    # Built from a copy: the build leaves directories beside the sources.
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*install, str(source)], check=True)
    listing = subprocess.run([str(python), "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    names = {p["name"].lower() for p in json.loads(listing)}
    assert not names & {"torch", "ray", "torchvision", "timm"}
    photos = write_photos(tmp_path / "photos", count=1)
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    with child(tmp_path, bundle) as server:
        command = [
            str(venv / "bin" / "edge-client"), "--camera", str(photos / "photo-0.jpg"), "--server", server.address, "--json",
            "--save-video", str(tmp_path / "annotated.jpg"),
        ]  # fmt: skip
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "HEADTAIL_CACHE": str(tmp_path / "c")},
        )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["outcomes"]["result"] == 1
    assert (tmp_path / "annotated.jpg").stat().st_size > 0
    loaded = subprocess.run(
        [str(python), "-c", "import edge_client.app, sys; print([m for m in ('torch', 'ray', 'onnx') if m in sys.modules])"],
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == "[]"
    record_property("peak_memory_mib", round(summary["peak_memory_bytes"] / 2**20))
    with capsys.disabled():
        sys.stdout.write(
            f"\npeak memory of the client: {summary['peak_memory_bytes'] / 2**20:.0f} MiB; {', '.join(sorted(names))}\n"
        )
    assert summary["peak_memory_bytes"] < MAX_MEMORY_BYTES
