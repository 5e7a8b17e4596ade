"""What the holders of one token may use together, and how their sessions end when it is withdrawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_server.config import SecurityConfig
from protos.errors import AuthError, HeadtailError, LimitError

_BURST_S = 1.0

End = Callable[[HeadtailError], None]
"""Ends a session with an error, soon and not at once."""


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


@dataclass(slots=True, eq=False)
class Caller:
    """One token's holders together; where there are no tokens, everyone.

    Attributes:
        name: as the token file says; empty: everyone.
        config: quotas.
        max_unary: frames of unary calls that may be unanswered.
        operator: may load and unload models.
        sessions, unary: open sessions, and unanswered frames of unary calls.
        revoked: the token is no longer in the file.
    """

    name: str = ""
    config: SecurityConfig = field(default_factory=SecurityConfig)
    max_unary: int = 256
    operator: bool = False
    sessions: int = 0
    unary: int = 0
    revoked: bool = False
    _ends: set[End] = field(default_factory=set)
    _frames: _Bucket | None = None
    _bytes: _Bucket | None = None

    def __post_init__(self) -> None:
        if self.config.frames_per_s_per_token:
            self._frames = _Bucket(self.config.frames_per_s_per_token)
        if self.config.bytes_per_s_per_token:
            self._bytes = _Bucket(self.config.bytes_per_s_per_token)

    @contextmanager
    def session(self, end: End) -> Iterator[None]:
        """Counts an open session; ``end`` is called when the token is withdrawn.

        Raises:
            LimitError: the token's holders have as many as they may.
            AuthError: the token was withdrawn between the call's arrival and now.
        """
        self.check()
        allowed = self.config.max_sessions_per_token
        if allowed and self.sessions >= allowed:
            raise LimitError(f"this token's {allowed} sessions are all in use", retryable=True)
        self.sessions += 1
        self._ends.add(end)
        try:
            yield
        finally:
            self._ends.discard(end)
            self.sessions -= 1

    @contextmanager
    def unary_frames(self, count: int = 1) -> Iterator[None]:
        """Counts frames of a unary call until they are answered.

        Raises:
            LimitError: too many are unanswered.
        """
        if self.unary + count > self.max_unary:
            raise LimitError(
                f"{self.unary} frames of this client's unary calls are unanswered; it may have {self.max_unary}", retryable=True
            )
        self.unary += count
        try:
            yield
        finally:
            self.unary -= count

    def admit_frame(self, n_bytes: int, now_ns: int, *, frames: int = 1) -> HeadtailError | None:
        """Counts a frame, or several that come together, against the quota, or says why they are refused."""
        if self._frames is not None and not self._frames.take(frames, now_ns):
            return LimitError(f"this token's quota of {self._frames.per_s:g} frames/s is used up", retryable=True)
        if self._bytes is not None and not self._bytes.take(n_bytes, now_ns):
            return LimitError(f"this token's quota of {self._bytes.per_s:g} bytes/s is used up", retryable=True)
        return None

    def check(self) -> None:
        """Raises AuthError when the token was withdrawn."""
        if self.revoked:
            raise withdrawn()

    def revoke(self) -> int:
        """Ends every session of the token's holders; how many there were."""
        self.revoked = True
        ends = list(self._ends)
        for end in ends:
            end(withdrawn())
        return len(ends)


def withdrawn() -> AuthError:
    """What the holder of a withdrawn token is told."""
    return AuthError("the token this client uses was withdrawn at the server; set HEADTAIL_TOKEN to a valid one")
