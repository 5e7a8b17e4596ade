"""What every call passes before its first byte is read: limits on how many there are, and on how long a request may take.

gRPC counts calls, but reads a unary request for as long as its sender likes: a few thousand half-sent ones would fill the
count and lock everybody out. So unary requests are taken as what they are on the wire, streams of one message, and read
here, in bounded time. Health, which answers without a token, has a count of its own and cannot crowd out the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it

from edge_server import wire
from edge_server.auth import HEALTH, Continuation, caller, refusing
from edge_server.config import Limits
from edge_server.quota import Client
from edge_server.status import abort
from protos.errors import HeadtailError, LimitError, ProtocolError

Context = grpc.aio.ServicerContext[Any, Any]

SESSION = f"/{wire.SERVICE}/Session"


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Counts and times all calls but sessions, which have their own limits. Comes after the token's interceptor.

    Args:
        limits: how many, how long.
        anyone: who calls where no token is asked for.
        on_refused: told the error's code of every call that is turned away.
    """

    def __init__(self, limits: Limits, anyone: Client, on_refused: Callable[[str], None]) -> None:
        self._limits = limits
        self._anyone = anyone
        self._on_refused = on_refused
        self.health_calls = 0
        self.other_calls = 0

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
        return self._guarded(handler, health=method.startswith(HEALTH))

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
                self.health_calls += 1
                try:
                    yield
                finally:
                    self.health_calls -= 1
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
        return wire.MALFORMED if request is EOF else request

    def _guarded(self, handler: grpc.RpcMethodHandler[Any, Any], *, health: bool) -> grpc.RpcMethodHandler[Any, Any]:
        behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def unary(requests: Any, context: Context) -> Any:
            async with self._counted(context, health=health):
                return await behaviour(requests if handler.request_streaming else await self._request(context), context)

        async def stream(requests: Any, context: Context) -> None:
            async with self._counted(context, health=health):
                answers = behaviour(requests if handler.request_streaming else await self._request(context), context)
                if hasattr(answers, "__aiter__"):
                    async for answer in answers:
                        await context.write(answer)
                else:
                    await answers

        make: Any = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        serve: Any = stream if handler.response_streaming else unary
        return make(serve, handler.request_deserializer, handler.response_serializer)  # type: ignore[no-any-return]
