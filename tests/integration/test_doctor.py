"""``edge-client doctor`` with a real server, without one, and with sources that give nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.cli import main
from tests.fakes.client_process import write_clip

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))


def test_nothing_is_wrong(tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_clip(tmp_path / "clip.avi", frames=5)
    assert main(["doctor", "--camera", str(clip), "--server", server, "--json"]) == 0
    out = capsys.readouterr().out
    assert "WRONG" not in out
    found = json.loads(out.splitlines()[-1])["findings"]
    said = {f["what"]: f["said"] for f in found}
    assert "160x120" in said["camera"]
    assert "models: tiny" in said["server"]
    assert any(f["what"] == "device" and "ms here" in f["said"] for f in found)


def test_without_a_server_the_rest_is_looked_at_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = write_clip(tmp_path / "clip.avi", frames=5)
    assert main(["doctor", "--camera", str(clip), "--server", "127.0.0.1:1"]) == 7
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok    camera") for line in lines)
    assert any(line.startswith("WRONG server") for line in lines)
    assert any("is edge-server running there" in line for line in lines)


def test_an_rtsp_camera_that_does_not_answer_gets_advice_and_its_password_is_not_shown(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--camera", "rtsp://admin:hunter2@127.0.0.1:1", "--server", server]) == 3
    printed = capsys.readouterr()
    assert "WRONG camera" in printed.out
    assert "The address has no path" in printed.out
    assert "hunter2" not in printed.out + printed.err


def test_a_wrong_option_is_said() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--nonsense"])
    assert ended.value.code == 2
    assert main(["doctor", "--deadline-ms", "-1"]) == 2
