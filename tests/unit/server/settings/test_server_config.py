"""Settings are checked once, before anything is loaded."""

from pathlib import Path

import pytest

from edge_server.cli import build_parser, config_from
from edge_server.config import BatchConfig, Limits, RayConfig, SecurityConfig, ServerConfig, TailConfig, is_loopback, split_address
from edge_server.server import Server
from protos.errors import ConfigError


@pytest.mark.parametrize(("text", "wanted"), [("a:1", ("a", 1)), ("[::]:50051", ("[::]", 50051)), ("0.0.0.0:0", ("0.0.0.0", 0))])
def test_addresses(text: str, wanted: tuple[str, int]) -> None:
    assert split_address(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "host", ":1", "host:", "host:x", "host:-1", "host:65536", "127.0.0.1:٣", "\n:0", "unix:/x:0", "a b:1", "::1:5", "[::1:5"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        split_address(text)


LOCAL = ["127.0.0.1", "127.9.9.9", "localhost", "[::1]"]


@pytest.mark.parametrize(("host", "local"), [(h, True) for h in LOCAL] + [(h, False) for h in ("0.0.0.0", "[::]", "10.0.0.1")])
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_only_an_open_door_without_lock_is_exposed(tmp_path) -> None:
    def exposed(listen: str, **security: object) -> bool:
        return ServerConfig(models=("m",), listen=listen, security=SecurityConfig(**security)).exposed

    assert exposed("0.0.0.0:1")
    assert not exposed("127.0.0.1:1")
    assert not exposed("0.0.0.0:1", token_file=tmp_path / "t")
    assert not exposed("0.0.0.0:1", tls_cert=tmp_path / "c", tls_key=tmp_path / "k")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Limits(max_payload_bytes=10),
        lambda: Limits(max_payload_bytes=1 << 30),
        lambda: Limits(max_frame_bytes=1024),
        lambda: Limits(max_sessions=0),
        lambda: Limits(hello_s=0),
        lambda: BatchConfig(max_batch=0),
        lambda: BatchConfig(max_delay_ns=2_000_000_000),
        lambda: BatchConfig(margin_ns=-1),
        lambda: TailConfig(threads=-1),
        lambda: TailConfig(decode_threads=0),
        lambda: RayConfig(replicas=(0, 1)),
        lambda: RayConfig(replicas=(3, 2)),
        lambda: RayConfig(gpus_per_replica=-1),
        lambda: SecurityConfig(tls_cert="x"),
        lambda: SecurityConfig(tls_client_ca="x"),
        lambda: SecurityConfig(frames_per_s_per_token=1),
        lambda: ServerConfig(models=("m",), models_dir=Path("bundles")),
        lambda: ServerConfig(models=("m",), grace_s=-1),
        lambda: ServerConfig(models=("m",), metrics_port=70000),
        lambda: ServerConfig(models=("m", "")),
        lambda: ServerConfig(models=("m",), parent_pid=0),
        lambda: ServerConfig(models=("m",), parent_pid=10**20),
        lambda: Limits(max_sessions=10**20),
        lambda: Limits(max_connections=True),
        lambda: Limits(keepalive_s=float("inf")),
        lambda: TailConfig(cpus=(-1,)),
        lambda: TailConfig(cpus=(10**20,)),
        lambda: RayConfig(cpus_per_replica=float("nan")),
    ],
)
def test_values_out_of_range_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, "5"])
@pytest.mark.parametrize("name", ["max_sessions_per_token", "frames_per_s_per_token", "bytes_per_s_per_token"])
def test_quotas_are_numbers_from_0_on(name: str, number: object, tmp_path) -> None:
    with pytest.raises(ConfigError, match=name):
        SecurityConfig(token_file=tmp_path / "t", **{name: number})


@pytest.mark.parametrize("option", ["--grace-s", "--max-batch-delay-ms", "--max-payload-mib", "--frames-per-s-per-token"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "-1"])
def test_options_that_are_no_usable_number_are_refused(option: str, number: str) -> None:
    with pytest.raises(ConfigError):
        config_from(build_parser().parse_args(["--token-file", "t", f"{option}={number}"]))


async def test_an_unknown_backend_is_refused_before_anything_is_opened() -> None:
    server = Server(ServerConfig(models=("no such model",), backend="magic"))
    with pytest.raises(ConfigError, match="backend 'magic' is unknown; there are embedded, ray"):
        await server.open()
