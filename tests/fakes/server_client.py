"""A bare client for tests of the server: speaks the protocol message by message, and can also break it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import PROTOCOL_VERSION, FrameLayer, PayloadKind, Result
from splitters.bundle import Bundle
from splitters.codec import LatentCodec, codec_from_spec
from splitters.tasks.preprocess import preprocess

READ_S = 20.0


class Device:
    """The head and the codec of a bundle: turns pictures into layers."""

    def __init__(self, bundle: Bundle) -> None:
        import onnxruntime as ort

        self.bundle = bundle
        self.codec: LatentCodec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
        head = bundle.manifest.head
        parts = {"": head.stem, **head.graphs}
        self._graphs = {n: ort.InferenceSession(bundle.read_part(p), providers=["CPUExecutionProvider"]) for n, p in parts.items()}

    def latents(self, picture: NDArray[np.uint8], point: int = 0) -> list[NDArray[np.float32]]:
        """The stem's outputs, or the sum of the point's encoders on them, without the batch axis."""
        maps = self._graphs[""].run(None, {"image": preprocess(picture, self.bundle.manifest.preprocess)})
        encoders = [self._graphs[name] for name in self.bundle.point(point).graphs]
        if not encoders:
            return [out[0] for out in maps]
        return [sum(e.run(None, dict(zip([i.name for i in e.get_inputs()], maps, strict=True)))[0] for e in encoders)[0]]

    def payloads(self, picture: NDArray[np.uint8], point: int = 0) -> list[bytes]:
        """What travels for a picture."""
        return self.codec.encode(self.codec.quantise(self.latents(picture, point), self.bundle.point(point).codec_point))

    def layers(self, picture: NDArray[np.uint8], frame_id: int, *, point: int = 0, deadline_ns: int = 0) -> list[pb.FrameLayer]:
        """The same as messages."""
        payloads = self.payloads(picture, point)
        height, width = picture.shape[:2]
        return [
            FrameLayer(
                frame_id=frame_id, layer=i, layer_count=len(payloads), operating_point=point, deadline_remaining_ns=deadline_ns,
                source_width_px=width, source_height_px=height, payload=payload, sent_ns=time.monotonic_ns(),
            ).to_proto()
            for i, payload in enumerate(payloads)
        ]  # fmt: skip


def picture(seed: int = 0, width: int = 48, height: int = 40) -> NDArray[np.uint8]:
    """Noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def image_layer(payload: bytes, frame_id: int, *, width: int = 48, height: int = 40) -> pb.FrameLayer:
    """An offloaded picture."""
    layer = FrameLayer(frame_id=frame_id, kind=PayloadKind.IMAGE, source_width_px=width, source_height_px=height, payload=payload)
    return layer.to_proto()


class Stream:
    """An open session."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.welcome: pb.Welcome | None = None
        self.others: list[pb.ServerMessage] = []

    async def send(self, **content: Any) -> None:
        """One client message, e.g. ``ping=pb.Ping()``."""
        await self.call.write(pb.ClientMessage(**content))

    async def read(self) -> pb.ServerMessage | None:
        """The next message; None at the end of a stream that ended well."""
        message = await asyncio.wait_for(self.call.read(), READ_S)
        return message if isinstance(message, pb.ServerMessage) else None

    async def expect(self, kind: str) -> Any:
        """The next message of that kind; others are put aside (grants may come at any time)."""
        while (message := await self.read()) is not None:
            if message.WhichOneof("content") == kind:
                return getattr(message, kind)
            self.others.append(message)
        raise AssertionError(f"the stream ended without {kind}; before: {self.others}")

    async def result(self) -> Result:
        """The next result."""
        return Result.from_proto(await self.expect("result"))

    async def frame(self, layers: Sequence[pb.FrameLayer]) -> Result:
        """Sends a frame and waits for its answer."""
        for layer in layers:
            await self.send(layer=layer)
        return await self.result()

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end; the status and the error's code."""
        try:
            while await self.read() is not None:
                pass
        except grpc.aio.AioRpcError:
            pass
        trailing = dict(await self.call.trailing_metadata() or ())
        return await self.call.code(), str(trailing.get("headtail-code", ""))


def hello(sha256: str = "", **fields: Any) -> pb.Hello:
    """A hello with this release's protocol version."""
    return pb.Hello(**{"protocol_version": PROTOCOL_VERSION, "bundle_sha256": sha256, "client_version": "test", **fields})


@asynccontextmanager
async def opened(address: str, metadata: Sequence[tuple[str, str]] = ()) -> AsyncIterator[Stream]:
    """A stream on a channel of its own, nothing said yet."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = pb_grpc.HeadtailStub(channel).Session(metadata=metadata)
        try:
            yield Stream(call)
        finally:
            call.cancel()


@asynccontextmanager
async def session(address: str, sha256: str, metadata: Sequence[tuple[str, str]] = (), **fields: Any) -> AsyncIterator[Stream]:
    """A greeted stream."""
    async with opened(address, metadata) as stream:
        await stream.send(hello=hello(sha256, **fields))
        stream.welcome = await stream.expect("welcome")
        yield stream
