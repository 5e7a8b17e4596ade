"""The holder of one token at its worst, in a process of its own: three connections, on each every kind of work that costs most.

usage: python -m tests.fakes.server_flood ADDRESS TOKEN MODEL BUNDLE_SHA256 SIDE_PX

Prints ``at it`` once every kind has been answered for the first time, and goes on until it is killed.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import grpc
import grpc.aio
import numpy as np

from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.headtail.v1 import open_inference_pb2 as oip
from tests.fakes.server_client import hello, image_layer

Tensor = oip.ModelInferRequest.InferInputTensor
_IN_FLIGHT = 12


def many_scans(side_px: int, most_bytes: int) -> bytes:
    """A progressive JPEG of that size whose smallest scan is repeated as often as fits."""
    picture = np.zeros((side_px, side_px, 3), np.uint8)
    data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_QUALITY, 50])[1].tobytes()
    at, head, scans = 2, data[:2], []
    while data[at + 1] != 0xD9:
        end = at + 2 + int(struct.unpack_from(">H", data, at + 2)[0])
        is_scan = data[at + 1] == 0xDA
        while is_scan and not (data[end] == 0xFF and data[end + 1] not in (0, *range(0xD0, 0xD8))):
            end += 1
        head += data[at:end]
        if is_scan and data[at + 4] == 1 and data[at + 7] > 0:  # of one component, beyond its first coefficient
            scans.append(data[at:end])
        at = end
    least = min(scans, key=len)
    return head + least * ((most_bytes - len(head)) // len(least) - 1) + b"\xff\xd9"


def typed(model: str, side_px: int, *, valid: bool) -> bytes:
    """A request of 7.5 million numbers; where it is not valid, the last one says so."""
    values = np.full(50 * side_px * side_px * 3, 7, np.uint32)
    values[-1] = 7 if valid else 256
    contents = oip.InferTensorContents(uint_contents=values)
    tensor = Tensor(name="image", datatype="UINT8", shape=[50, side_px, side_px, 3], contents=contents)
    return oip.ModelInferRequest(model_name=model, inputs=[tensor]).SerializeToString()


@dataclass(frozen=True)
class Flood:
    """Who floods, and with which model.

    Attributes:
        metadata: the token.
        model, sha256, side_px: the server's.
        begun: one event for each kind of work, set when it has been answered for the first time.
    """

    metadata: Sequence[tuple[str, str]]
    model: str
    sha256: str
    side_px: int
    begun: Sequence[asyncio.Event] = field(default_factory=lambda: [asyncio.Event() for _ in range(4)])

    async def infer(self, channel: grpc.aio.Channel, request: bytes, kind: int) -> None:
        """The same request for ever."""
        call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        while True:
            try:
                await call(request, metadata=self.metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    raise
            self.begun[kind].set()

    async def stream(self, channel: grpc.aio.Channel, payload: bytes, kind: int) -> None:
        """The same picture for ever, always several at once."""
        stream = pb_grpc.HeadtailStub(channel).Session(metadata=self.metadata)
        await stream.write(pb.ClientMessage(hello=hello(self.sha256, model=self.model, max_in_flight=64)))
        free = asyncio.Semaphore(_IN_FLIGHT)

        async def read() -> None:
            while isinstance(message := await stream.read(), pb.ServerMessage):
                if message.WhichOneof("content") == "result":
                    self.begun[kind].set()
                    free.release()

        reading, number = asyncio.create_task(read()), 0
        while not reading.done():
            await free.acquire()
            await stream.write(pb.ClientMessage(layer=image_layer(payload, number)))
            number += 1

    async def connection(self, address: str) -> None:
        """One connection with every kind of work on it."""
        options = [("grpc.max_send_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1)]
        plain = cv2.imencode(".jpg", np.zeros((self.side_px, self.side_px, 3), np.uint8))[1].tobytes()
        async with grpc.aio.insecure_channel(address, options=options) as channel, asyncio.TaskGroup() as group:
            group.create_task(self.infer(channel, typed(self.model, self.side_px, valid=False), 0))
            group.create_task(self.infer(channel, typed(self.model, self.side_px, valid=True), 1))
            group.create_task(self.stream(channel, many_scans(self.side_px, 4_000_000), 2))
            group.create_task(self.stream(channel, plain, 3))


async def main(address: str, token: str, model: str, sha256: str, side_px: int) -> None:
    """Floods until it is killed."""
    flood = Flood((("authorization", f"Bearer {token}"),), model, sha256, side_px)
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(flood.connection(address))
        for event in flood.begun:
            await event.wait()
        sys.stdout.write("at it\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5], int(sys.argv[5])))
