"""The last minutes, second by second: what the page's strip is drawn from."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from edge_client.frames import FrameReport, Outcome

KEPT_S = 300
_RECENT_S = 60
_ANSWERED = (Outcome.RESULT, Outcome.LOCAL)
_NEEDLESS = (Outcome.UNCHANGED, Outcome.FILTERED)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkEstimate:
    """What the controller believes of the link now: bits a second, and the round trip without the server's time."""

    bitrate_bps: float
    rtt_ms: float


@dataclass(slots=True, kw_only=True)
class Second:
    """One second of a camera.

    Attributes:
        number: of the device's clock.
        asked: frames that needed an answer; on_time: those that had one before the deadline.
        latencies_ms: of the answers.
    """

    number: int
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    sent_frames: int = 0
    sent_bytes: int = 0
    asked: int = 0
    on_time: int = 0
    latencies_ms: list[float] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)
    link: LinkEstimate | None = None

    def as_json(self) -> list[Any]:
        """Short, since a page asks for hundreds: [number, outcomes, mean bytes, decision, median ms, worst ms, bit/s, RTT ms]."""
        ms = sorted(self.latencies_ms)
        return [
            self.number,
            [self.outcomes[o] for o in Outcome],
            round(self.sent_bytes / self.sent_frames) if self.sent_frames else None,
            self.decisions.most_common(1)[0][0] if self.decisions else "",
            round(ms[len(ms) // 2], 1) if ms else None,
            round(ms[-1], 1) if ms else None,
            round(self.link.bitrate_bps) if self.link else None,
            round(self.link.rtt_ms, 1) if self.link else None,
        ]


class History:
    """Seconds of the last ``KEPT_S``; those without a frame are left out.

    Args:
        deadline_ms: 0: there is none, and every answer is on time.
    """

    def __init__(self, *, deadline_ms: float) -> None:
        self._deadline_ms = deadline_ms
        self._seconds: deque[Second] = deque()

    def add(self, report: FrameReport, number: int, link: LinkEstimate | None) -> None:
        """A frame has its outcome, in second ``number``."""
        if not self._seconds or self._seconds[-1].number < number:
            self._seconds.append(Second(number=number))
        second = self._seconds[-1]
        self._forget(number)
        second.link = link
        second.outcomes[report.outcome] += 1
        if report.payload_bytes:
            second.sent_frames += 1
            second.sent_bytes += report.payload_bytes
        if report.decision:
            second.decisions[report.decision] += 1
        if report.outcome in _NEEDLESS or report.reason in ("superseded", "stopped"):
            return  # nobody waited for an answer to it
        second.asked += 1
        if report.outcome in _ANSWERED:
            second.latencies_ms.append(report.latency_ms)
            second.on_time += not self._deadline_ms or report.latency_ms <= self._deadline_ms

    def _forget(self, number: int) -> None:
        while self._seconds and self._seconds[0].number <= number - KEPT_S:
            self._seconds.popleft()

    def since(self, number: int) -> list[list[Any]]:
        """The seconds from ``number`` on, oldest first."""
        return [s.as_json() for s in self._seconds if s.number >= number]

    def recent(self, now: int) -> dict[str, Any]:
        """The last minute in figures; None where there is nothing to say."""
        seconds = [s for s in self._seconds if s.number > now - _RECENT_S]
        frames = sum(s.outcomes.total() for s in seconds)
        asked, sent = sum(s.asked for s in seconds), sum(s.sent_frames for s in seconds)
        span_s = max(1, now - seconds[0].number) if seconds else 1
        return {
            "frames_per_s": round(frames / span_s, 1),
            "on_time": round(sum(s.on_time for s in seconds) / asked, 3) if asked else None,
            "bytes_mean": round(sum(s.sent_bytes for s in seconds) / sent) if sent else None,
        }
