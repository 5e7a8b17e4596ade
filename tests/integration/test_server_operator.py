"""Models loaded and unloaded by an operator's call, and every way to make that call without being one."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from edge_server import SecurityConfig, Server
from edge_server.access.auth import open_tokens
from edge_server.doors.operator import below
from protos.errors import BundleError, ConfigError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from splitters.bundle import open_bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, opened, picture, session
from tests.fakes.server_running import running

CAMERA, OPERATOR = "camera-token-0123456789", "operator-token-987654321"
UNAUTHENTICATED = (grpc.StatusCode.UNAUTHENTICATED, "auth")


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A models directory with two bundles, and beside it one that nobody may reach."""
    models = tmp_path / "models"
    write_tiny_bundle(models / "tiny")
    write_tiny_bundle(models / "site" / "second", name="second", seed=1)
    write_tiny_bundle(tmp_path / "outside", name="outside", seed=2)
    (models / "way-out").symlink_to(tmp_path / "outside")
    (models / "up").symlink_to(tmp_path)
    (models / "loop").symlink_to(models / "loop")
    (models / "file").write_text("no bundle")
    (tmp_path / "cameras").write_text(f"porch {CAMERA}\n")
    (tmp_path / "operators").write_text(f"anna {OPERATOR}\n")
    return tmp_path


@pytest.fixture
async def server(place: Path) -> AsyncIterator[Server]:
    security = SecurityConfig(token_file=place / "cameras", operator_token_file=place / "operators")
    async with running(place / "models" / "tiny", security=security, models_dir=place / "models", grace_s=2.0) as server:
        yield server


async def call(server: Server, name: str, token: str | None = OPERATOR, **fields: Any) -> Any:
    """The answer, or (status, code, message)."""
    async with grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        request = getattr(pb, f"{name}Request")(**fields)
        try:
            return await getattr(pb_grpc.HeadtailStub(channel), name)(request, metadata=bearer(token) if token else (), timeout=20)
        except grpc.aio.AioRpcError as error:
            return error.code(), dict(error.trailing_metadata() or ()).get("headtail-code"), error.details()


async def test_an_operator_loads_and_unloads_while_cameras_go_on(server: Server, place: Path) -> None:
    tiny = Device(open_bundle(place / "models" / "tiny"))
    async with session(server.address, tiny.bundle.sha256, bearer(CAMERA)) as stream:
        loaded = (await call(server, "LoadModel", path="site/second")).model
        assert (loaded.name, loaded.bundle_sha256) == ("second", server.models["second"])
        assert (await call(server, "LoadModel", path="site/second")).model == loaded, "a second time is as once"
        assert [m.name for m in (await call(server, "ListModels", CAMERA)).models] == ["tiny", "second"]
        second = Device(open_bundle(place / "models" / "site" / "second"))
        async with session(server.address, second.bundle.sha256, bearer(CAMERA), model="second") as other:
            assert (await other.frame(second.layers(picture(), 0))).error is None
            assert (await call(server, "UnloadModel", model="second")).sessions == 1
            assert await other.status() == (grpc.StatusCode.NOT_FOUND, "unknown_model")
        assert (await stream.frame(tiny.layers(picture(), 0))).error is None
    assert list(server.models) == ["tiny"]
    assert (await call(server, "UnloadModel", model="second"))[:2] == (grpc.StatusCode.NOT_FOUND, "unknown_model")
    assert (await call(server, "UnloadModel", model=""))[:2] == (grpc.StatusCode.NOT_FOUND, "unknown_model")
    assert (await call(server, "UnloadModel", model="tiny")).sessions == 0
    assert server.models == {}


@pytest.mark.parametrize("token", [None, CAMERA, OPERATOR[:-1], OPERATOR + "x", OPERATOR.upper()])
async def test_without_an_operators_token_nothing_is_loaded_or_unloaded(server: Server, token: str | None) -> None:
    for name, fields in (("LoadModel", {"path": "site/second"}), ("UnloadModel", {"model": "tiny"})):
        assert (await call(server, name, token, **fields))[:2] == UNAUTHENTICATED
    assert list(server.models) == ["tiny"]


async def test_an_operators_token_opens_no_camera_session(server: Server) -> None:
    async with opened(server.address, bearer(OPERATOR)) as stream:
        assert await stream.status() == UNAUTHENTICATED
    assert (await call(server, "ListModels", OPERATOR))[:2] == UNAUTHENTICATED


@pytest.mark.parametrize("with_cameras", [False, True])
async def test_a_server_without_operators_refuses_their_calls(place: Path, with_cameras: bool) -> None:
    security = SecurityConfig(token_file=place / "cameras") if with_cameras else SecurityConfig()
    async with running(place / "models" / "tiny", security=security) as server:
        for token in (None, CAMERA, OPERATOR):
            refused = await call(server, "LoadModel", token, path="site/second")
            assert refused[:2] == UNAUTHENTICATED
            assert "--operator-token-file" in refused[2]
        assert list(server.models) == ["tiny"]


async def test_where_cameras_need_no_token_operators_still_do(place: Path) -> None:
    security = SecurityConfig(operator_token_file=place / "operators")
    async with running(place / "models" / "tiny", security=security) as server:
        assert [m.name for m in (await call(server, "ListModels", None)).models] == ["tiny"]
        assert (await call(server, "UnloadModel", None, model="tiny"))[:2] == UNAUTHENTICATED
        refused = await call(server, "LoadModel", path="tiny")
        assert refused[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "config")
        assert "--models-dir" in refused[2]
        assert (await call(server, "UnloadModel", model="tiny")).sessions == 0


HOSTILE = [
    "", ".", "/", "..", "../outside", "site/../../outside", "./../outside", "/etc", "way-out", "up/outside", "loop", "loop/x",
    "site\\second", "a\x00b", "a\nb", "\u202eevil", "x" * 5000, "/".join("x" * 200), "file/..", "~", "//tiny",
]  # fmt: skip


@pytest.mark.parametrize("path", HOSTILE)
async def test_a_path_leads_nowhere_but_below_the_models_directory(server: Server, place: Path, path: str) -> None:
    status, code, details = await call(server, "LoadModel", path=path)
    assert (status, code) in {(grpc.StatusCode.INVALID_ARGUMENT, "config"), (grpc.StatusCode.DATA_LOSS, "bundle")}
    assert str(place) not in details, "the server's own paths are not told"
    assert list(server.models) == ["tiny"]


async def test_what_is_no_bundle_or_a_default_s_name_is_not_loaded(server: Server, place: Path) -> None:
    (place / "models" / "empty").mkdir()
    for path in ("nothing", "file", "empty", "site", "detector", "efficientnet-lite0"):
        assert (await call(server, "LoadModel", path=path))[:2] == (grpc.StatusCode.DATA_LOSS, "bundle"), path
    (place / "models" / "site" / "second" / "server" / "tail.onnx").write_bytes(b"altered")
    assert (await call(server, "LoadModel", path="site/second"))[:2] == (grpc.StatusCode.DATA_LOSS, "bundle")
    assert list(server.models) == ["tiny"]


async def test_bytes_that_are_no_message_are_a_mapped_error(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        for name in ("LoadModel", "UnloadModel"):
            raw = channel.unary_unary(f"/headtail.v1.Headtail/{name}")
            for data, metadata, code in (
                (b"\xff" * 9, bearer(OPERATOR), grpc.StatusCode.INVALID_ARGUMENT),
                (b"\x0a\x02\xff\xfe", bearer(OPERATOR), grpc.StatusCode.INVALID_ARGUMENT),
                (b"\x12\x00" * 5000, bearer(OPERATOR), grpc.StatusCode.RESOURCE_EXHAUSTED),
                (b"\xff" * 9, bearer(CAMERA), grpc.StatusCode.UNAUTHENTICATED),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await raw(data, metadata=metadata, timeout=20)
                assert caught.value.code() == code, (name, data[:4])
    assert list(server.models) == ["tiny"]


def test_a_token_in_both_files_is_refused(place: Path) -> None:
    (place / "operators").write_text(f"anna {CAMERA}\n")
    with pytest.raises(ConfigError, match="operators need tokens of their own"):
        open_tokens(SecurityConfig(token_file=place / "cameras", operator_token_file=place / "operators"))
    (place / "operators").write_text("\n")
    with pytest.raises(ConfigError, match="the operator token file holds no token"):
        open_tokens(SecurityConfig(operator_token_file=place / "operators"))


def test_a_path_below_is_found_through_links_that_stay_below(place: Path) -> None:
    models = place / "models"
    (models / "current").symlink_to("site/second")
    assert below(models, "current") == below(models, "site/second") == (models / "site" / "second").resolve()
    with pytest.raises(BundleError, match="no bundle lies at 'site/third'"):
        below(models, "site/third")
    with pytest.raises(ConfigError, match="without --models-dir"):
        below(None, "tiny")
