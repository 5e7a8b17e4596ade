"""What the controller can decide about one frame, and the record that explains it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Self

from protos.errors import ConfigError
from splitters.bundle.operating_point import Quantiles


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalOption:
    """The model that runs wholly on the device.

    Attributes:
        accuracy: 0..1, in the same metric and on the same photos as the operating points'.
        ms: time of one frame on this device.
    """

    accuracy: float
    ms: Quantiles

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise ConfigError(f"local accuracy must be a fraction 0..1, got {self.accuracy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One choice as the controller saw it. Times are from the decision on.

    Attributes:
        name: ``split 3``, ``jpeg 60``, ``local``.
        payload_bytes: p95 of what would be sent.
        expected_ms: median of the time to the answer.
        p_on_time: probability of an answer before the deadline, the fallback not counted.
        value: expected accuracy of this frame, with the fallback and the frames displaced by device time counted.
        refused: why it could not be chosen; empty: it could.
    """

    name: str
    payload_bytes: int
    expected_ms: float
    p_on_time: float
    value: float
    refused: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """Inputs, candidates and choice of one decision, for ``--explain``."""

    frame_id: int
    now_ns: int
    deadline_ns: int
    connected: bool
    delivery_bps: float
    base_rtt_ms: float
    server_ms: float
    backlog_bytes: int
    overdue_ms: float
    in_flight: int
    window_frames: int
    grant_bps: float
    grant_tokens_bytes: float
    candidates: tuple[Candidate, ...]
    choice: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Run the head at an operating point and send the latent.

    Attributes:
        point_id: the operating point.
        fallback_ns: monotonic time; when it comes and no answer has, the local model answers this frame
            (before anything else the device has to do). None: do not.
        limit_bytes: the payload may not be larger (the grant); what does not fit loses refining layers first.
        hold: the server's answer is the better one: a local answer to this frame waits for it until just before the deadline.
    """

    point_id: int
    fallback_ns: int | None = None
    limit_bytes: int | None = None
    hold: bool = False
    explain: Explanation | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """For logs."""
        return f"split {self.point_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload:
    """Compress the model's input and send it. ``fallback_ns``, ``limit_bytes`` and ``hold`` as in ``Split``."""

    format: str
    quality: int
    size_px: int = 0
    fallback_ns: int | None = None
    limit_bytes: int | None = None
    hold: bool = False
    explain: Explanation | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """For logs."""
        return f"{self.format} {self.quality}" + (f"@{self.size_px}" if self.size_px else "")

    @classmethod
    def named(cls, name: str) -> Self:
        """The choice of that ``name``."""
        image_format, setting = name.split(" ")
        quality, _, size_px = setting.partition("@")
        return cls(format=image_format, quality=int(quality), size_px=int(size_px or 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """Run the local model."""

    explain: Explanation | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """For logs."""
        return "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """Do nothing with this frame; its outcome is ``dropped(skipped)``. ``reason`` is one word for logs."""

    reason: str
    explain: Explanation | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """For logs."""
        return f"skip {self.reason}"


Decision = Split | Offload | Local | Skip


def with_terms(
    decision: Decision, *, fallback_ns: int | None, tokens_bytes: float, hold: bool, explain: Explanation | None
) -> Decision:
    """The same choice with when to fall back, what the grant has left (infinite: no grant), whether to hold, and its record."""
    limit_bytes = None if tokens_bytes == inf else int(tokens_bytes)
    if fallback_ns is None and limit_bytes is None and explain is None:
        return decision
    match decision:
        case Split():  # named, since ``replace`` takes twice as long
            return Split(point_id=decision.point_id, fallback_ns=fallback_ns, limit_bytes=limit_bytes, hold=hold, explain=explain)
        case Offload():
            return replace(decision, fallback_ns=fallback_ns, limit_bytes=limit_bytes, hold=hold, explain=explain)
        case _:
            return replace(decision, explain=explain)
