"""Channels to a server, and gRPC's failures in the project's own words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio

from protos.errors import (
    BY_CODE,
    AuthError,
    ConfigError,
    DrainingError,
    HeadtailError,
    LimitError,
    ModelError,
    ProtocolError,
    UnknownModelError,
    UnreachableError,
    VersionMismatchError,
    from_peer,
)
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import headtail_pb2_grpc as pb_grpc
from protos.messages import MAX_PAYLOAD_BYTES

CODE_METADATA = "headtail-code"
MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + (64 << 10)
TOKEN_VARIABLE = "HEADTAIL_TOKEN"  # noqa: S105 - the variable's name, not a token

_BY_STATUS: dict[grpc.StatusCode, type[HeadtailError]] = {
    grpc.StatusCode.NOT_FOUND: UnknownModelError,
    grpc.StatusCode.FAILED_PRECONDITION: VersionMismatchError,
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitError,
    grpc.StatusCode.UNAUTHENTICATED: AuthError,
    grpc.StatusCode.PERMISSION_DENIED: AuthError,
}
# A killed replica shows as any of these; the next attempt may succeed.
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN,
              grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED)  # fmt: skip

_PLAIN = {
    "Connection refused": "connection refused",
    "Domain name not found": "the name cannot be resolved",
    "errors resolving": "the name cannot be resolved",
    "DNS": "the name cannot be resolved",
    "Name or service": "the name cannot be resolved",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of an authority this client trusts; --tls-ca names another",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; leave --tls and --tls-ca out",
    "Hostname Verification": "its certificate is for another name",
    "No match found for server name": "its certificate is for another name",
    "CERTIFICATE_REQUIRED": "it wants a client certificate: --tls-cert and --tls-key",
    "certificate required": "it wants a client certificate: --tls-cert and --tls-key",
    "Socket closed": "the connection was closed",
    "FD Shutdown": "the connection was closed",
    "reset by peer": "the connection was reset",
    "Ssl handshake": "the TLS handshake failed",
    "SSL": "the TLS handshake failed",
    "unreachable": "the network is unreachable",
}


_CLOSED = ("the connection was closed", "the connection was reset")


def is_port(text: str) -> bool:
    """Whether it is a number 0..65535."""
    return text.isascii() and text.isdecimal() and len(text) <= len("65535") and int(text) < 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Where the server is and how to talk to it.

    Attributes:
        address: ``host:port``.
        tls_ca: the certificate authority's file; setting it (or ``tls``) encrypts the connection.
        tls_cert, tls_key: the client's own certificate, for mutual TLS.
        token: sent as a bearer token; never logged.
        shared: sessions of this process to the same server go through one connection.
    """

    address: str
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: str = field(default="", repr=False)
    shared: bool = False

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host.isprintable() or not host or " " in host or not is_port(port) or int(port) == 0:
            raise ConfigError(f"--server must be host:port, for instance edge.example:50051, or 'embedded', got {self.address!r}")
        if "/" in self.address or "@" in host:
            raise ConfigError(f"--server takes host:port without scheme or path, got {self.address!r}; --tls encrypts")
        if not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError(f"the token in {TOKEN_VARIABLE} holds other characters than printable ASCII")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key belong together")

    @property
    def secure(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or self.tls_ca is not None or self.tls_cert is not None

    @property
    def metadata(self) -> Sequence[tuple[str, str]]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


if TYPE_CHECKING:
    Call = grpc.aio.StreamStreamCall[pb.ClientMessage, pb.ServerMessage]


def stub(channel: grpc.aio.Channel) -> Any:
    """The server's methods."""
    return pb_grpc.HeadtailStub(channel)  # type: ignore[no-untyped-call]


def token_from_environment() -> str:
    """The bearer token, which never stands on a command line."""
    return os.environ.get(TOKEN_VARIABLE, "").strip()


def open_channel(endpoint: Endpoint) -> grpc.aio.Channel:
    """A fresh channel that shares nothing with earlier ones, their back-off included: reconnecting is our business.

    Channels of a ``shared`` endpoint share their connection with each other.

    Raises:
        ConfigError: a certificate cannot be read.
    """
    options = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.use_local_subchannel_pool", 0 if endpoint.shared else 1),
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.enable_http_proxy", 0),
    ]
    if not endpoint.secure:
        return grpc.aio.insecure_channel(endpoint.address, options=options)
    credentials = grpc.ssl_channel_credentials(_read(endpoint.tls_ca), _read(endpoint.tls_key), _read(endpoint.tls_cert))
    return grpc.aio.secure_channel(endpoint.address, credentials, options=options)


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if b"-----BEGIN " not in data:
        raise ConfigError(f"{path} is no PEM file")
    return data


def translate(error: grpc.aio.AioRpcError, address: str, *, secure: bool = True) -> HeadtailError:
    """A failed call as an error of the tree; the server's own code wins where it sent one.

    Args:
        error: gRPC's.
        address: of the server, for the sentence.
        secure: whether we spoke TLS.
    """
    status, details = error.code(), error.details() or ""
    code = next((str(v) for k, v in cast("Iterable[tuple[str, str]]", error.trailing_metadata() or ()) if k == CODE_METADATA), "")
    if code in BY_CODE:
        return from_peer(code, details or f"the server at {address} refused")
    if "http1" in details.lower() or "HTTP/2 (Expected SETTINGS" in details:
        return UnreachableError(f"what answers at {address} is no headtail server: it does not speak gRPC", retryable=False)
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return UnreachableError(f"what answers at {address} speaks gRPC, but it is no headtail server", retryable=False)
    if status is grpc.StatusCode.UNAVAILABLE and "drain" in details.lower():
        return DrainingError(details)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnreachableError(f"what listens at {address} did not answer as a headtail server in time")
    if status in _TRANSIENT:
        why = _short(details) or status.name.lower()
        hint = "; a server with TLS wants --tls or --tls-ca" if not secure and why in _CLOSED else ""
        return UnreachableError(f"no headtail server answers at {address} ({why}{hint})")
    if status in _BY_STATUS:
        return _BY_STATUS[status](details or f"the server at {address} answered {status.name}")
    return ModelError(f"the server at {address} failed: {_short(details) or status.name}", retryable=True)


def _short(details: str) -> str:
    """GRPC's text without its list of addresses."""
    text = details.rpartition("; last error: ")[2] or details
    for known, plain in _PLAIN.items():
        if known in text:
            return plain
    return text.splitlines()[0][:160] if text else ""


@contextmanager
def translated(endpoint: Endpoint) -> Iterator[None]:
    """The client's one place where gRPC's exceptions become the project's."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise translate(error, endpoint.address, secure=endpoint.secure) from error
    except grpc.aio.UsageError as error:
        raise UnreachableError(f"the stream to {endpoint.address} ended") from error
