"""The stream's end, seen by the task that writes and the task that reads."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from edge_client.transport.grpc import GrpcLink
from edge_client.transport.rpc import Endpoint, token_from_environment
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer, PayloadKind
from tests.fakes.client_loop import VirtualLoop, run_virtual

LAYER = FrameLayer(
    frame_id=0, layer=0, layer_count=1, kind=PayloadKind.LATENT, payload=b"x", source_width_px=4, source_height_px=4
)  # fmt: skip


class Ended:
    """A call that ended: gRPC refuses to write, and tells the reader why, a moment later."""

    def __init__(self, *, tells: bool) -> None:
        self._tells = tells

    async def write(self, message: pb.ClientMessage) -> None:
        raise asyncio.InvalidStateError("RPC already finished.")

    async def read(self) -> Any:
        if not self._tells:
            await asyncio.Event().wait()
        await asyncio.sleep(0.2)
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "gone", None)

    def cancel(self) -> None:
        pass


class Deaf:
    """Events of a session that nobody listens to."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: False


async def converse(loop: VirtualLoop, call: Ended) -> None:
    link = GrpcLink(Endpoint(address="127.0.0.1:1"), Deaf(), clock=loop.clock)  # type: ignore[arg-type]  # of no use to the end
    link.send([LAYER], deadline_ns=None)
    await link._converse(call)  # type: ignore[arg-type]


def test_a_frame_written_to_a_call_that_just_ended_leaves_the_reason_to_the_reader() -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="gone"):
        run_virtual(lambda loop: converse(loop, Ended(tells=True)))


def test_a_call_that_ended_without_a_reason_is_over_within_a_second() -> None:
    async def main(loop: VirtualLoop) -> float:
        await converse(loop, Ended(tells=False))
        return loop.time()

    assert run_virtual(main) == pytest.approx(1.0)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", " "])
def test_a_token_read_from_a_file_with_its_line_end_is_the_token(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTAIL_TOKEN", f"a-token-of-sixteen-or-more{end}")
    assert token_from_environment() == "a-token-of-sixteen-or-more"
