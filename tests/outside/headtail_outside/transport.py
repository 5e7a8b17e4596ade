"""A transport: every frame a unary call, for a network that carries no stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edge_client.bundles.fetch import choose_model, list_models
from edge_client.transport.base import Gate, SessionEvents, Welcome
from edge_client.transport.rpc import Endpoint, open_channel, stub, translated
from protos.errors import HeadtailError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, FrameLayer, Result


class UnaryLink:
    def __init__(self, endpoint: Endpoint, events: SessionEvents, *, clock: Callable[[], int]) -> None:
        self._endpoint, self._events, self._clock = endpoint, events, clock
        self.up = False
        self.welcomed, self.failed, self._closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.error: HeadtailError | None = None
        self.reconnects = 0
        self._next_id = 0
        self._calls: set[asyncio.Task[None]] = set()
        self._server: Any = None
        self._welcome: Welcome | None = None

    async def run(self) -> None:
        hello = self._events.hello()
        model = choose_model(await list_models(self._endpoint), hello.model, self._endpoint.address)
        self._welcome = Welcome(
            session_id="unary", model=model.name, bundle_sha256=model.bundle_sha256, max_in_flight=4, max_payload_bytes=8 << 20
        )
        async with open_channel(self._endpoint) as channel:
            self._server, self.up = stub(channel), True
            self.welcomed.set()
            self._events.on_up(self._welcome)
            await self._closed.wait()
            await asyncio.gather(*self._calls)
        self.up = False

    def send(self, layers: list[FrameLayer], *, deadline_ns: int | None, gate: Gate | None = None) -> int:
        frame_id, self._next_id = self._next_id, self._next_id + 1
        call = asyncio.get_running_loop().create_task(self._ask(frame_id, layers, gate))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return frame_id

    async def _ask(self, frame_id: int, layers: list[FrameLayer], gate: Gate | None) -> None:
        assert self._welcome is not None
        if gate is not None and not gate(0, len(layers[0].payload)):
            self._events.on_unsent(frame_id)
            return
        sent_ns = self._clock()
        request = pb.InferRequest(
            protocol_version=PROTOCOL_VERSION, model=self._welcome.model, bundle_sha256=self._welcome.bundle_sha256,
            layers=[replace(layer, frame_id=frame_id, sent_ns=sent_ns).to_proto() for layer in layers],
        )  # fmt: skip
        for layer in layers:
            self._events.on_sent(frame_id, layer.layer, len(layer.payload), sent_ns)
        try:
            with translated(self._endpoint):
                reply = await self._server.Infer(request, metadata=self._endpoint.metadata)
            result = Result.from_proto(reply.result)
        except HeadtailError as error:
            result = Result(frame_id=frame_id, error=error)
        self._events.on_result(result, self._clock())

    def restart(self) -> None: ...

    def close(self) -> None:
        self._closed.set()
