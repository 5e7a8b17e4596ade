"""Logs as lines and as JSON."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime

import pytest

from protos.logs import say, set_up
from tests.fakes.server_running import environment


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The root logger as pytest set it up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_hold_what_was_said() -> None:
    stream = io.StringIO()
    set_up("info", "json", stream)
    log = logging.getLogger("edge_server.session")
    log.info("session %s: %s", "a1", 'a "quoted" line\nand another', extra={"session": "a1", "odd": object})
    log.debug("not shown")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert list(first)[:4] == ["time", "level", "logger", "message"]
    assert (first["level"], first["logger"], first["session"]) == ("INFO", "edge_server.session", "a1")
    assert first["message"] == 'session a1: a "quoted" line\nand another'
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert "ValueError: why" in second["exception"]


def test_text_stays_as_it_was() -> None:
    stream = io.StringIO()
    set_up("warning", "text", stream, before="> ")
    logging.getLogger("x").warning("careful")
    say("edge-server: no", "text", stream, logger="edge_server", extra={"code": "config"})
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("> 2")
    assert lines[0].endswith("WARNING x: careful")
    assert lines[1] == "edge-server: no"


@pytest.mark.parametrize(
    ("module", "arguments", "code"),
    [
        ("edge_server.cli", ["--model", "no-such-model"], "unknown_model"),
        ("edge_client.cli", ["--camera", "nothing-there"], "source"),
        ("edge_client.cli", ["--camera", "synthetic:", "--server", "127.0.0.1:9"], "unreachable"),
    ],
)
def test_every_line_on_standard_error_is_json(module: str, arguments: list[str], code: str, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments, "--log-format", "json"], capture_output=True, text=True, timeout=60,
        env={**environment(), "HEADTAIL_CACHE": str(tmp_path)}, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert lines[-1]["code"] == code
    assert lines[-1]["exit_code"] == done.returncode > 1
    assert lines[-1]["level"] == "CRITICAL"
