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

from protos.errors import ProtocolError
from protos.logs import say, set_up
from protos.text import printable
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
    log = logging.getLogger("edge_server.doors.session")
    log.info("session %s: %s", "a1", 'a "quoted" line\nand another', extra={"session": "a1", "odd": object})
    log.debug("not shown")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert list(first)[:4] == ["time", "level", "logger", "message"]
    assert (first["level"], first["logger"], first["session"]) == ("INFO", "edge_server.doors.session", "a1")
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


EVIL = "\x1b]0;owned\x07\x1b[2J\r\n2026-01-01 00:00:00,000 CRITICAL forged: line \x9b31m \u202egnp.exe \u2028 \udce9 \U000e0041"


@pytest.mark.parametrize("form", ["text", "json"])
def test_text_of_a_peer_cannot_command_the_terminal_or_forge_a_line(form: str) -> None:
    stream = io.StringIO()
    set_up("info", form, stream)
    log = logging.getLogger("x")
    log.warning("the server says %s", EVIL, extra={"model": EVIL})
    try:
        raise ProtocolError(EVIL)
    except ProtocolError:
        log.exception("it failed: %s", EVIL)
    try:
        raise ValueError(EVIL)
    except ValueError:
        log.exception("it failed")
    say(f"edge-client: {EVIL}", form, stream, logger="x", extra={"why": EVIL})
    text = stream.getvalue()
    text.encode()
    assert all(line.isprintable() for line in text.split("\n"))
    assert not any(line.startswith("2026-01-01") for line in text.split("\n"))
    if form == "json":
        assert json.loads(text.splitlines()[0])["model"] == EVIL


def test_an_error_is_one_printable_line_of_bounded_length() -> None:
    error = ProtocolError(EVIL + "m" * 100_000)
    assert str(error) == error.message
    assert error.message.isprintable()
    assert len(error.message) < 3000


def test_text_that_is_harmless_stays_as_it_is() -> None:
    for text in ("", "person", "日本　語", "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627", "naïve café — ½"):
        assert printable(text) == text
    assert printable("a\r\n\tb\x00") == "a b\\x00"


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
