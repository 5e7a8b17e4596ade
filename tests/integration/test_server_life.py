"""How a server begins and ends: in every state it ends soon, and what is wrong outside of bundles is said before they load."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edge_server import preflight
from edge_server.backends.embedded import EmbeddedBackend
from edge_server.config import SecurityConfig, ServerConfig, TailConfig
from edge_server.process import serve
from protos.errors import ConfigError, InternalError
from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child, command, environment, running

ENDED_S = 30.0  # a wedged one takes minutes; a loaded machine must not look like that


def refused(*arguments: str) -> tuple[int, str]:
    """Of a model whose export nobody would wait for; its name is not even looked up."""
    line = command("--model", "no-such-model", *arguments)
    done = subprocess.run(line, capture_output=True, text=True, timeout=180, env=environment(), check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_what_is_wrong_outside_of_bundles_is_said_before_any_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("cam short\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for arguments, said in (
            (["--listen", address], "in use"),
            (["--listen", "127.0.0.1:0", "--token-file", str(tmp_path / "tokens")], "line 1 of the token file"),
            (["--listen", "127.0.0.1:0", "--tail-cpus", "4000"], "no core 4000"),
            (["--listen", "127.0.0.1:0", "--tail-device", "zz"], "--tail-device zz"),
        ):
            code, text = refused(*arguments)
            assert (code, said in text) == (2, True), text


def test_a_second_server_that_fails_leaves_the_port_file_of_the_first_alone(bundle: Bundle, tmp_path: Path) -> None:
    with child(tmp_path, bundle.path) as server:
        [port_file] = tmp_path.glob("port-*.txt")
        code, text = refused("--listen", server.address, "--port-file", str(port_file))
        assert (code, "in use" in text) == (2, True), text
        assert port_file.read_text().strip() == server.address
        port_file.write_text("127.0.0.1:9\n")  # as another server with the same option would
        assert server.stop() == 0
        assert port_file.read_text() == "127.0.0.1:9\n"


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        preflight.check_address(ServerConfig(models=("m",), listen="192.0.2.1:0"))


def test_an_address_in_use_is_an_error_unless_it_is_shared() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as first:
        address = f"127.0.0.1:{first.getsockname()[1]}"
        with pytest.raises(ConfigError, match="in use"):
            preflight.check_address(ServerConfig(models=("m",), listen=address))
        preflight.check_address(ServerConfig(models=("m",), listen=address, reuse_port=True))


def test_a_key_of_another_certificate_or_with_a_password_is_told(tmp_path: Path) -> None:
    def made(name: str, *more: str) -> tuple[Path, Path]:
        key, cert = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=x", "-keyout", str(key), "-out", str(cert), *more]
        subprocess.run(line, check=True, capture_output=True, timeout=180)
        return cert, key

    try:
        (cert, key), (_, other), (locked, its_key) = made("a", "-nodes"), made("b", "-nodes"), made("c", "-passout", "pass:secret")
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    preflight.check_certificates(SecurityConfig(tls_cert=cert, tls_key=key))
    with pytest.raises(ConfigError, match="do not match"):
        preflight.check_certificates(SecurityConfig(tls_cert=cert, tls_key=other))
    with pytest.raises(ConfigError, match="password"):
        preflight.check_certificates(SecurityConfig(tls_cert=locked, tls_key=its_key))


# ------------------------------------------------------------------------------------------------ the end

SLOW = """
import sys, threading, time
from splitters.runtime.tail import Tail
import edge_server.models, edge_server.cli
def for_ever(*_):
    print("AT IT", file=sys.stderr, flush=True)
    threading.Event().wait()
{what} = for_ever
sys.argv[0] = "edge-server"
sys.exit(edge_server.cli.main())
"""


@contextlib.contextmanager
def stuck(what: str, bundle: Bundle, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A real server of which one function does not return, once it has got there."""
    line = command("--listen", "127.0.0.1:0", "--model", str(bundle.path), "--grace-s", "0.5", "--tail-threads", "1")
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([line[0], "-c", SLOW.format(what=what), *line[3:]], stderr=stderr, text=True, env=environment())
    try:
        until = time.monotonic() + 120
        while "AT IT" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("what", ["edge_server.models.open_model", "Tail.run"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_soon_whatever_it_is_at(what: str, number: signal.Signals, bundle: Bundle, tmp_path: Path) -> None:
    """While bundles are read, while a tail is loaded: none of them is waited for."""
    with stuck(what, bundle, tmp_path) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert process.poll() is None, "a reload that is asked for meanwhile is not fatal"
        process.send_signal(number)
        assert process.wait(ENDED_S) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_reload_asked_for_at_any_moment_of_the_start_is_not_fatal(bundle: Bundle, tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    line = command("--listen", "127.0.0.1:0", "--model", str(bundle.path), "--port-file", str(port_file), "--tail-threads", "1")
    line[2] = "edge_server"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(line, stderr=log, env=environment())
    try:
        # Python itself must have begun to run the program: before that no program can catch anything.
        until = time.monotonic() + 120
        while not _ignored(process.pid, signal.SIGHUP):
            assert time.monotonic() < until
            time.sleep(0.001)
        while not port_file.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            process.send_signal(signal.SIGHUP)
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(ENDED_S) == 0
    finally:
        process.kill()
        process.wait(10)


def _ignored(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigIgn:", "SigCgt:"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


# ------------------------------------------------------------------------------------------------ a part that dies


async def test_a_tail_thread_that_dies_ends_the_server_with_a_message(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(bundle)
    port_file = tmp_path / "port"
    config = ServerConfig(
        models=(str(bundle.path),), listen="127.0.0.1:0", tail=TailConfig(threads=1), grace_s=5, port_file=port_file
    )
    serving = asyncio.create_task(serve(config))
    async with asyncio.timeout(60):
        while not port_file.exists():
            await asyncio.sleep(0.01)
        address = port_file.read_text().strip()
        async with session(address, bundle.sha256) as stream, grpc.aio.insecure_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

            def dies(*_: Any) -> None:
                raise MemoryError("as if")

            monkeypatch.setattr(EmbeddedBackend, "_remember", dies)
            result = await stream.frame(device.layers(picture(), 0))
            assert result.error is not None
            assert result.error.message.startswith("the peer failed: the tail's thread has ended")
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(InternalError, match=r"the tail's thread has died \(MemoryError: as if\)"):
            await serving
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    assert all(t.finished.is_set() for t in timers), "nothing is left that ends the process"


async def test_one_bad_bundle_does_not_keep_a_server_from_starting(bundle: Bundle, tmp_path: Path) -> None:
    bad = write_tiny_bundle(tmp_path / "bad", name="bad")
    (bad.path / "server" / "tail.onnx").write_bytes(b"x")
    async with running(bad.path, bundle.path) as server, session(server.address, bundle.sha256) as stream:
        assert stream.welcome is not None
        assert stream.welcome.model == bundle.manifest.name
