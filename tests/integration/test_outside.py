"""The seam holds: a package outside of the tree adds a task, a policy, a transport, a sink and a backend, and all of them run
through a real client and a real server, without a line of ours changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import cv2
import pytest

from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import run_client, write_clip
from tests.fakes.server_running import child, environment

OUTSIDE = Path(__file__).parents[1] / "outside"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the package visible to child processes as an installer would: its modules, and its metadata beside them."""
    project = tomllib.loads((OUTSIDE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = tmp_path / "site"
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (site / "headtail_outside").symlink_to(OUTSIDE / "headtail_outside")
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    groups = (
        f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in points.items()) for group, points in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))


@pytest.mark.usefixtures("installed")
def test_task_policy_transport_sink_and_backend_of_another_package(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", task="brightest", postprocess={}, local=False)
    clip, drawn, tally = write_clip(tmp_path / "clip.avi"), tmp_path / "drawn", tmp_path / "tally.txt"
    with child(tmp_path, bundle.path, arguments=["--backend", "inline"]) as server:
        done = run_client(
            tmp_path, "--camera", str(clip), "--realtime", "--server", server.address, "--deadline-ms", "60000", "--json",
            "--change-gate", "off", "--frames", "12", "--policy", "smallest", "--transport", "unary",
            "--sink", f"tally={tally}", "--save-video", str(drawn),
        )  # fmt: skip
        assert server.stop() == 0
    assert done.code == 0, done.err
    assert sum(done.summary["outcomes"].values()) == done.summary["frames"] == len(done.lines)
    answered = [line for line in done.lines if line["outcome"] == "result"]
    assert answered, done.lines
    for line in answered:
        assert line["operating_point"] == 1  # the policy's: ours would choose the more accurate one, 0
        assert line["latency_ms"]["tail"] == pytest.approx(7.654)  # the backend's own figure
        assert line["brightest"]["label"] == f"class {line['brightest']['index']}"  # the task's
    words = dict(line.split(" ", 1) for line in tally.read_text(encoding="utf-8").splitlines())
    assert len(words) == len(done.lines)
    for line in answered:
        assert words[str(line["frame"])] == f"result {line['brightest']['label']}"
    pictures = list(drawn.iterdir())
    assert pictures
    assert all(cv2.imread(str(p)) is not None for p in pictures)


@pytest.mark.usefixtures("installed")
def test_the_policy_of_another_package_runs_in_the_testbed() -> None:
    line = [
        sys.executable,
        "-c",
        "import sys; from deploy.testbed.cli import main; sys.exit(main())",
        "run",
        "lossy",
        "--policy",
        "smallest",
        "--duration-s",
        "5",
        "--json",
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=400, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["policy"], told["outcomes"]["result"] > 0) == ("smallest", True)


@pytest.mark.usefixtures("installed")
def test_without_the_package_each_end_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", task="brightest", postprocess={}, local=False)
    with child(tmp_path, bundle.path) as server:
        monkeypatch.delenv("PYTHONPATH")
        done = run_client(tmp_path, "--camera", str(write_clip(tmp_path / "clip.avi")), "--server", server.address)
    assert done.code == 4
    assert "task 'brightest' is unknown; there are classification, " in done.err
    for option, text in (("--policy", "policy 'smallest' is unknown"), ("--transport", "transport 'unary' is unknown")):
        name = text.split("'")[1]
        other = write_tiny_bundle(tmp_path / f"plain{name}")
        with child(tmp_path, other.path) as server:
            clip = str(tmp_path / "clip.avi")
            done = run_client(tmp_path, "--camera", clip, "--realtime", "--server", server.address, option, name, "--frames", "2")
        assert done.code == 2
        assert text in done.err
