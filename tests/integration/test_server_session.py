"""A real server on loopback, a bare client, a tiny real bundle."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import cv2
import grpc
import numpy as np
import pytest

from edge_server.config import Limits
from edge_server.server import Server
from protos.errors import LimitError, OverloadedError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import Classification, FrameLayer
from splitters.bundle import Bundle
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import input_image
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, hello, image_layer, opened, picture, session
from tests.fakes.server_running import running


@pytest.fixture(scope="module")
def device(bundle: Bundle) -> Device:
    return Device(bundle)


@pytest.fixture(scope="module")
async def server(bundle: Bundle) -> AsyncIterator[Server]:
    limits = Limits(hello_s=0.5, layer_wait_ns=300_000_000, max_sessions=40)
    async with running(bundle.path, limits=limits) as server:
        yield server


def expected(bundle: Bundle, device: Device, seed: int, point: int = 0) -> Classification:
    shot = picture(seed)
    symbols = device.codec.decode(device.payloads(shot, point))
    latents = [latent[None] for latent in device.codec.dequantise(symbols)]
    (answer,) = load_tail(bundle).run(latents, [(shot.shape[1], shot.shape[0])])
    assert isinstance(answer, Classification)
    return answer


def same(a: object, b: Classification) -> bool:
    assert isinstance(a, Classification)
    return [s.class_id for s in a.top] == [s.class_id for s in b.top] and np.allclose(
        [s.score for s in a.top], [s.score for s in b.top], atol=1e-5
    )


async def test_a_frame_is_answered_as_the_tail_answers_it(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256, max_in_flight=3) as stream:
        assert stream.welcome is not None
        assert (stream.welcome.model, stream.welcome.bundle_sha256, stream.welcome.max_in_flight) == ("tiny", bundle.sha256, 3)
        for point in (0, 1):
            result = await stream.frame(device.layers(picture(point), point, point=point))
            assert same(result.answer, expected(bundle, device, point, point))
            assert result.layers_decoded == 1
            assert result.symbols_crc32 == device.codec.decode(device.payloads(picture(point), point)).crc32()
            t = result.timings
            assert 0 < t.decode_ns + t.queue_ns + t.tail_ns <= t.total_ns
            assert t.batch_size == 1


async def test_many_sessions_at_once_each_get_their_own_answers(server: Server, bundle: Bundle, device: Device) -> None:
    async def camera(number: int) -> int:
        batches = 0
        async with session(server.address, bundle.sha256) as stream:
            for i in range(6):
                seed, point = number * 7 + i, (number + i) % 2
                result = await stream.frame(device.layers(picture(seed), i, point=point))
                assert same(result.answer, expected(bundle, device, seed, point))
                batches = max(batches, result.timings.batch_size)
        return batches

    sizes = await asyncio.gather(*(camera(n) for n in range(12)))
    assert max(sizes) > 1  # operating points batch with each other


async def test_an_offloaded_picture_runs_the_whole_model(server: Server, bundle: Bundle) -> None:
    image = input_image(picture(3), bundle.manifest.preprocess)
    ok, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert ok
    decoded = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
    (wanted,) = load_tail(bundle).run_images([decoded], [(48, 40)])
    async with session(server.address, bundle.sha256) as stream:
        result = await stream.frame([image_layer(jpeg.tobytes(), 0)])
    assert isinstance(wanted, Classification)
    assert same(result.answer, wanted)
    assert result.layers_decoded == 0


async def test_bad_frames_are_answered_with_errors_and_the_stream_goes_on(server: Server, bundle: Bundle, device: Device) -> None:
    (good,) = device.layers(picture(), 0)
    damaged = bytearray(good.payload)
    damaged[len(damaged) // 2] ^= 0x40

    def changed(frame_id: int, payload: bytes, *, crc: int | None = None) -> pb.FrameLayer:
        message = FrameLayer(frame_id=frame_id, source_width_px=48, source_height_px=40, payload=payload).to_proto()
        if crc is not None:
            message.payload_crc32 = crc
        return message

    bad = [
        changed(0, good.payload, crc=1),
        changed(1, bytes(damaged)),
        changed(2, b""),
        changed(3, b"garbage" * 10),
        changed(4, good.payload[:20]),
        image_layer(b"no picture", 5),
        pb.FrameLayer(frame_id=6, kind=1, layer=2, layer_count=3, source_width_px=1, source_height_px=1),
        pb.FrameLayer(frame_id=7, kind=77, layer_count=1, source_width_px=1, source_height_px=1),
    ]
    async with session(server.address, bundle.sha256) as stream:
        for frame_id, message in enumerate(bad):
            result = await stream.frame([message])
            assert result.frame_id == frame_id
            assert result.error is not None
            assert result.error.code in ("payload", "protocol"), result.error
        after = await stream.frame(device.layers(picture(), 100))
        assert after.error is None


async def test_a_payload_over_the_limit_is_refused_per_frame(bundle: Bundle, device: Device) -> None:
    async with (
        running(bundle.path, limits=Limits(max_payload_bytes=2048, max_frame_bytes=4096)) as server,
        session(server.address, bundle.sha256) as stream,
    ):
        big = FrameLayer(frame_id=0, source_width_px=1, source_height_px=1, payload=bytes(3000)).to_proto()
        assert isinstance((await stream.frame([big])).error, LimitError)
        assert (await stream.frame(device.layers(picture(), 1))).error is None


async def test_a_message_over_grpcs_limit_ends_that_stream_only(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256) as bystander, session(server.address, bundle.sha256) as stream:
        huge = FrameLayer(frame_id=0, source_width_px=1, source_height_px=1, payload=bytes(12 << 20)).to_proto()
        await stream.send(layer=huge)
        status, _ = await stream.status()
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await bystander.frame(device.layers(picture(), 0))).error is None


async def test_frames_of_another_bundle_are_refused_one_by_one(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, "0" * 64) as stream:
        assert stream.welcome is not None
        assert stream.welcome.bundle_sha256 == bundle.sha256  # so that the client can fetch it
        for i in range(2):
            assert isinstance((await stream.frame(device.layers(picture(), i))).error, VersionMismatchError)
        await stream.send(hello=hello(bundle.sha256))
        await stream.expect("welcome")
        assert (await stream.frame(device.layers(picture(), 0))).error is None


async def test_a_client_cannot_fill_the_log_with_hellos(server: Server, bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edge_server")
    async with session(server.address, bundle.sha256) as stream:
        for _ in range(20):
            await stream.send(hello=hello(bundle.sha256))
            await stream.expect("welcome")
    assert len([r for r in caplog.records if "client 'test'" in r.getMessage()]) == 1


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        ([pb.ClientMessage()], "INVALID_ARGUMENT", "protocol"),
        ([pb.ClientMessage(ping=pb.Ping())], "INVALID_ARGUMENT", "protocol"),
        ([pb.ClientMessage(hello=pb.Hello(protocol_version=99))], "FAILED_PRECONDITION", "version_mismatch"),
        ([pb.ClientMessage(hello=hello(model="no-such-model"))], "NOT_FOUND", "unknown_model"),
        ([pb.ClientMessage(hello=hello()), pb.ClientMessage()], "INVALID_ARGUMENT", "protocol"),
        ([], "INVALID_ARGUMENT", "protocol"),  # says nothing: the hello's time runs out
    ],
)
async def test_a_broken_protocol_ends_the_stream_with_a_mapped_status(
    server: Server, messages: list[pb.ClientMessage], status: str, code: str
) -> None:
    async with opened(server.address) as stream:
        for message in messages:
            await stream.call.write(message)
        assert await stream.status() == (grpc.StatusCode[status], code)


async def test_reused_frame_ids_end_the_stream(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256) as stream:
        await stream.frame(device.layers(picture(), 4))
        await stream.send(layer=device.layers(picture(), 4)[0])
        assert await stream.status() == (grpc.StatusCode.INVALID_ARGUMENT, "protocol")


async def test_more_frames_in_flight_than_welcomed_are_refused_and_all_are_answered(
    server: Server, bundle: Bundle, device: Device
) -> None:
    layers = [device.layers(picture(i), i)[0] for i in range(30)]
    async with session(server.address, bundle.sha256, max_in_flight=2) as stream:
        for layer in layers:
            await stream.send(layer=layer)
        results = [await stream.result() for _ in layers]
    assert sorted(r.frame_id for r in results) == list(range(30))
    assert {type(r.error) for r in results if r.error} <= {LimitError}
    assert sum(r.error is None for r in results) >= 2


async def test_a_deadline_that_cannot_be_met_is_refused_early(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256) as stream:
        result = await stream.frame(device.layers(picture(), 0, deadline_ns=1))
        assert isinstance(result.error, OverloadedError)
        assert (await stream.frame(device.layers(picture(), 1, deadline_ns=10_000_000_000))).error is None


async def test_a_frame_whose_later_layers_stay_away_runs_on_what_came(server: Server, bundle: Bundle, device: Device) -> None:
    (base,) = device.layers(picture(), 0, deadline_ns=60_000_000_000)
    base.layer_count = 2
    async with session(server.address, bundle.sha256) as stream:
        begun = time.monotonic()
        with_deadline = await stream.frame([base])
        assert with_deadline.error is None
        assert 0.25 < time.monotonic() - begun < 30  # a layer is waited for .3 s, not until the deadline
        base.frame_id, base.deadline_remaining_ns = 1, 0
        without = await stream.frame([base])
        assert without.error is None
        base.frame_id = 2
        await stream.send(layer=base)
        await stream.send(layer=device.layers(picture(), 3)[0])  # the next frame ends the one before
        assert sorted([(await stream.result()).frame_id, (await stream.result()).frame_id]) == [2, 3]


async def test_ping_is_answered_and_goodbye_gets_what_is_owed(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256) as stream:
        await stream.send(ping=pb.Ping(sent_ns=123))
        assert (await stream.expect("pong")).echo_sent_ns == 123
        for i in range(5):
            await stream.send(layer=device.layers(picture(i), i)[0])
        await stream.send(goodbye=pb.Goodbye())
        assert sorted([(await stream.result()).frame_id for _ in range(5)]) == list(range(5))
        assert await stream.status() == (grpc.StatusCode.OK, "")


async def test_half_closing_is_a_goodbye(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256) as stream:
        await stream.send(layer=device.layers(picture(), 0)[0])
        await stream.call.done_writing()
        assert (await stream.result()).frame_id == 0
        assert (await stream.status())[0] is grpc.StatusCode.OK


async def test_grants_come_with_the_results_but_not_with_each(server: Server, bundle: Bundle, device: Device) -> None:
    async with session(server.address, bundle.sha256) as stream:
        begun = time.monotonic()
        for i in range(40):
            await stream.frame(device.layers(picture(), i))
        took_s = time.monotonic() - begun
        grants = [m.grant for m in stream.others if m.WhichOneof("content") == "grant"]
    assert 1 <= len(grants) <= took_s / 0.2 + 1
    assert grants[-1].tail_ns > 0


async def test_clients_that_vanish_leave_nothing_behind(server: Server, bundle: Bundle, device: Device) -> None:
    for _ in range(5):
        async with session(server.address, bundle.sha256) as stream:
            for i in range(4):
                await stream.send(layer=device.layers(picture(i), i)[0])
    async with asyncio.timeout(20):
        while any(server.counts.values()):
            await asyncio.sleep(0.02)


async def test_no_more_sessions_than_allowed(bundle: Bundle) -> None:
    async with running(bundle.path, limits=Limits(max_sessions=1)) as server:
        async with session(server.address, bundle.sha256), opened(server.address) as second:
            with contextlib.suppress(grpc.aio.AioRpcError):  # it may be turned away before it has spoken
                await second.send(hello=hello(bundle.sha256))
            assert await second.status() == (grpc.StatusCode.RESOURCE_EXHAUSTED, "limit")
        async with asyncio.timeout(20):  # the server learns of the first one's end when it gets round to it
            while True:
                async with opened(server.address) as third:
                    await third.send(hello=hello(bundle.sha256))
                    with contextlib.suppress(AssertionError, grpc.aio.AioRpcError):
                        await third.expect("welcome")
                        break
                await asyncio.sleep(0.05)


async def test_a_replaced_bundle_is_told_and_frames_in_hand_still_run(tmp_path: Path) -> None:
    old = write_tiny_bundle(tmp_path / "tiny", seed=1)
    device = Device(old)
    async with running(old.path) as server, session(server.address, old.sha256) as stream:
        await stream.frame(device.layers(picture(), 0))
        new = write_tiny_bundle(tmp_path / "tiny", seed=2)
        assert new.sha256 != old.sha256
        server.reload_soon()
        assert (await stream.expect("bundle_changed")).bundle_sha256 == new.sha256
        assert (await stream.frame(device.layers(picture(), 1))).error is None
        await stream.send(hello=hello(new.sha256))
        assert (await stream.expect("welcome")).bundle_sha256 == new.sha256
        fresh = Device(new)
        result = await stream.frame(fresh.layers(picture(5), 0))
        assert same(result.answer, expected(new, fresh, 5))


async def test_an_unreadable_replacement_changes_nothing(tmp_path: Path) -> None:
    old = write_tiny_bundle(tmp_path / "tiny", seed=1)
    device = Device(old)
    async with running(old.path) as server, session(server.address, old.sha256) as stream:
        (old.path / "server" / "tail.onnx").write_bytes(b"damaged")
        server.reload_soon()
        await asyncio.sleep(0.3)
        assert (await stream.frame(device.layers(picture(), 1))).error is None
