"""Where a page listens, and what its visitors must know. Needs nothing but Python, so that settings can be checked anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Final

from protos.errors import ConfigError, MissingDependencyError

TOKEN_VARIABLE: Final = "HEADTAIL_WEB_TOKEN"  # noqa: S105 - the variable's name
MIN_TOKEN_CHARS: Final = 12


@contextmanager
def needing_aiohttp() -> Iterator[None]:
    """Around the import of a page's server.

    Raises:
        MissingDependencyError: aiohttp is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError("--web needs aiohttp: pip install 'headtail[web]'") from error


def page_address(text: str) -> tuple[str, int]:
    """Host and port of ``--web``.

    Raises:
        ConfigError: it is no address.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and len(port) <= len("65535") and int(port) < 1 << 16):
        raise ConfigError(f"--web must be host:port, for instance 127.0.0.1:8080, got {text!r}")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def token_for(host: str, environment: Mapping[str, str] = os.environ) -> str:
    """The token of a page that listens on ``host``; empty: none is needed.

    Raises:
        ConfigError: others can reach the address and there is no token, or one that is soon guessed.
    """
    token = environment.get(TOKEN_VARIABLE, "")
    if token and (len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable()):
        raise ConfigError(f"{TOKEN_VARIABLE} must have at least {MIN_TOKEN_CHARS} characters, all of them printable ASCII")
    if not token and not is_loopback(host):
        raise ConfigError(f"--web {host}: others can reach this address; set {TOKEN_VARIABLE} to what they must know")
    return token
