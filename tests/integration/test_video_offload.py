"""H.264 through a real server and a real client: lost frames, a new hello, and a server that is killed and comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_server.config import Limits
from edge_server.server import Server
from protos.errors import LimitError, PayloadError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer, PayloadKind
from splitters.bundle import Bundle, rewrite_points
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import Quantiles
from splitters.runtime.h264 import SOFTWARE, H264Encoder
from splitters.runtime.h264_stream import VideoPayload
from splitters.runtime.tail import load_tail
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.client_process import client, standby, write_clip
from tests.fakes.server_client import Stream, hello, session
from tests.fakes.server_running import running

SIDE = 32


@pytest.fixture(scope="module")
async def server(bundle: Bundle) -> AsyncIterator[Server]:
    async with running(bundle.path, limits=Limits(max_video_streams=2)) as server:
        yield server


class Camera:
    """A device that codes a pan, frame by frame."""

    def __init__(self) -> None:
        self._scene = np.random.default_rng(0).integers(0, 255, (SIDE, 400, 3)).astype(np.uint8)
        self._encoder = H264Encoder(SOFTWARE, (SIDE, SIDE))
        self._count = 0

    def layer(self, frame_id: int, reference: int | None, *, layers: int = 1) -> pb.FrameLayer:
        self._count += 1
        picture = self._scene[:, self._count : self._count + SIDE]
        units, key = self._encoder.encode(picture, 30, key=reference is None)
        assert key == (reference is None)
        payload = VideoPayload(units=units, reference=reference).to_bytes()
        return FrameLayer(
            frame_id=frame_id, kind=PayloadKind.VIDEO, source_width_px=48, source_height_px=40, payload=payload, layer_count=layers
        ).to_proto()  # fmt: skip


async def test_the_welcome_says_that_video_is_taken(server: Server, bundle: Bundle) -> None:
    async with session(server.address, bundle.sha256) as stream:
        assert stream.welcome is not None
        assert pb.PAYLOAD_KIND_VIDEO in stream.welcome.payload_kinds
    async with running(bundle.path, limits=Limits(max_video_streams=0)) as other, session(other.address, bundle.sha256) as stream:
        assert stream.welcome is not None
        assert list(stream.welcome.payload_kinds) == [pb.PAYLOAD_KIND_LATENT, pb.PAYLOAD_KIND_IMAGE]


async def test_the_whole_model_answers_exactly_what_was_coded(server: Server, bundle: Bundle) -> None:
    from splitters.runtime.h264 import H264Decoder, padded_pixels

    camera, decoder, tail = Camera(), H264Decoder(padded_pixels((SIDE, SIDE))), load_tail(bundle)
    async with session(server.address, bundle.sha256) as stream:
        for n in range(6):
            message = camera.layer(n, n - 1 if n else None)
            result = await stream.frame([message])
            seen = decoder.decode(VideoPayload.from_bytes(message.payload).units)
            (wanted,) = tail.run_images([seen], [(48, 40)])
            assert result.error is None
            assert [s.class_id for s in result.answer.top] == [s.class_id for s in wanted.top]  # type: ignore[union-attr]
            assert np.allclose([s.score for s in result.answer.top], [s.score for s in wanted.top], atol=1e-5)  # type: ignore[union-attr]


async def test_a_lost_frame_a_new_hello_and_a_bad_stream_need_a_key_frame_and_nothing_else(server: Server, bundle: Bundle) -> None:
    camera = Camera()

    async def works(stream: Stream, number: int, reference: int | None) -> bool:
        error = (await stream.frame([camera.layer(number, reference)])).error
        assert error is None or (isinstance(error, PayloadError) and "key frame" in error.message)
        return error is None

    async with session(server.address, bundle.sha256) as stream:
        assert await works(stream, 0, None)
        camera.layer(1, 0)  # never sent
        assert not await works(stream, 2, 1)
        assert not await works(stream, 3, 2)
        assert await works(stream, 4, None)
        assert await works(stream, 5, 4)
        await stream.send(hello=hello(bundle.sha256))
        await stream.expect("welcome")
        assert not await works(stream, 0, 5)
        assert await works(stream, 1, None)
        rubbish = FrameLayer(frame_id=2, kind=PayloadKind.VIDEO, source_width_px=1, source_height_px=1, payload=b"\x01\x00rubbish")
        assert isinstance((await stream.frame([rubbish.to_proto()])).error, PayloadError)
        assert await works(stream, 3, 1), "what is no frame of the stream leaves the stream alone"


async def test_a_third_stream_is_refused_until_a_session_ends(server: Server, bundle: Bundle) -> None:
    async with session(server.address, bundle.sha256) as third:
        async with session(server.address, bundle.sha256) as first, session(server.address, bundle.sha256) as second:
            for stream in (first, second):
                assert (await stream.frame([Camera().layer(0, None)])).error is None
            assert isinstance((await third.frame([Camera().layer(0, None)])).error, LimitError)
            for stream in (first, second):
                await stream.send(goodbye=pb.Goodbye())
                await stream.status()
        assert (await third.frame([Camera().layer(1, None)])).error is None


def video_result(line: dict[str, Any]) -> bool:
    return bool(line["outcome"] == "result" and line.get("detail") == "h264 30")


@pytest.mark.timeout(600)
def test_a_real_client_offloads_video_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    plain = write_tiny_bundle(tmp_path / "bundle")
    sizes = {"payload_bytes": Quantiles(p50=100, p95=200), "key_bytes": Quantiles(p50=900, p95=1200)}
    video = OffloadOption(format="h264", quality=30, accuracy=0.99, encode_ms=Quantiles(p50=1, p95=2), **sizes)
    bundle = rewrite_points(plain, plain.points, offloads=[video])
    clip = write_clip(tmp_path / "clip.avi", frames=60, fps=15)
    with standby(tmp_path, bundle.path) as first:
        first.wait_ready()
        address = first.serve()
        with standby(tmp_path, bundle.path, listen=address) as second:
            second.wait_ready()
            camera = ["--camera", str(clip), "--loop", "--realtime", "--change-gate", "off", "--deadline-ms", "2000"]
            with client(tmp_path, *camera, "--server", address, "--json") as edge:
                edge.wait_for(lambda lines: any(map(video_result, lines)), "a result of the first server")
                edge.wait_frame(40)
                first.kill()
                second.serve()
                again = edge.lines()[-1]["frame"]
                edge.wait_for(
                    lambda lines: sum(video_result(x) and x["frame"] > again for x in lines) > 10, "results of the second"
                )
                done = edge.interrupt()
    assert done.code == 0, done.err
    assert done.summary["balanced"]
    results = [line for line in done.lines if video_result(line)]
    assert not [line for line in done.lines if line.get("reason") == "payload"], "nothing was sent that could not be decoded"
    assert min(line["payload_bytes"] for line in results) < max(line["payload_bytes"] for line in results) / 2
