"""What every call passes before its first byte is read: limits on how many there are, and on how long one may take.

gRPC counts calls, but reads a unary request for as long as its sender likes, and holds an answer for as long as its receiver
does not take it: a few thousand such calls would fill the count and lock everybody out. So unary calls are taken as what
they are on the wire, streams of one message, read and answered here in bounded time. Health, which answers without a token,
has a count of its own, of which each host gets a small part; so no host keeps the others or a probe from being answered.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it

from edge_server.access.auth import HEALTH, Continuation, caller, refusing
from edge_server.access.quota import Caller
from edge_server.config import Limits
from edge_server.doors import wire
from edge_server.status import abort
from protos.errors import HeadtailError, LimitError, ProtocolError

Context = grpc.aio.ServicerContext[Any, Any]

SESSION = f"/{wire.SERVICE}/Session"
OURS = (f"/{wire.SERVICE}/", f"/{wire.OPEN_INFERENCE_SERVICE}/")
_MAX_FOREIGN_BYTES = 4096  # of a request to health or reflection; a watch, which needs no token, holds its own while it is open


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Counts and times all calls but sessions, which have their own limits. Comes after the token's interceptor.

    Args:
        limits: how many, how long.
        anyone: who calls where no token is asked for.
        on_refused: told the error's code of every call that is turned away.
    """

    def __init__(self, limits: Limits, anyone: Caller, on_refused: Callable[[str], None]) -> None:
        self._limits = limits
        self._anyone = anyone
        self._on_refused = on_refused
        self.health_calls = 0
        self.other_calls = 0
        self._health_hosts: Counter[str] = Counter()

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See grpc.aio."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or method == SESSION:
            return handler
        # Refused here already where it can be: then nothing of the request is read.
        try:
            self._check(health=method.startswith(HEALTH))
        except LimitError as error:
            self._on_refused(error.code)
            return refusing(error)
        return self._guarded(handler, health=method.startswith(HEALTH), foreign=not method.startswith(OURS))

    def _check(self, *, health: bool) -> None:
        count, allowed = (
            (self.health_calls, self._limits.max_health_calls) if health else (self.other_calls, self._limits.max_calls)
        )
        if count >= allowed:
            raise LimitError(f"{count} such calls are open, the most this server allows", retryable=True)

    @asynccontextmanager
    async def _counted(self, context: Context, *, health: bool) -> AsyncIterator[None]:
        try:
            self._check(health=health)
            if health:
                host = context.peer().rpartition(":")[0]
                if self._health_hosts[host] >= self._limits.max_health_calls_per_host:
                    raise LimitError("this host has as many health checks and watches open as it may", retryable=True)
                self.health_calls += 1
                self._health_hosts[host] += 1
                try:
                    yield
                finally:
                    self.health_calls -= 1
                    self._health_hosts[host] -= 1
                    self._health_hosts += Counter()  # hosts without a call are forgotten
            else:
                with (caller() or self._anyone).unary_frames():
                    self.other_calls += 1
                    try:
                        yield
                    finally:
                        self.other_calls -= 1
        except HeadtailError as error:
            self._on_refused(error.code)
            await abort(context, error)

    async def _request(self, context: Context) -> Any:
        try:
            async with asyncio.timeout(self._limits.hello_s):
                request = await context.read()
        except TimeoutError:
            raise ProtocolError(f"the request was not complete within {self._limits.hello_s:g} s") from None
        except (DecodeError, ValueError) as error:  # of services not ours; our own readers never raise
            raise ProtocolError("the request is no message of this protocol") from error
        if request is EOF:
            raise ProtocolError("the call ended without a request")
        return request

    async def _answer(self, context: Context, answer: Any) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s):
                await context.write(answer)
        except TimeoutError:
            raise LimitError(f"the client has read nothing for {self._limits.write_s:g} s") from None

    def _guarded(self, handler: grpc.RpcMethodHandler[Any, Any], *, health: bool, foreign: bool) -> grpc.RpcMethodHandler[Any, Any]:
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        parse: Any = handler.request_deserializer

        def reader(data: bytes) -> Any:
            if foreign and len(data) > _MAX_FOREIGN_BYTES:
                raise ValueError(f"a request of {len(data)} bytes")
            return parse(data)

        async def serve(requests: Any, context: Context) -> None:
            async with self._counted(context, health=health):
                given = requests if handler.request_streaming else await self._request(context)
                answers = behaviour(given, context)
                if hasattr(answers, "__aiter__"):
                    async for answer in answers:
                        await self._answer(context, answer)
                elif (answer := await answers) is not None:
                    await self._answer(context, answer)

        make: Any = grpc.stream_stream_rpc_method_handler
        return make(serve, reader, handler.response_serializer)  # type: ignore[no-any-return]
