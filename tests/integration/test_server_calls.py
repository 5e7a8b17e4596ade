"""The calls beside the stream, the end of a server, and what hostile bytes do to it."""

import asyncio
import hashlib
import os
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from edge_server.config import Limits, SecurityConfig
from edge_server.server import Server
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import CHUNK_BYTES, PROTOCOL_VERSION, Result
from splitters.bundle import Bundle, BundleWriter
from splitters.bundle.manifest import parse_manifest
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, hello, opened, picture, session
from tests.fakes.server_running import running


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "other", name="other", seed=5, size_px=128)


@pytest.fixture(scope="module")
def device(bundle: Bundle) -> Device:
    return Device(bundle)


@pytest.fixture(scope="module")
async def server(bundle: Bundle, second: Bundle) -> AsyncIterator[Server]:
    async with running(bundle.path, second.path, metrics_port=0) as server:
        yield server


@pytest.fixture(scope="module")
async def stub(server: Server) -> AsyncIterator[pb_grpc.HeadtailStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.HeadtailStub(channel)


async def failure(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), dict(caught.value.trailing_metadata()).get("headtail-code", "")


async def test_models_are_listed_default_first(stub: pb_grpc.HeadtailStub, bundle: Bundle, second: Bundle) -> None:
    answer = await stub.ListModels(pb.ListModelsRequest())
    assert [(m.name, m.task, m.bundle_sha256) for m in answer.models] == [
        ("tiny", "classification", bundle.sha256),
        ("other", "classification", second.sha256),
    ]
    assert answer.protocol_version == PROTOCOL_VERSION
    assert answer.models[0].device_bytes == (bundle.path / "manifest.json").stat().st_size + sum(
        p.bytes for p in bundle.manifest.device_parts()
    )


async def fetch(stub: pb_grpc.HeadtailStub, **request: object) -> tuple[bytes, dict[str, bytes], int]:
    manifest, files, largest = b"", {}, 0
    async for chunk in stub.FetchBundle(pb.FetchBundleRequest(**request)):
        if chunk.WhichOneof("content") == "manifest_json":
            assert not manifest
            assert not files
            manifest = chunk.manifest_json
            continue
        files.setdefault(chunk.part.path, b"")
        files[chunk.part.path] += chunk.part.data
        largest = max(largest, len(chunk.part.data))
    return manifest, files, largest


async def test_a_fetched_bundle_is_the_device_part_and_nothing_else(
    stub: pb_grpc.HeadtailStub, bundle: Bundle, second: Bundle
) -> None:
    for wanted, name in ((bundle, ""), (second, "other")):
        manifest, files, largest = await fetch(stub, model=name)
        assert hashlib.sha256(manifest).hexdigest() == wanted.sha256
        parts = {p.path: p for p in parse_manifest(manifest).device_parts()}
        assert files.keys() == parts.keys()
        assert all(hashlib.sha256(files[path]).hexdigest() == part.sha256 for path, part in parts.items())
        assert not any(path.startswith("server/") for path in files)
        assert largest <= CHUNK_BYTES


async def test_a_fetch_resumes_where_it_left_off(stub: pb_grpc.HeadtailStub, bundle: Bundle) -> None:
    _, whole, _ = await fetch(stub)
    done, half = "device/codec.json", "device/stem.onnx"
    have = [pb.PartOffset(path=done, offset=len(whole[done])), pb.PartOffset(path=half, offset=100)]
    _, rest, _ = await fetch(stub, bundle_sha256=bundle.sha256, have=have)
    assert done not in rest
    assert rest[half] == whole[half][100:]
    assert rest["device/local.onnx"] == whole["device/local.onnx"]


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        ({"model": "nope"}, ("NOT_FOUND", "unknown_model")),
        ({"bundle_sha256": "0" * 64}, ("FAILED_PRECONDITION", "version_mismatch")),
        ({"have": [pb.PartOffset(path="device/stem.onnx", offset=1 << 40)]}, ("INVALID_ARGUMENT", "protocol")),
        ({"have": [pb.PartOffset(path="server/tail.onnx", offset=0)]}, ("INVALID_ARGUMENT", "protocol")),
        ({"have": [pb.PartOffset(path="../../etc/passwd", offset=0)]}, ("INVALID_ARGUMENT", "protocol")),
    ],
)
async def test_a_fetch_that_cannot_be_served_says_why(stub: pb_grpc.HeadtailStub, request_: dict, wanted: tuple[str, str]) -> None:
    status, code = await failure(fetch(stub, **request_))
    assert (status.name, code) == wanted


async def test_infer_answers_one_frame(stub: pb_grpc.HeadtailStub, server: Server, bundle: Bundle, device: Device) -> None:
    layers = device.layers(picture(9), 0)
    answer = await stub.Infer(pb.InferRequest(protocol_version=PROTOCOL_VERSION, bundle_sha256=bundle.sha256, layers=layers))
    async with session(server.address, bundle.sha256) as stream:
        streamed = await stream.frame(layers)
    assert Result.from_proto(answer.result).answer == streamed.answer


async def test_infer_refuses_what_it_cannot_answer(stub: pb_grpc.HeadtailStub, bundle: Bundle, device: Device) -> None:
    layers = device.layers(picture(9), 0)

    def request(**changes: object) -> pb.InferRequest:
        fields = {"protocol_version": PROTOCOL_VERSION, "bundle_sha256": bundle.sha256, "layers": layers, **changes}
        return pb.InferRequest(**fields)

    for changes, wanted in [
        ({"protocol_version": 7}, ("FAILED_PRECONDITION", "version_mismatch")),
        ({"bundle_sha256": ""}, ("FAILED_PRECONDITION", "version_mismatch")),
        ({"model": "x"}, ("NOT_FOUND", "unknown_model")),
        ({"layers": []}, ("INVALID_ARGUMENT", "protocol")),
        ({"layers": [*layers, *layers]}, ("INVALID_ARGUMENT", "protocol")),
    ]:
        status, code = await failure(stub.Infer(request(**changes)))
        assert (status.name, code) == wanted
    broken = pb.FrameLayer.FromString(layers[0].SerializeToString())
    broken.payload_crc32 ^= 1
    assert await failure(stub.Infer(request(layers=[broken]))) == (grpc.StatusCode.INVALID_ARGUMENT, "payload")


async def test_health_and_reflection_answer(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "headtail.v1.Headtail"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        services = {s.name async for answer in call for s in answer.list_services_response.service}
        assert {"headtail.v1.Headtail", "grpc.health.v1.Health"} <= services


async def test_metrics_count_frames_by_outcome(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256) as stream:
        await stream.frame(device.layers(picture(), 0))
        await stream.frame(device.layers(picture(), 1, deadline_ns=1))
    text = await asyncio.to_thread(
        lambda: urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60).read().decode()
    )
    assert 'headtail_frames_total{model="tiny",outcome="result"}' in text
    assert 'headtail_frames_total{model="tiny",outcome="overloaded"}' in text
    assert 'headtail_stage_seconds_bucket{le="0.005",model="tiny",stage="tail"}' in text


# ---------------------------------------------------------------- hostile bytes


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(200),
        PREFACE + b"\xff" * 500,
        PREFACE + bytes(9),
        b"",
        bytes(100_000),
    ],
    ids=["http1", "tls", "frames", "half", "nothing", "zeros"],
)
async def test_garbage_on_the_socket_hurts_nobody(server: Server, bundle: Bundle, device: Device, data: bytes) -> None:
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    try:
        async with asyncio.timeout(0.3):
            while await reader.read(4096):
                pass
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    async with session(server.address, bundle.sha256) as stream:
        assert (await stream.frame(device.layers(picture(), 0))).error is None


async def test_random_messages_in_a_session_end_it_or_are_answered(server: Server, bundle: Bundle, device: Device) -> None:
    raw = {"request_serializer": lambda b: b, "response_deserializer": pb.ServerMessage.FromString}
    path = "/headtail.v1.Headtail/Session"
    good = [pb.ClientMessage(layer=m).SerializeToString() for m in device.layers(picture(), 0)]
    async with grpc.aio.insecure_channel(server.address) as channel:
        for i in range(40):
            call = channel.stream_stream(path, **raw)()
            body = bytearray(good[0])
            noise = os.urandom(6)
            for a, b in zip(noise[::2], noise[1::2], strict=True):
                body[(a * 7) % len(body)] = b
            try:
                async with asyncio.timeout(30):
                    await call.write(pb.ClientMessage(hello=hello(bundle.sha256)).SerializeToString())
                    await call.read()
                    await call.write(bytes(body) if i % 2 else os.urandom(50))
                    await call.done_writing()
                    while await call.read() is not grpc.aio.EOF:
                        pass
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
    async with session(server.address, bundle.sha256) as stream:
        assert (await stream.frame(device.layers(picture(), 0))).error is None


# ---------------------------------------------------------------- the end


async def test_draining_answers_what_is_in_flight_tells_the_sessions_and_takes_nothing_new(bundle: Bundle, device: Device) -> None:
    """Every frame has one result, in whatever order: a refusal takes no time and may overtake answers that do."""
    async with (
        running(bundle.path, grace_s=5.0, linger_s=3.0) as server,
        session(server.address, bundle.sha256) as stream,
        opened(server.address) as late,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for i in range(4):
            await stream.send(layer=device.layers(picture(i), i)[0])
        await stream.send(ping=pb.Ping())
        await stream.expect("pong")  # all four have been taken
        health = health_pb2_grpc.HealthStub(channel)
        ending = asyncio.create_task(server.drain())
        assert (await stream.expect("draining")).grace_ns == 5_000_000_000
        answer = await health.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await late.send(hello=hello(bundle.sha256))
        assert await late.status() == (grpc.StatusCode.UNAVAILABLE, "draining")
        await stream.send(layer=device.layers(picture(), 99)[0])
        while (message := await stream.read()) is not None:
            stream.others.append(message)
        results = [m.result for m in stream.others if m.WhichOneof("content") == "result"]
        assert sorted((r.frame_id, r.error.code) for r in results) == [(0, ""), (1, ""), (2, ""), (3, ""), (99, "draining")]
        assert (await stream.status())[0] is grpc.StatusCode.OK
        await asyncio.wait_for(ending, 60)


async def test_a_drain_does_not_wait_longer_than_its_grace_for_a_client_that_stays(bundle: Bundle) -> None:
    async with running(bundle.path, grace_s=0.5) as server, session(server.address, bundle.sha256):
        await asyncio.wait_for(server.drain(), 60)  # the client would stay for ever


async def test_a_port_in_use_is_a_clear_error(server: Server, bundle: Bundle, tmp_path: Path) -> None:
    from protos.errors import ConfigError

    with pytest.raises(ConfigError, match="in use"):
        async with running(bundle.path, listen=server.address, port_file=tmp_path / "port"):
            pass
    assert not (tmp_path / "port").exists()


async def test_bytes_that_are_no_message_are_a_mapped_error_in_every_call(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        for name in ("ListModels", "Infer"):
            assert await failure(channel.unary_unary(f"/headtail.v1.Headtail/{name}")(b"\xff\xff\xff")) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "protocol",
            )
        call = channel.unary_stream("/headtail.v1.Headtail/FetchBundle")(b"\xff\xff\xff")
        assert await failure(call.read()) == (grpc.StatusCode.INVALID_ARGUMENT, "protocol")


CROWDED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "limit")


async def test_a_request_that_would_be_a_million_objects_is_refused(server: Server, bundle: Bundle, device: Device) -> None:
    many = b"\x22\x00" * (1 << 20)  # InferRequest.layers, all empty; 60 MB once parsed
    async with grpc.aio.insecure_channel(server.address) as channel:
        assert await failure(channel.unary_unary("/headtail.v1.Headtail/Infer")(many)) == CROWDED
        inputs = b"\x2a\x00" * (1 << 20)
        assert await failure(channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(inputs)) == CROWDED
        fetch = channel.unary_stream("/headtail.v1.Headtail/FetchBundle")(b"\x1a\x00" * (1 << 20))
        assert await failure(fetch.read()) == CROWDED
        session_call = channel.stream_stream("/headtail.v1.Headtail/Session")()
        await session_call.write(b"\x0a\x00\x12\x00" * (1 << 20))
        assert await failure(session_call.read()) == CROWDED
    async with session(server.address, bundle.sha256) as stream:
        assert (await stream.frame(device.layers(picture(), 0))).error is None


async def test_health_holds_no_long_names(server: Server) -> None:
    """It needs no token, and a watch holds what it asked for as long as it is open."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        long = health_pb2.HealthCheckRequest(service="x" * 5000)
        assert await failure(stub.Check(long)) == (grpc.StatusCode.INVALID_ARGUMENT, "protocol")
        assert await failure(stub.Watch(long).read()) == (grpc.StatusCode.INVALID_ARGUMENT, "protocol")
        short = await stub.Watch(health_pb2.HealthCheckRequest(service="x" * 50)).read()
        assert short.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def bigger_bundle(root: Path, filler: bytes) -> Path:
    """A tiny bundle with a large device part."""
    small = write_tiny_bundle(root / "small")
    m = small.manifest
    kept = ("name", "task", "preprocess", "labels", "latent_shape", "head", "codec", "local", "tail", "postprocess", "licence")
    with BundleWriter(root / "bigger") as writer:
        for part in m.parts:
            if part.path != "operating_points.json":
                writer.add(part.path, small.read_part(part.path), part.side)
        writer.add("device/filler.bin", filler, "device")
        return writer.finish(points=small.points, **{name: getattr(m, name) for name in kept}).path


async def test_a_client_that_does_not_read_its_bundle_is_let_go(tmp_path: Path) -> None:
    filler = os.urandom(8 << 20)
    alone = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        running(bigger_bundle(tmp_path, filler), limits=Limits(write_s=1.5, max_fetches=1)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
        grpc.aio.insecure_channel(server.address, options=alone) as other,
    ):
        stalled = pb_grpc.HeadtailStub(channel).FetchBundle(pb.FetchBundleRequest())
        await stalled.read()
        _, files, _ = await asyncio.wait_for(fetch(pb_grpc.HeadtailStub(other)), 20)  # waits until the first one is let go
        assert files["device/filler.bin"] == filler

        async def rest() -> None:
            while await stalled.read() is not grpc.aio.EOF:
                pass

        assert await failure(rest()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "limit")


async def test_one_tokens_holders_cannot_keep_all_others_from_their_bundles(tmp_path: Path) -> None:
    filler = os.urandom(8 << 20)
    tokens = {name: f"{name}-token-0123456789" for name in ("alice", "bob")}
    (tmp_path / "tokens").write_text("".join(f"{name} {token}\n" for name, token in tokens.items()))
    alice, bob = ((("authorization", f"Bearer {token}"),) for token in tokens.values())
    limits = Limits(write_s=30.0, max_fetches=2, max_fetches_per_client=1)
    alone = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        security = SecurityConfig(token_file=tmp_path / "tokens")
        server = await stack.enter_async_context(running(bigger_bundle(tmp_path, filler), limits=limits, security=security))
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(server.address, options=alone)) for _ in range(5)]
        stalled = [pb_grpc.HeadtailStub(c).FetchBundle(pb.FetchBundleRequest(), metadata=alice) for c in channels[1:]]
        reads = [asyncio.create_task(call.read()) for call in stalled]  # one of each at most, and nothing more
        await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
        got = 0
        async with asyncio.timeout(60):
            async for chunk in pb_grpc.HeadtailStub(channels[0]).FetchBundle(pb.FetchBundleRequest(), metadata=bob):
                got += len(chunk.part.data)
        assert got > len(filler)
        for call in stalled:
            call.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


async def test_a_client_that_dawdles_over_its_bundle_gives_way_to_one_that_waits(tmp_path: Path) -> None:
    filler = os.urandom(16 << 20)
    alone = [("grpc.use_local_subchannel_pool", 1)]
    limits = Limits(write_s=1.0, max_fetches=1, min_fetch_bytes_per_s=4 << 20)
    async with (
        running(bigger_bundle(tmp_path, filler), limits=limits) as server,
        grpc.aio.insecure_channel(server.address) as channel,
        grpc.aio.insecure_channel(server.address, options=alone) as other,
    ):
        slow = pb_grpc.HeadtailStub(channel).FetchBundle(pb.FetchBundleRequest())

        async def dawdle() -> None:  # never long enough to be let go for not reading
            while await slow.read() is not grpc.aio.EOF:
                await asyncio.sleep(0.2)

        task = asyncio.create_task(dawdle())
        await asyncio.sleep(2.5)
        assert not task.done()  # nobody waits for its place
        _, files, _ = await asyncio.wait_for(fetch(pb_grpc.HeadtailStub(other)), 10)
        assert files["device/filler.bin"] == filler
        assert await failure(task) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "limit")
