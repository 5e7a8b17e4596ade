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


def make(registry: Registry[Callable[..., Any]], contract: type[Any], name: str, *given: Any, **named: Any) -> Any:
    """Makes the part that ``name`` stands for; ``contract`` is the protocol that it must fulfil.

    Raises:
        ConfigError: there is none of that name, it does not take what it is given, or it lacks methods that it will be asked for.
    """
    factory = registry.find(name)
    try:
        signature(factory).bind(*given, **named)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} cannot be used here: {error}") from error
    lacking = sorted(getattr(factory, "__abstractmethods__", ()))  # of a class that derives from the contract
    made = None if lacking else factory(*given, **named)
    lacking = lacking or [n for n in vars(contract) if not n.startswith("_") and not hasattr(made, n)]
    if lacking:
        raise ConfigError(f"{name} lacks {', '.join(lacking)}; {contract.__module__}.{contract.__name__} says what each does")
    return made
