"""The error tree. Every failure a person or the wire can see is one of these.

HeadtailError
├── ConfigError            a setting or argument is wrong                    INVALID_ARGUMENT     exit 2
│   └── MissingDependencyError   an extra is not installed                   FAILED_PRECONDITION  exit 2
├── SourceError            the camera, file or directory gives no frames     NOT_FOUND            exit 3
├── BundleError            a bundle is absent, altered or unreadable         DATA_LOSS            exit 4
├── UnknownModelError      the server does not hold that model               NOT_FOUND            exit 5
├── VersionMismatchError   protocol version or bundle hash differ            FAILED_PRECONDITION  exit 6
├── UnreachableError       no headtail server answers there                  UNAVAILABLE          exit 7
├── ProtocolError          the peer broke the protocol                       INVALID_ARGUMENT     exit 8
│   └── PayloadError       a payload is corrupt or not decodable             INVALID_ARGUMENT     exit 8
├── LimitError             something is larger or more than allowed          RESOURCE_EXHAUSTED   exit 9
│   └── OverloadedError    the server cannot take this frame in time         RESOURCE_EXHAUSTED   exit 9
├── AuthError              no valid token or certificate                     UNAUTHENTICATED      exit 10
├── DrainingError          the server is shutting down                       UNAVAILABLE          exit 7
├── StorageError           a disk is full, or takes no more                  RESOURCE_EXHAUSTED   exit 12
├── ModelError             a model cannot be loaded, cut or run              INTERNAL             exit 11
│   └── CutError           a cut cannot be made or does not verify           FAILED_PRECONDITION  exit 11
└── InternalError          our own fault; the log holds the traceback        INTERNAL             exit 1

Late, filtered and dropped frames are outcomes of a frame, not errors.
"""

from __future__ import annotations

from typing import ClassVar

from protos.text import printable


class HeadtailError(Exception):
    """Root of the tree.

    Attributes:
        code: the machine-readable name, stable across versions; what travels on the wire.
        grpc_status: name of the ``grpc.StatusCode`` this maps to.
        exit_code: what a command line ends with.
        retryable: whether the same call may succeed later without a change.
    """

    code: ClassVar[str] = "headtail"
    grpc_status: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1
    retryable: bool = False

    def __init__(self, message: str, *, retryable: bool | None = None) -> None:
        self.message = printable(message)  # it may quote a peer, a file or its name
        super().__init__(self.message)
        if retryable is not None:
            self.retryable = retryable


class ConfigError(HeadtailError):
    """A setting or argument is wrong."""

    code, grpc_status, exit_code = "config", "INVALID_ARGUMENT", 2


class MissingDependencyError(ConfigError):
    """An optional package is not installed; the message names the extra."""

    code, grpc_status = "missing_dependency", "FAILED_PRECONDITION"


class SourceError(HeadtailError):
    """The camera, file or directory gives no frames."""

    code, grpc_status, exit_code = "source", "NOT_FOUND", 3


class BundleError(HeadtailError):
    """A bundle is absent, altered, truncated or of an unknown format."""

    code, grpc_status, exit_code = "bundle", "DATA_LOSS", 4


class UnknownModelError(HeadtailError):
    """The server does not hold the model asked for; the message lists those it holds."""

    code, grpc_status, exit_code = "unknown_model", "NOT_FOUND", 5


class VersionMismatchError(HeadtailError):
    """Protocol versions or bundle hashes of the two sides differ."""

    code, grpc_status, exit_code = "version_mismatch", "FAILED_PRECONDITION", 6


class UnreachableError(HeadtailError):
    """Nothing that speaks headtail answers at the address."""

    code, grpc_status, exit_code, retryable = "unreachable", "UNAVAILABLE", 7, True


class ProtocolError(HeadtailError):
    """The peer sent something the protocol does not allow."""

    code, grpc_status, exit_code = "protocol", "INVALID_ARGUMENT", 8


class PayloadError(ProtocolError):
    """A payload is corrupt, truncated below its base layer, or not of this bundle."""

    code = "payload"


class LimitError(HeadtailError):
    """Something is larger, or comes more often, than the receiver allows."""

    code, grpc_status, exit_code = "limit", "RESOURCE_EXHAUSTED", 9


class OverloadedError(LimitError):
    """The server cannot answer this frame before its deadline, so it does not begin."""

    code, retryable = "overloaded", True


class AuthError(HeadtailError):
    """No valid token or client certificate was presented."""

    code, grpc_status, exit_code = "auth", "UNAUTHENTICATED", 10


class DrainingError(HeadtailError):
    """The server is shutting down and takes no new work."""

    code, grpc_status, exit_code, retryable = "draining", "UNAVAILABLE", 7, True


class StorageError(HeadtailError):
    """A disk is full or takes no more; the message says which file, and that what came before is kept."""

    code, grpc_status, exit_code, retryable = "storage", "RESOURCE_EXHAUSTED", 12, True


class ModelError(HeadtailError):
    """A model cannot be loaded or run."""

    code, exit_code = "model", 11


class CutError(ModelError):
    """A cut cannot be made here, or head and tail together are not the same function."""

    code, grpc_status = "cut", "FAILED_PRECONDITION"


class InternalError(HeadtailError):
    """Our own fault. The message says so; the log holds the traceback."""

    code = "internal"


def _tree(root: type[HeadtailError]) -> dict[str, type[HeadtailError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[HeadtailError]] = _tree(HeadtailError)


def from_peer(code: str, message: str, *, retryable: bool | None = None) -> HeadtailError:
    """The error a peer reports, as this side sees it: what is the peer's own fault is not ours.

    Args:
        code: the peer's; one that is unknown here makes a ``ProtocolError``.
        message: the peer's.
        retryable: the peer's; None: as that kind of error is.
    """
    kind = BY_CODE.get(code)
    if kind is None:
        return ProtocolError(f"{message} (code {code[:40]!r}, which this side does not know)", retryable=retryable)
    if kind.exit_code == InternalError.exit_code:
        return ModelError(f"the peer failed: {message}", retryable=retryable)
    return kind(message, retryable=retryable)


def from_code(code: str, message: str, *, retryable: bool | None = None) -> HeadtailError:
    """Rebuilds the error a peer reported; an unknown code becomes the root class."""
    return BY_CODE.get(code, HeadtailError)(message, retryable=retryable)


def first_line(error: BaseException | None, limit: int = 240) -> str:
    """The first line that says something of an exception's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:limit] if lines else type(error).__name__
