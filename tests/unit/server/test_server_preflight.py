"""What is wrong with an address, a key, a token file or a core is known before a bundle is touched."""

import os
from pathlib import Path

import pytest

from edge_server import preflight
from edge_server.access.auth import Tokens, parse_tokens
from edge_server.config import SecurityConfig, ServerConfig
from edge_server.files import read_small
from edge_server.machine import check_cpus, check_device, check_threads
from protos.errors import ConfigError

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        "cam tök-en-of-sixteen-or-more",
        f"cam {TOKEN}\x00",
        f"cam {TOKEN}\x1b[31m",
        f"ca\x07m {TOKEN}",
        f"cam {TOKEN}\x85# rest",
        f"cam\u2028{TOKEN}",
        f"cam {TOKEN}\none-more {TOKEN}",
    ],
)
def test_tokens_that_no_client_can_send_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="token file"):
        parse_tokens(text)


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_token(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbf# devices\r\n\r\ncam " + TOKEN.encode() + b"\r\n")
    assert Tokens(SecurityConfig(token_file=tmp_path / "t")).client(f"Bearer {TOKEN}").name == "cam"


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "/nonexistent"])
def test_a_device_or_directory_in_place_of_a_file_is_an_error_and_no_hang(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the token file|holds no token"):
        Tokens(SecurityConfig(token_file=Path(path)))


def test_files_are_read_with_a_bound(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 11)
    assert read_small(tmp_path / "f", "file", most_bytes=11) == b"x" * 11
    with pytest.raises(ConfigError, match="larger than 10"):
        read_small(tmp_path / "f", "file", most_bytes=10)


def test_cores_that_are_not_there_are_named() -> None:
    check_cpus(())
    with pytest.raises(ConfigError, match="no core 4095; it has"):
        check_cpus((4095,))


def test_a_core_that_the_process_is_not_pinned_to_now_may_still_be_the_tails() -> None:
    before = os.sched_getaffinity(0)
    last = max(before)
    try:
        os.sched_setaffinity(0, {last})
        check_cpus((min(before),))
        assert os.sched_getaffinity(0) == {last}, "the caller stays where it is"
    finally:
        os.sched_setaffinity(0, before)


def test_many_more_threads_than_cores_are_refused() -> None:
    check_threads(0)
    check_threads(16)
    with pytest.raises(ConfigError, match="--tail-threads 1024: this machine has"):
        check_threads(1024)


@pytest.mark.parametrize("device", ["zz", "cuda:77"])
def test_devices_that_are_not_there_are_named(device: str) -> None:
    with pytest.raises(ConfigError, match=f"--tail-device {device}"):
        check_device(device)


def test_a_port_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "port"):
        with pytest.raises(ConfigError, match="port file"):
            preflight.check(ServerConfig(models=("m",), listen="127.0.0.1:0", port_file=path))
