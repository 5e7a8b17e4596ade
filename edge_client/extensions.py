"""Where the client's parts are found by name: ours, an installed package's by entry point, or ``module:Class`` on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from protos.errors import ConfigError
from splitters.registry import Registry

POLICIES: Registry[Callable[..., Any]] = Registry(
    "headtail.policies", "policy", {"adaptive": "edge_client.control.controller:Controller"}
)
"""Called as ``Controller`` is: (config, points, *, local, offloads, head_ms); gives an ``edge_client.control.Policy``."""

TRANSPORTS: Registry[Callable[..., Any]] = Registry(
    "headtail.transports",
    "transport",
    {
        "grpc": "edge_client.transport.grpc:GrpcLink",
        "quic": "edge_client.transport.quic:QuicLink",
        "auto": "edge_client.transport.quic:AutoLink",
    },
)
"""Called as ``GrpcLink`` is: (endpoint, events, *, clock); gives an ``edge_client.transport.base.Link``."""

SINKS: Registry[Callable[[str, Callable[[], Mapping[int, str]]], Any]] = Registry("headtail.sinks", "sink")
"""Called with what stands behind ``=`` on the command line and a function that gives the labels; gives a ``sinks.Sink``."""


def make(registry: Registry[Callable[..., Any]], name: str, *given: Any, **named: Any) -> Any:
    """Makes the part that ``name`` stands for.

    Raises:
        ConfigError: there is none of that name, or it does not take what it is given.
    """
    factory = registry.find(name)
    try:
        signature(factory).bind(*given, **named)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be used here: {error}") from error
    return factory(*given, **named)
