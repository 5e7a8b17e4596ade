"""A text file that an editor on Windows wrote begins with a byte order mark, which is no part of it."""

from __future__ import annotations

from pathlib import Path

from deploy.testbed.link.trace import load_trace
from deploy.testbed.scenario import load_scenario
from edge_client.config import read_settings
from edge_server.access.auth import Tokens
from edge_server.config import SecurityConfig
from splitters.commands.common.serving_arguments import read_labels

MARK = b"\xef\xbb\xbf"


def marked(path: Path, text: str) -> Path:
    path.write_bytes(MARK + text.encode())
    return path


def test_tokens(tmp_path: Path) -> None:
    file = marked(tmp_path / "tokens", "alice alice-token-0123456789\r\n")
    assert Tokens(SecurityConfig(token_file=file)).client("Bearer alice-token-0123456789").name == "alice"


def test_settings_of_a_camera(tmp_path: Path) -> None:
    assert read_settings(marked(tmp_path / "camera.toml", 'camera = "0"\r\n'))[1] == {"camera": "0"}


def test_labels(tmp_path: Path) -> None:
    assert read_labels(marked(tmp_path / "labels.txt", "person\r\nbicycle\r\n")) == {0: "person", 1: "bicycle"}
    assert read_labels(marked(tmp_path / "labels.json", '["person", "bicycle"]')) == {0: "person", 1: "bicycle"}


def test_scenarios_and_traces(tmp_path: Path) -> None:
    assert load_scenario(marked(tmp_path / "short.toml", "duration_s = 3.0\n")).duration_s == 3.0
    rows = "0 1000000\n1 2000000\n2 1000000\n"
    (tmp_path / "plain").write_text(rows)
    one, other = load_trace(marked(tmp_path / "marked", rows)), load_trace(tmp_path / "plain")
    assert (one.mean_bps(), one.period_ns) == (other.mean_bps(), other.period_ns)
