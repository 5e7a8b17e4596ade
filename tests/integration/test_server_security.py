"""TLS, client certificates, tokens and quotas on a real server."""

import asyncio
import contextlib
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from edge_client.bundles.fetch import list_models
from edge_client.transport.rpc import Endpoint
from edge_server.config import Limits, SecurityConfig
from edge_server.server import Server
from protos.errors import ConfigError, HeadtailError, LimitError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.headtail.v1 import open_inference_pb2 as oip
from protos.headtail.v1 import open_inference_pb2_grpc as oip_grpc
from protos.messages import PROTOCOL_VERSION
from splitters.bundle import Bundle
from tests.fakes.server_client import Device, hello, opened, picture, session
from tests.fakes.server_running import running

ALICE, BOB = "alice-token-0123456789", "bob-token-9876543210xx"
OIP_INFER = "/inference.GRPCInferenceService/ModelInfer"
UNAUTHENTICATED = (grpc.StatusCode.UNAUTHENTICATED, "auth")


def bearer(token: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture(scope="module")
def device(bundle: Bundle) -> Device:
    return Device(bundle)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# cameras\nalice {ALICE}\n\nbob {BOB}\n")
    return path


@pytest.mark.parametrize(
    "metadata", [(), bearer("wrong-token-000000000"), bearer(""), bearer(ALICE[:-1]), (("authorization", f"Basic {ALICE}"),)]
)
async def test_without_a_valid_token_only_health_answers(bundle: Bundle, token_file: Path, metadata: tuple) -> None:
    async with running(bundle.path, security=SecurityConfig(token_file=token_file)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = pb_grpc.HeadtailStub(channel)
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            calls = [
                stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
                stub.Infer(pb.InferRequest(), metadata=metadata),
                stub.FetchBundle(pb.FetchBundleRequest(), metadata=metadata).read(),
                reflection.ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
                ).read(),
            ]
            for call in calls:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert (caught.value.code(), dict(caught.value.trailing_metadata())["headtail-code"]) == UNAUTHENTICATED
        async with opened(server.address, metadata) as stream:
            assert await stream.status() == UNAUTHENTICATED


async def test_a_token_opens_the_door_and_a_changed_file_is_read_again(
    bundle: Bundle, device: Device, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "edge_server")
    async with running(bundle.path, security=SecurityConfig(token_file=token_file)) as server:
        async with session(server.address, bundle.sha256, bearer(ALICE)) as stream:
            assert (await stream.frame(device.layers(picture(), 0))).error is None
        token_file.write_text("not a token file")
        await asyncio.sleep(1.3)
        async with session(server.address, bundle.sha256, bearer(ALICE)):
            pass  # a broken file changes nothing
        token_file.write_text("carol carol-token-55555555\n")
        await asyncio.sleep(1.8)
        async with opened(server.address, bearer(ALICE)) as stream:
            assert await stream.status() == UNAUTHENTICATED
        async with session(server.address, bundle.sha256, bearer("carol-token-55555555")):
            pass
    assert ALICE not in caplog.text
    assert "carol-token" not in caplog.text


async def test_removing_a_token_ends_its_sessions_and_says_why(bundle: Bundle, device: Device, token_file: Path) -> None:
    async with (
        running(bundle.path, security=SecurityConfig(token_file=token_file), metrics_port=0) as server,
        session(server.address, bundle.sha256, bearer(ALICE)) as hers,
        session(server.address, bundle.sha256, bearer(BOB)) as his,
    ):
        token_file.write_text(f"bob {BOB}\n")
        begun = time.monotonic()
        assert await hers.status() == UNAUTHENTICATED
        assert time.monotonic() - begun < 30
        assert "withdrawn" in (await hers.call.details())
        assert (await his.frame(device.layers(picture(), 0))).error is None
        async with opened(server.address, bearer(ALICE)) as again:
            assert await again.status() == UNAUTHENTICATED
        assert await refused(server, "auth") == 2


async def refused(server: Server, code: str) -> float:
    """What the metric of refused calls says."""
    text = await asyncio.to_thread(
        lambda: urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60).read().decode()
    )
    line = next((each for each in text.splitlines() if each.startswith(f'headtail_refused_calls_total{{code="{code}"}}')), "x 0")
    return float(line.rpartition(" ")[2])


async def test_calls_the_door_turns_away_are_counted(bundle: Bundle, token_file: Path) -> None:
    async with (
        running(bundle.path, security=SecurityConfig(token_file=token_file), metrics_port=0) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.HeadtailStub(channel)
        for call in (stub.ListModels(pb.ListModelsRequest()), stub.Infer(pb.InferRequest(), metadata=bearer("x" * 20))):
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        async with opened(server.address) as stream:
            assert await stream.status() == UNAUTHENTICATED
        assert await refused(server, "auth") == 3
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Infer(pb.InferRequest(protocol_version=77), metadata=bearer(ALICE))
        assert await refused(server, "version_mismatch") == 1


async def half_sent(channel: grpc.aio.Channel, path: str, token: str | None = None) -> grpc.aio.StreamStreamCall:
    """A call whose request never ends: headers on the wire, no message."""
    call = channel.stream_stream(path)(metadata=bearer(token) if token else ())
    await call.wait_for_connection()
    return call


async def test_one_clients_half_sent_unary_calls_are_counted_and_timed(bundle: Bundle, device: Device, token_file: Path) -> None:
    limits = Limits(max_unary_in_flight=3, hello_s=1.5)
    request = pb.InferRequest(protocol_version=PROTOCOL_VERSION, bundle_sha256=bundle.sha256, layers=device.layers(picture(), 0))
    async with (
        running(bundle.path, security=SecurityConfig(token_file=token_file), limits=limits) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.HeadtailStub(channel)
        calls = [await half_sent(channel, path, ALICE) for path in ("/headtail.v1.Headtail/Infer", OIP_INFER, OIP_INFER)]
        await asyncio.sleep(0.2)
        for full in (
            stub.Infer(request, metadata=bearer(ALICE)),
            channel.unary_unary(OIP_INFER)(b"", metadata=bearer(ALICE)),
            stub.ListModels(pb.ListModelsRequest(), metadata=bearer(ALICE)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await full
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "unary" in (caught.value.details() or "")
        await stub.Infer(request, metadata=bearer(BOB))  # the others do not feel it
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "1.5 s" in (caught.value.details() or "")
        await stub.Infer(request, metadata=bearer(ALICE))


async def test_a_batch_counts_frame_by_frame(bundle: Bundle) -> None:
    tensor = oip.ModelInferRequest.InferInputTensor
    async with (
        running(bundle.path, limits=Limits(max_unary_in_flight=4)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for count, fits in ((4, True), (5, False), (4, True)):
            pixels = np.zeros((count, 32, 32, 3), np.uint8)
            request = oip.ModelInferRequest(
                model_name="tiny", inputs=[tensor(name="image", datatype="UINT8", shape=pixels.shape)],
                raw_input_contents=[pixels.tobytes()],
            )  # fmt: skip
            call = oip_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
            if fits:
                await call
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert (caught.value.code(), dict(caught.value.trailing_metadata())["headtail-code"]) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "limit",
            )


async def test_health_watches_without_a_token_crowd_nobody_out(bundle: Bundle, device: Device, token_file: Path) -> None:
    limits = Limits(max_health_calls=8, max_sessions=4, max_calls=4, hello_s=1.0)
    async with (
        running(bundle.path, security=SecurityConfig(token_file=token_file), limits=limits) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(40)]
        half = [await half_sent(channel, "/grpc.health.v1.Health/Check") for _ in range(20)]
        await asyncio.sleep(0.5)
        async with session(server.address, bundle.sha256, bearer(ALICE)) as stream:
            assert (await stream.frame(device.layers(picture(), 0))).error is None
        for call in half:
            with pytest.raises(grpc.aio.AioRpcError):
                await call.read()
        answered = 0  # which of them come first is chance
        for watch in watches:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await watch.read()
                answered += 1
        assert answered <= 8
        for watch in watches:
            watch.cancel()
        async with asyncio.timeout(60):
            while server.gate.health_calls:
                await asyncio.sleep(0.05)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_compressed_message_is_measured_before_it_is_unpacked(bundle: Bundle) -> None:
    """200 MiB of zeros travel as 200 kB; the server must not unfold them."""
    psutil = pytest.importorskip("psutil")
    async with (
        running(bundle.path) as server,
        grpc.aio.insecure_channel(
            server.address, options=[("grpc.max_send_message_length", -1)], compression=grpc.Compression.Gzip
        ) as channel,
    ):
        zeros = bytes(200 << 20)
        before = psutil.Process().memory_info().rss
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/headtail.v1.Headtail/Infer")(zeros)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # The client, in this process too, holds a second copy while it compresses; a third would be the server's.
        assert psutil.Process().memory_info().rss - before < 300 << 20


async def test_a_quota_of_frames_holds_for_all_who_share_the_token(bundle: Bundle, device: Device, token_file: Path) -> None:
    security = SecurityConfig(token_file=token_file, frames_per_s_per_token=40)
    layers = device.layers(picture(), 0)

    async def camera(address: str, token: str, until: float) -> list[bool]:
        answers = []
        async with session(address, bundle.sha256, bearer(token)) as stream:
            frame_id = 0
            while time.monotonic() < until:
                message = pb.FrameLayer.FromString(layers[0].SerializeToString())
                message.frame_id = frame_id
                result = await stream.frame([message])
                assert result.error is None or (isinstance(result.error, LimitError) and result.error.retryable)
                answers.append(result.error is None)
                frame_id += 1
                await asyncio.sleep(0.05)
        return answers

    async with running(bundle.path, security=security) as server:
        begun = time.monotonic()
        shared = [camera(server.address, ALICE, begun + 2.0) for _ in range(50)]
        *many, alone = await asyncio.gather(*shared, camera(server.address, BOB, begun + 2.0))
        took_s = time.monotonic() - begun
    answered, asked = sum(map(sum, many)), sum(map(len, many))
    assert asked > 80
    assert 40 <= answered <= 40 * (took_s + 1) + 1
    assert all(alone)  # bob is not held up by what alice's cameras do


async def test_a_quota_of_sessions_and_bytes(bundle: Bundle, device: Device, token_file: Path) -> None:
    security = SecurityConfig(token_file=token_file, max_sessions_per_token=1, bytes_per_s_per_token=600)
    async with running(bundle.path, security=security) as server:
        async with session(server.address, bundle.sha256, bearer(ALICE)) as stream:
            async with opened(server.address, bearer(ALICE)) as second:
                with contextlib.suppress(grpc.aio.AioRpcError):  # it may be turned away before it has spoken
                    await second.send(hello=hello(bundle.sha256))
                assert await second.status() == (grpc.StatusCode.RESOURCE_EXHAUSTED, "limit")
            async with session(server.address, bundle.sha256, bearer(BOB)):
                pass
            results = [await stream.frame(device.layers(picture(), i)) for i in range(8)]
            assert sum(r.error is None for r in results) in (2, 3)
            assert {type(r.error) for r in results if r.error} == {LimitError}
        await asyncio.sleep(0.1)
        async with session(server.address, bundle.sha256, bearer(ALICE)):
            pass


@pytest.mark.parametrize("text", ["", "# nothing\n", "alice\n", "alice short\n", f"a {ALICE}\na {BOB}\n"])
async def test_a_useless_token_file_is_refused_at_the_start(bundle: Bundle, tmp_path: Path, text: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ConfigError, match="token file"):
        async with running(bundle.path, security=SecurityConfig(token_file=tmp_path / "tokens")):
            pass


# ---------------------------------------------------------------- certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca, server and client (signed by it), and a stranger signed by no one we know."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    root = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=root, check=True, capture_output=True)

    for name in ("ca", "stranger"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")  # fmt: skip
    (root / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key",
                "-out", f"{name}.csr", "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-extfile", "san", "-out", f"{name}.pem")  # fmt: skip
    return root


def channel_to(address: str, root: Path, client: str | None) -> grpc.aio.Channel:
    def pem(name: str) -> bytes:
        return (root / name).read_bytes()

    key, cert = (pem(f"{client}.key"), pem(f"{client}.pem")) if client else (None, None)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(pem("ca.pem"), key, cert))


async def models(channel: grpc.aio.Channel) -> int:
    return len((await pb_grpc.HeadtailStub(channel).ListModels(pb.ListModelsRequest(), timeout=60)).models)


async def test_tls_serves_those_who_know_the_authority_and_no_plain_text(bundle: Bundle, certificates: Path) -> None:
    security = SecurityConfig(tls_cert=certificates / "server.pem", tls_key=certificates / "server.key")
    async with running(bundle.path, security=security) as server:
        async with channel_to(server.address, certificates, None) as channel:
            assert await models(channel) == 1
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await models(channel)


async def test_mutual_tls_asks_for_a_certificate_of_the_authority(bundle: Bundle, certificates: Path) -> None:
    security = SecurityConfig(
        tls_cert=certificates / "server.pem", tls_key=certificates / "server.key", tls_client_ca=certificates / "ca.pem"
    )
    async with running(bundle.path, security=security) as server:
        async with channel_to(server.address, certificates, "client") as channel:
            assert await models(channel) == 1
        for nobody in (None, "stranger"):
            async with channel_to(server.address, certificates, nobody) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await models(channel)


async def test_certificates_that_cannot_be_used_are_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no pem")
    for cert in (tmp_path / "absent.pem", tmp_path / "x.pem"):
        with pytest.raises(ConfigError, match=cert.name):
            async with running(bundle.path, security=SecurityConfig(tls_cert=cert, tls_key=cert)):
                pass


# ---------------------------------------------------------------- what the device says about it


async def complaint(address: str, root: Path | None = None, **settings: object) -> str:
    """What `edge-client` would print instead of a list of models."""
    paths = {name: root / str(value) for name, value in settings.items() if root is not None and name.startswith("tls_")}
    try:
        await list_models(Endpoint(address=address, **{**settings, **paths}), timeout_s=10)
    except HeadtailError as error:
        return error.message
    return ""


async def test_the_client_says_what_is_wrong_with_tls(bundle: Bundle, certificates: Path, tmp_path: Path) -> None:
    root = certificates
    pair = {"tls_cert": root / "server.pem", "tls_key": root / "server.key"}
    async with running(bundle.path, security=SecurityConfig(**pair)) as server:
        assert await complaint(server.address, root, tls_ca="ca.pem") == ""
        assert "--tls-ca" in await complaint(server.address)
        assert "authority" in await complaint(server.address, tls=True)
        assert "authority" in await complaint(server.address, root, tls_ca="stranger.pem")
    async with running(bundle.path, security=SecurityConfig(**pair, tls_client_ca=root / "ca.pem")) as server:
        assert await complaint(server.address, root, tls_ca="ca.pem", tls_cert="client.pem", tls_key="client.key") == ""
        assert await complaint(server.address, root, tls_ca="ca.pem") != ""
    async with running(bundle.path) as server:
        assert "does not speak TLS" in await complaint(server.address, root, tls_ca="ca.pem")
    (root / "no.pem").write_text("nothing")
    assert "no PEM file" in await complaint("127.0.0.1:1", root, tls_ca="no.pem")
    assert "cannot read" in await complaint("127.0.0.1:1", root, tls_ca="absent.pem")
    assert "cannot be resolved" in await complaint("nobody.invalid:50051")


async def test_the_client_says_that_its_token_is_none(bundle: Bundle, token_file: Path) -> None:
    async with running(bundle.path, security=SecurityConfig(token_file=token_file)) as server:
        assert await complaint(server.address, token=ALICE) == ""
        for token in ("", "nonsense-nonsense-nonsense"):
            assert "HEADTAIL_TOKEN" in await complaint(server.address, token=token)
