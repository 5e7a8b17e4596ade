"""The door: the gRPC service in front of the backend."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio

from edge_server.access.auth import caller
from edge_server.access.quota import Caller
from edge_server.doors.answering import History
from edge_server.doors.fetch import FetchSlots, chunks
from edge_server.doors.session import Services, Session, host_of
from edge_server.doors.wire import checked
from edge_server.frames.assembly import read_frame
from edge_server.models import Model
from edge_server.status import translated
from protos.errors import DrainingError, HeadtailError, LimitError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import MAX_TRACEPARENT_CHARS, PROTOCOL_VERSION, Result

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Ingress:
    """The service.

    Args:
        services: store, backend and what else all calls share.
        anyone: who calls where no token is asked for.
    """

    def __init__(self, services: Services, anyone: Caller | None = None) -> None:
        self._anyone = anyone or Caller()
        self.sessions: set[Session] = set()
        self.calls = 0  # unary calls under way
        self.services = services
        self._fetches = FetchSlots(services.limits)
        self.draining = False

    def drain(self, grace_ns: int) -> None:
        """No new work; the sessions are told."""
        self.draining = True
        for session in self.sessions:
            session.drain(grace_ns, "the server is shutting down and takes no new frames")

    @property
    def client(self) -> Caller:
        """Who makes the call that is being answered."""
        return caller() or self._anyone

    def finish(self) -> None:
        """Sessions end once they have sent what they owe."""
        for session in self.sessions:
            session.finish()

    def counts(self) -> dict[str, int]:
        """What is in hand at this moment; all 0 once every client is gone."""
        datagrams = self.services.datagrams
        return {
            "sessions": len(self.sessions), "calls": self.calls,
            "pending_bytes": self.services.answerer.pending_bytes,
            "datagram_connections": datagrams.connections if datagrams is not None else 0,
        }  # fmt: skip

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Around a unary call that needs the tail: the shutdown waits for it.

        Raises:
            DrainingError: the shutdown has begun.
        """
        if self.draining:
            raise DrainingError("the server is shutting down")
        self.calls += 1
        try:
            yield
        finally:
            self.calls -= 1

    # ------------------------------------------------------------ the calls

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802 - gRPC's name
        """The models held."""
        async with translated(context, self.services.metrics.on_refused):
            checked(request)
        models = [described(model) for model in self.services.store.all()]
        return pb.ListModelsResponse(models=models, protocol_version=PROTOCOL_VERSION, server_version=self.services.version)

    async def FetchBundle(self, request: pb.FetchBundleRequest, context: Context) -> None:  # noqa: N802
        """A bundle's device part. Frames of other sessions go between two chunks; who does not read is let go."""
        client = self.client
        who = client.name or host_of(context)
        async with translated(context, self.services.metrics.on_refused), self._fetches.hold(who):
            model = self.services.store.get(checked(request).model)
            begun_ns, sent_bytes = self.services.clock(), 0
            for chunk in chunks(model, request.bundle_sha256, request.have):
                client.check()
                self._fetches.check(sent_bytes, (self.services.clock() - begun_ns) / 1e9)
                try:
                    async with asyncio.timeout(self.services.limits.write_s):
                        await context.write(chunk)
                except TimeoutError:
                    raise LimitError(f"the client has read nothing for {self.services.limits.write_s:g} s") from None
                sent_bytes += chunk.ByteSize()
                await asyncio.sleep(0)

    async def Infer(self, request: pb.InferRequest, context: Context) -> pb.InferResponse:  # noqa: N802
        """One frame, one answer."""
        async with translated(context, self.services.metrics.on_refused), self.call():
            return await self._infer(checked(request), trace_of(context), self.client.name or host_of(context))
        raise AssertionError  # translated() has ended the call

    async def Session(self, request_iterator: Any, context: Context) -> None:  # noqa: N802
        """A camera's stream."""
        del request_iterator  # read() on the context waits without a generator in between
        async with translated(context, self.services.metrics.on_refused):
            if self.draining:
                raise DrainingError("the server is shutting down")
            if len(self.sessions) >= self.services.limits.max_sessions:
                raise LimitError(f"{len(self.sessions)} sessions are open, the most this server allows", retryable=True)
            client = self.client
            session = Session(self.services, context, client)
            with client.session(session.end):
                self.sessions.add(session)
                try:
                    await session.run()
                except HeadtailError as error:
                    log.info("session %s ended: %s", session.id, error.message)
                    raise
                finally:
                    self.sessions.discard(session)

    async def _infer(self, request: pb.InferRequest, traceparent: str, who: str) -> pb.InferResponse:
        if request.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the client speaks protocol version {request.protocol_version}, this server {PROTOCOL_VERSION}"
            )
        model = self.services.store.get(request.model)
        if request.bundle_sha256 != model.sha256:
            raise VersionMismatchError(
                f"the frame was made with bundle {request.bundle_sha256[:12] or '(none)'}, the server's tail is {model.sha256[:12]}"
            )
        with self.services.store.hold(model):
            result = await self._held(model, request, traceparent, who)
        return pb.InferResponse(result=result.to_proto())

    async def _held(self, model: Model, request: pb.InferRequest, traceparent: str, who: str) -> Result:
        now_ns = self.services.clock()
        n_bytes = sum(len(layer.payload) for layer in request.layers)
        refusal = self.client.admit_frame(n_bytes, now_ns)
        if refusal is not None:
            raise refusal
        await asyncio.sleep(self.services.pace.wait_s(who, n_bytes, now_ns))
        frame = read_frame(request, self.services.limits, now_ns)
        if traceparent and not frame.traceparent:
            frame = replace(frame, traceparent=traceparent)
        return await self.services.answerer.answer(model, frame, History(), who)


def described(model: Model) -> pb.ModelInfo:
    """A model as the protocol names it."""
    return pb.ModelInfo(
        name=model.name, task=model.bundle.manifest.task, bundle_sha256=model.sha256, device_bytes=model.device_bytes
    )


def trace_of(context: Context) -> str:
    """The call's ``traceparent`` metadata; empty without."""
    for name, value in context.invocation_metadata() or ():
        if name == "traceparent" and isinstance(value, str) and len(value) <= MAX_TRACEPARENT_CHARS:
            return value
    return ""
