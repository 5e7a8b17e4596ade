"""Who calls, and what they may use: bearer tokens from a file, quotas per token.

A token file holds ``name token`` a line; blank lines and lines that begin with ``#`` are skipped. It is read again when
it changes. Only health answers without a token. Names appear in logs, tokens never.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from edge_server.config import SecurityConfig
from edge_server.status import CODE_METADATA
from protos.errors import AuthError, ConfigError, HeadtailError, LimitError

log = logging.getLogger(__name__)

_OPEN = ("/grpc.health.v1.Health/",)
_BURST_S = 1.0
_MIN_TOKEN_CHARS = 16
_MAX_FILE_BYTES = 1 << 20


@dataclass(slots=True)
class _Bucket:
    """A token bucket holding at most a second's worth."""

    per_s: float
    level: float = 0.0
    last_ns: int | None = None

    def take(self, amount: float, now_ns: int) -> bool:
        capacity = self.per_s * _BURST_S
        if self.last_ns is None:
            self.level = capacity
        else:
            self.level = min(capacity, self.level + self.per_s * max(0, now_ns - self.last_ns) / 1e9)
        self.last_ns = now_ns
        # Something larger than a whole second's worth passes when the bucket is full, and leaves a debt.
        if self.level < min(amount, capacity):
            return False
        self.level -= amount
        return True


@dataclass(slots=True)
class Client:
    """One token's holders together."""

    name: str = ""
    config: SecurityConfig = field(default_factory=SecurityConfig)
    sessions: int = 0
    _frames: _Bucket | None = None
    _bytes: _Bucket | None = None

    def __post_init__(self) -> None:
        if self.config.frames_per_s_per_token:
            self._frames = _Bucket(self.config.frames_per_s_per_token)
        if self.config.bytes_per_s_per_token:
            self._bytes = _Bucket(self.config.bytes_per_s_per_token)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Counts an open session.

        Raises:
            LimitError: the token's holders have as many as they may.
        """
        allowed = self.config.max_sessions_per_token
        if allowed and self.sessions >= allowed:
            raise LimitError(f"this token's {allowed} sessions are all in use", retryable=True)
        self.sessions += 1
        try:
            yield
        finally:
            self.sessions -= 1

    def admit_frame(self, n_bytes: int, now_ns: int) -> HeadtailError | None:
        """Counts a frame against the quota, or says why it is refused."""
        if self._frames is not None and not self._frames.take(1, now_ns):
            return LimitError(f"this token's quota of {self._frames.per_s:g} frames/s is used up", retryable=True)
        if self._bytes is not None and not self._bytes.take(n_bytes, now_ns):
            return LimitError(f"this token's quota of {self._bytes.per_s:g} bytes/s is used up", retryable=True)
        return None


_ANYONE = Client()
_client: ContextVar[Client] = ContextVar("client", default=_ANYONE)


def client_of(context: grpc.aio.ServicerContext[Any, Any]) -> Client:
    """Who makes this call; without a token file everyone is the same unlimited client."""
    del context  # the interceptor has put the client into the call's own context
    return _client.get()


def parse_tokens(text: str) -> dict[str, bytes]:
    """Name to token.

    Raises:
        ConfigError: a line is no pair, a name stands twice, or a token is too short to be one.
    """
    tokens: dict[str, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 2 or fields[0] in tokens or len(fields[1]) < _MIN_TOKEN_CHARS:
            raise ConfigError(
                f"line {number} of the token file must be 'name token', each name once, tokens of {_MIN_TOKEN_CHARS}+ characters"
            )
        tokens[fields[0]] = fields[1].encode()
    if not tokens:
        raise ConfigError("the token file holds no token")
    return tokens


class Tokens:
    """The token file, read again when it changes.

    Args:
        config: names the file and the quotas.

    Raises:
        ConfigError: the file cannot be read.
    """

    def __init__(self, config: SecurityConfig) -> None:
        if config.token_file is None:
            raise ConfigError("no token file is set")
        self._config = config
        self._path: Path = config.token_file
        self._stamp: tuple[int, int, int] = (0, 0, 0)
        self._tokens: dict[str, bytes] = {}
        self._clients: dict[str, Client] = {}
        self._read()

    def refresh(self) -> None:
        """Reads the file if it changed; one that cannot be read or parsed is logged and the old tokens stay."""
        try:
            if self._stat() != self._stamp:
                self._read()
                log.info("token file read again: %d tokens", len(self._tokens))
        except ConfigError as error:
            log.error("the token file was not taken over: %s", error.message)

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise ConfigError(f"cannot read the token file {self._path}: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> None:
        stamp = self._stat()
        if stamp[1] > _MAX_FILE_BYTES:
            raise ConfigError(f"the token file {self._path} is larger than {_MAX_FILE_BYTES} bytes")
        self._stamp = stamp
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the token file {self._path}: {error}") from error
        self._tokens = parse_tokens(text)

    def client(self, authorization: str) -> Client:
        """Whose token it is.

        Raises:
            AuthError: no one's.
        """
        scheme, _, token = authorization.partition(" ")
        given, found = token.strip().encode(), ""
        # Every token is compared, each in constant time: neither order nor content shows in the time taken.
        for name, known in self._tokens.items():
            if hmac.compare_digest(given, known):
                found = name
        if scheme.lower() != "bearer" or not found:
            raise AuthError("no valid token was presented; set HEADTAIL_TOKEN on the client")
        return self._clients.setdefault(found, Client(name=found, config=self._config))


Continuation = Callable[[grpc.HandlerCallDetails], Any]


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Lets only calls with a valid token through; health answers to everyone."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See grpc.aio."""
        if handler_call_details.method.startswith(_OPEN):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        try:
            client = self._tokens.client(given if isinstance(given, str) else "")
        except AuthError as error:
            return _refusing(error)
        _client.set(client)
        return await continuation(handler_call_details)


def _refusing(error: AuthError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        del request
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message, trailing_metadata=((CODE_METADATA, error.code),))

    # Whatever the call's shape, a stream-stream handler may end it before anything is read.
    return grpc.stream_stream_rpc_method_handler(refuse)
