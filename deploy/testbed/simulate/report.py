"""What a run came to, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploy.testbed.simulate.frame import Frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Of one run, or of several.

    Attributes:
        captured: frames.
        on_time: share of the captured frames answered before their deadline, 0..1.
        accuracy: mean table accuracy of those answers, 0..1.
        score: accuracy x on-time: mean over captured frames, 0 for one without an answer in time.
        bytes_mean: payload bytes sent per captured frame.
        latency_ms_p50, latency_ms_p95: capture to answer, of the answers in time.
        outcomes: how many frames ended how; they sum to ``captured``.
    """

    captured: int
    on_time: float
    accuracy: float
    score: float
    bytes_mean: float
    latency_ms_p50: float
    latency_ms_p95: float
    outcomes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def summarise(frames: Sequence[Frame]) -> Summary:
    """The summary of finished frames."""
    answered = [f for f in frames if f.outcome in ("result", "local")]
    total = sum(f.accuracy for f in answered)
    latencies = sorted((f.answered_ns - f.captured_ns) / 1e6 for f in answered)
    n = max(1, len(frames))
    outcomes = Counter(f"dropped({f.reason})" if f.outcome == "dropped" else f.outcome for f in frames)
    return Summary(
        captured=len(frames),
        on_time=len(answered) / n,
        accuracy=total / max(1, len(answered)),
        score=total / n,
        bytes_mean=sum(f.payload_bytes for f in frames if f.sent_ns) / n,
        latency_ms_p50=quantile(latencies, 0.5),
        latency_ms_p95=quantile(latencies, 0.95),
        outcomes=dict(sorted(outcomes.items())),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of sorted numbers; 0 when there are none."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
