"""The server's one place where the project's errors become gRPC statuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from protos.errors import HeadtailError, InternalError

log = logging.getLogger(__name__)

CODE_METADATA = "headtail-code"  # trailing metadata: the error's code, so that the client rebuilds the very same error
_MAX_DETAILS = 1000  # details travel in a header; longer ones are refused by peers


def status_of(error: HeadtailError) -> grpc.StatusCode:
    """The status an error maps to."""
    return grpc.StatusCode[error.grpc_status]


@asynccontextmanager
async def translated(context: grpc.aio.ServicerContext[Any, Any], on_refused: Callable[[str], None]) -> AsyncIterator[None]:
    """Ends the call with the status of whatever error leaves the block; ``on_refused`` is told its code."""
    try:
        yield
    except HeadtailError as error:
        on_refused(error.code)
        await abort(context, error)
    except (grpc.aio.AbortError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("a call failed")
        on_refused(InternalError.code)
        await abort(context, InternalError("the server failed; its log says why"))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: HeadtailError) -> None:
    """Ends the call with an error. Never returns."""
    text = error.message.replace("\n", " ")[:_MAX_DETAILS]
    try:
        await context.abort(status_of(error), text, trailing_metadata=((CODE_METADATA, error.code),))
    except grpc.aio.InternalError:
        # A write is still under way because the peer does not read: gRPC takes no status behind it, and resets the stream
        # once the handler has ended.
        log.info("a call could not be told why it ends: %s", text)
        raise asyncio.CancelledError from None
