"""Who calls: bearer tokens from a file. Operators, who may load and unload models, have a file of their own.

A token file holds ``name token`` a line; blank lines and lines that begin with ``#`` are skipped. It is read again when
it changes, and who holds a token that is no longer in it loses its session. Only health answers without a token. Names appear
in logs, tokens never: of a token only its SHA-256 is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Container
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from edge_server.access.quota import Caller
from edge_server.config import SecurityConfig
from edge_server.files import read_small
from edge_server.status import CODE_METADATA
from protos.errors import AuthError, ConfigError, HeadtailError

log = logging.getLogger(__name__)

HEALTH = "/grpc.health.v1.Health/"
_MIN_TOKEN_CHARS = 16
_POLL_S = 0.5
_MAX_FILE_BYTES = 1 << 20

Stamp = tuple[int, int, int]

_client: ContextVar[Caller | None] = ContextVar("client", default=None)


def caller() -> Caller | None:
    """Whose token opened the call that is being answered; None: no token was asked for."""
    return _client.get()


def parse_tokens(text: str, what: str = "token file") -> dict[str, bytes]:
    """Name to the token's SHA-256; empty where the file holds none.

    Args:
        text: the file's.
        what: it is, for the message.

    Raises:
        ConfigError: a line is no pair, a name or token stands twice, or a token is too short to be one or cannot be sent.
    """
    tokens: dict[str, bytes] = {}
    taken: set[bytes] = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 2 or fields[0] in tokens or len(fields[1]) < _MIN_TOKEN_CHARS:
            raise ConfigError(
                f"line {number} of the {what} must be 'name token', each name once, tokens of {_MIN_TOKEN_CHARS}+ characters"
            )
        if not line.rstrip("\r").replace("\t", " ").isprintable() or not fields[1].isascii():
            raise ConfigError(
                f"line {number} of the {what} holds control characters or a token that is not ASCII, which no client can send"
            )
        digest = _digest(fields[1])
        if digest in taken:
            raise ConfigError(f"line {number} of the {what} holds a token that another name has already")
        taken.add(digest)
        tokens[fields[0]] = digest
    return tokens


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class Tokens:
    """The token file, read again when it changes.

    Args:
        config: names the file and the quotas.
        max_unary: frames of unary calls each token's holders may have unanswered.
        operators: the holders are operators, and the file is the operators'.

    Raises:
        ConfigError: the file cannot be read, or holds no token.
    """

    def __init__(self, config: SecurityConfig, *, max_unary: int = 256, operators: bool = False) -> None:
        path = config.operator_token_file if operators else config.token_file
        if path is None:
            raise ConfigError("no token file is set")
        self._config = SecurityConfig() if operators else config
        self._max_unary = max_unary
        self._operators = operators
        self._what = "operator token file" if operators else "token file"
        self._path: Path = path
        self._clients: dict[str, Caller] = {}
        self._complaint = ""
        self._stamp = self._seen = self._stat()
        self._tokens = self._read()
        if not self._tokens:
            raise ConfigError(f"the {self._what} holds no token: nobody could use {'its calls' if operators else 'this server'}")

    async def watch(self) -> None:
        """`refresh` now and then, for ever."""
        while True:
            await asyncio.sleep(_POLL_S)
            self.refresh()

    def refresh(self) -> None:
        """Reads the file if it changed, and ends the sessions of tokens that are no longer in it.

        A change is taken over when the file has stayed the same from one call to the next, so that one that is being
        written shuts nobody out. One that cannot be read or parsed is logged once, and the old tokens stay.
        """
        try:
            stamp = self._stat()
            settled, self._seen = stamp == self._seen, stamp
            if stamp == self._stamp:
                self._complaint = ""
                return
            if not settled:
                return
            fresh = self._read()
        except ConfigError as error:
            if error.message != self._complaint:
                log.error("the %s was not taken over, the old tokens stay: %s", self._what, error.message)
            self._complaint = error.message
            return
        self._complaint = ""
        self._stamp = stamp
        old, self._tokens = self._tokens, fresh
        log.log(logging.INFO if fresh else logging.WARNING, "%s read again: %d tokens", self._what, len(fresh))
        for name, digest in old.items():
            if fresh.get(name) != digest and (client := self._clients.pop(name, None)) is not None:
                log.info("the token of %s was withdrawn; %d sessions are ended", name, client.revoke())

    def _stat(self) -> Stamp:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise ConfigError(f"cannot read the {self._what} {self._path}: {error.strerror}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> dict[str, bytes]:
        try:
            return parse_tokens(read_small(self._path, self._what, most_bytes=_MAX_FILE_BYTES).decode("utf-8-sig"), self._what)
        except UnicodeDecodeError as error:  # whose text would show bytes of the file
            raise ConfigError(f"the {self._what} {self._path} is no UTF-8 text") from error

    def shares_one_with(self, other: Tokens) -> bool:
        """Whether some token stands in both files."""
        return not set(self._tokens.values()).isdisjoint(other._tokens.values())

    def client(self, authorization: str) -> Caller:
        """Whose token it is.

        Raises:
            AuthError: no one's.
        """
        scheme, _, token = authorization.partition(" ")
        given, found = _digest(token.strip()), ""
        # Digests of one length, every one compared and each in constant time: neither order, length nor content shows.
        for name, known in self._tokens.items():
            if hmac.compare_digest(given, known):
                found = name
        if scheme.lower() != "bearer" or not found:
            raise AuthError(
                "this call needs the token of an operator"
                if self._operators
                else "no valid token was presented; set HEADTAIL_TOKEN on the client"
            )
        client = self._clients.get(found)
        if client is None:
            client = self._clients[found] = Caller(
                name=found, config=self._config, max_unary=self._max_unary, operator=self._operators
            )
        return client


def open_tokens(config: SecurityConfig, *, max_unary: int = 256) -> tuple[Tokens | None, Tokens | None]:
    """The tokens of all who may call, and of operators; None where there is no such file.

    Raises:
        ConfigError: a file cannot be used, or a token stands in both: every holder would be an operator.
    """
    everyone = Tokens(config, max_unary=max_unary) if config.token_file is not None else None
    operators = Tokens(config, max_unary=max_unary, operators=True) if config.operator_token_file is not None else None
    if everyone is not None and operators is not None and operators.shares_one_with(everyone):
        raise ConfigError("a token stands in both the token file and the operator token file; operators need tokens of their own")
    return everyone, operators


Continuation = Callable[[grpc.HandlerCallDetails], Any]


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Lets only calls with a valid token through; health answers to everyone, an operator's calls to operators alone.

    Args:
        tokens: the valid ones; None: no call but an operator's needs one.
        on_refused: told the error's code of every call that is turned away.
        operators: the tokens of operators; None: there are none, and their calls are refused.
        operator_calls: full names of the calls that only operators may make.
    """

    def __init__(
        self,
        tokens: Tokens | None,
        on_refused: Callable[[str], None],
        *,
        operators: Tokens | None = None,
        operator_calls: Container[str] = (),
    ) -> None:
        self._tokens = tokens
        self._on_refused = on_refused
        self._operators = operators
        self._operator_calls = operator_calls

    async def intercept_service(self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See grpc.aio."""
        if handler_call_details.method.startswith(HEALTH):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        try:
            client = self._client(handler_call_details.method, given if isinstance(given, str) else "")
        except AuthError as error:
            self._on_refused(error.code)
            return refusing(error)
        _client.set(client)
        return await continuation(handler_call_details)

    def _client(self, method: str, given: str) -> Caller | None:
        if method in self._operator_calls:
            if self._operators is None:
                raise AuthError("this server takes no operator's calls; it was started without --operator-token-file")
            return self._operators.client(given)
        return self._tokens.client(given) if self._tokens is not None else None


def refusing(error: HeadtailError) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler that ends any call, whatever its shape, before anything of it is read."""

    async def refuse(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        del request
        status = grpc.StatusCode[error.grpc_status]
        await context.abort(status, error.message, trailing_metadata=((CODE_METADATA, error.code),))

    return grpc.stream_stream_rpc_method_handler(refuse)
