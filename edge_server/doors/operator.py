"""The operator's calls: models are loaded and unloaded while the server runs.

Only the holder of an operator's token gets here. A path is one below the server's models directory, links resolved; the
operator cannot make the server read anything else.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path, PurePosixPath
from typing import Any

import grpc.aio

from edge_server.access.auth import caller
from edge_server.doors.grpc import Ingress, described
from edge_server.doors.wire import checked
from edge_server.loading import Loading
from edge_server.status import translated
from protos.errors import AuthError, BundleError, ConfigError, DrainingError
from protos.headtail.v1 import headtail_pb2 as pb

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_MAX_PATH_CHARS = 512
_NOT_BELOW = "give the bundle's path relative to the server's models directory, with / between its parts and no '..'"


class Operator:
    """The calls.

    Args:
        ingress: whose shutdown they respect, and whose refusals are counted.
        loading: does what they ask for.
        models_dir: bundles may be loaded from below it; None: no bundle may be loaded.
    """

    def __init__(self, ingress: Ingress, loading: Loading, models_dir: Path | None) -> None:
        self._ingress = ingress
        self._loading = loading
        self._models_dir = models_dir

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:  # noqa: N802 - gRPC's name
        """Puts a bundle into use."""
        async with translated(context, self._ingress.services.metrics.on_refused):
            who, path = self._operator(), checked(request).path
            source = await asyncio.get_running_loop().run_in_executor(None, below, self._models_dir, path)
            log.info("operator %s loads %s", who, source)
            return pb.LoadModelResponse(model=described(await self._loading.add(str(source))))
        raise AssertionError  # translated() has ended the call

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:  # noqa: N802
        """Takes a model out of use."""
        async with translated(context, self._ingress.services.metrics.on_refused):
            who, name = self._operator(), checked(request).model
            log.info("operator %s unloads %r", who, name[:100])
            return pb.UnloadModelResponse(sessions=await self._loading.remove(name))
        raise AssertionError  # translated() has ended the call

    def _operator(self) -> str:
        """The caller's name; the interceptor has asked for the token, this makes sure that it stands before this door."""
        client = caller()
        if client is None or not client.operator:
            raise AuthError("this call needs the token of an operator")
        client.check()
        if self._ingress.draining:
            raise DrainingError("the server is shutting down")
        return client.name


def below(models_dir: Path | None, path: str) -> Path:
    """A bundle's directory below the models directory, links resolved.

    Raises:
        ConfigError: there is no such directory, or the path is none below it.
        BundleError: nothing lies there.
    """
    if models_dir is None:
        raise ConfigError("this server loads no bundles at run time; it was started without --models-dir")
    pure = PurePosixPath(path)
    odd = not path.isprintable() or "\\" in path or len(path) > _MAX_PATH_CHARS
    if odd or not pure.parts or pure.is_absolute() or ".." in pure.parts:
        raise ConfigError(_NOT_BELOW)
    try:
        root = models_dir.resolve(strict=True)
        found = (root / pure).resolve()
        held = found != root and found.is_relative_to(root)
        exists = held and found.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is too long
        raise ConfigError(_NOT_BELOW) from error
    if not held:
        raise ConfigError(_NOT_BELOW)
    if not exists:
        raise BundleError(f"no bundle lies at {path!r} below the server's models directory")
    return found
