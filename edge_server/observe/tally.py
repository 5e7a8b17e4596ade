"""What the server's page counts: totals since the start, and the last minutes second by second."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_server.observe.metrics import Metrics
from protos.messages import Result

KEPT_S = 300
_RECENT_S = 60
_REFUSALS = 20


@dataclass(slots=True, kw_only=True)
class Second:
    """One second of the server; ``number`` is of its clock."""

    number: int
    answered: int = 0
    refused: int = 0
    payload_bytes: int = 0
    tail_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)

    def as_json(self) -> list[Any]:
        """[number, answered, refused, bytes, median tail ms, median and worst ms in the server]."""
        tail, total = sorted(self.tail_ms), sorted(self.total_ms)
        if not total:
            return [self.number, self.answered, self.refused, self.payload_bytes, None, None, None]
        middle = round(tail[len(tail) // 2], 2), round(total[len(total) // 2], 2)
        return [self.number, self.answered, self.refused, self.payload_bytes, *middle, round(total[-1], 2)]


class Tally:
    """Metrics that count for the page, and pass everything on.

    Args:
        inner: who else counts.
        clock: monotonic ns.
    """

    def __init__(self, inner: Metrics, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._inner, self._clock = inner, clock
        self._begun_ns = clock()
        self._seconds: deque[Second] = deque()
        self._frames: dict[str, Counter[str]] = {}
        self._bytes: Counter[str] = Counter()
        self._sessions: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._last_refusals: deque[tuple[int, str, str]] = deque(maxlen=_REFUSALS)
        self.grants = 0

    # ------------------------------------------------------------ metrics

    def on_session(self, model: str, change: int) -> None:
        """See `Metrics`."""
        self._inner.on_session(model, change)
        self._sessions[model] += change

    def on_result(self, model: str, result: Result, payload_bytes: int) -> None:
        """See `Metrics`."""
        self._inner.on_result(model, result, payload_bytes)
        outcome = "result" if result.error is None else result.error.code
        self._frames.setdefault(model, Counter())[outcome] += 1
        self._bytes[model] += payload_bytes
        second = self._second()
        second.payload_bytes += payload_bytes
        if result.error is not None:
            second.refused += 1
            self._last_refusals.append((second.number, outcome, result.error.message))
            return
        second.answered += 1
        second.tail_ms.append(result.timings.tail_ns / 1e6)
        second.total_ms.append(result.timings.total_ns / 1e6)

    def on_grant(self) -> None:
        """See `Metrics`."""
        self._inner.on_grant()
        self.grants += 1

    def on_refused(self, reason: str) -> None:
        """See `Metrics`."""
        self._inner.on_refused(reason)
        self._refused[reason] += 1
        self._last_refusals.append((self._second().number, reason, "a call was ended"))

    # ------------------------------------------------------------ the page

    def _second(self) -> Second:
        number = self._clock() // 1_000_000_000
        if not self._seconds or self._seconds[-1].number < number:
            self._seconds.append(Second(number=number))
            while self._seconds[0].number <= number - KEPT_S:
                self._seconds.popleft()
        return self._seconds[-1]

    def model(self, name: str) -> dict[str, Any]:
        """One model's totals."""
        frames = self._frames.get(name, Counter())
        return {"sessions": self._sessions[name], "frames": dict(frames), "payload_bytes": self._bytes[name]}

    def state(self, since: int) -> dict[str, Any]:
        """Everything else; the strip's seconds from ``since`` on."""
        now_ns = self._clock()
        now = now_ns // 1_000_000_000
        recent = [s for s in self._seconds if s.number > now - _RECENT_S]
        span_s = max(1, min(_RECENT_S, (now_ns - self._begun_ns) // 1_000_000_000))
        return {
            "now": now,
            "kept_s": KEPT_S,
            "up_s": (now_ns - self._begun_ns) // 1_000_000_000,
            "minute": {
                "answered_per_s": round(sum(s.answered for s in recent) / span_s, 1),
                "refused_per_s": round(sum(s.refused for s in recent) / span_s, 1),
                "bytes_per_s": round(sum(s.payload_bytes for s in recent) / span_s),
            },
            "grants": self.grants,
            "refused_calls": dict(self._refused),
            "refusals": [[now - number, code, text] for number, code, text in reversed(self._last_refusals)],
            "seconds": [s.as_json() for s in self._seconds if s.number >= since],
        }
