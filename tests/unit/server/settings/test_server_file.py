"""``edge-server --config``: what may stand in the file, and in which sentence the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_server.cli import build_parser, config_from, with_file
from edge_server.config import ServerConfig
from protos.errors import ConfigError


def read(tmp_path: Path, text: str, *arguments: str) -> ServerConfig:
    path = tmp_path / "server.toml"
    path.write_text(text)
    argv = ["--config", str(path), *arguments]
    return config_from(with_file(build_parser().parse_args(argv), argv))


def test_the_file_says_what_the_options_say(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        'listen = "127.0.0.1:1"\nmodel = ["a", "b"]\nmax-sessions = 7\nmax_batch_delay_ms = 2\nno_quic = true\n'
        'tls_cert = "c"\ntls_key = "k"\n',
    )
    assert (config.listen, config.models, config.limits.max_sessions) == ("127.0.0.1:1", ("a", "b"), 7)
    assert (config.batch.max_delay_ns, config.quic) == (2_000_000, False)
    assert config.security.tls_cert == Path("c")
    assert read(tmp_path, 'model = "one"').models == ("one",)


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    config = read(tmp_path, 'model = ["a", "b"]\nmax_sessions = 7\n', "--model", "c", "--max-sessions", "9")
    assert (config.models, config.limits.max_sessions) == (("c",), 9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_session = 3", "unknown name 'max_session'; known are "),
        ('config = "another"', "unknown name 'config'"),
        ("[limits]\nmax_sessions = 3", "unknown name 'limits'"),
        ('max_sessions = "3"', "max_sessions must be a whole number, got '3'"),
        ("max_sessions = true", "max_sessions must be a whole number, got True"),
        ("max_sessions = 3.5", "max_sessions must be a whole number, got 3.5"),
        ("grace_s = false", "grace_s must be a number, got False"),
        ("no_quic = 1", "no_quic must be true or false, got 1"),
        ("model = [1]", "model must be a text, got [1]"),
        ("model = []", "model must be a text, got []"),
        ('log_level = "loud"', "log_level must be one of debug, info, warning, error, got 'loud'"),
        ("max_sessions = 0", "max_sessions must be 1..16777216, got 0"),
        ("grace_s = nan", "grace_s must be 0..3600, got nan"),
        ("max_sessions = 1\nmax-sessions = 2", "gives a setting twice"),
        ("max_sessions", "is not TOML"),
        ('web = "8081"', "--web must be host:port"),
        ('web = "0.0.0.0:8081"', "set HEADTAIL_WEB_TOKEN"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"\A[^\n]+\Z") as refused:
        read(tmp_path, text)
    assert said in refused.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    argv = ["--config", str(tmp_path / "none.toml")]
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read: No such file"):
        with_file(build_parser().parse_args(argv), argv)
