"""The live line: rewritten in place in a terminal, a plain line now and then where output is piped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from edge_client.frames import NS_PER_S, Clock, FrameReport, Outcome
from edge_client.observe.told import in_words
from protos.messages import Answer
from protos.text import printable

_WINDOW_NS = 5 * NS_PER_S


class Status:
    """Recent frames in one line.

    Args:
        write: puts text where people see it.
        terminal: whether a line can be rewritten.
        labels: of the model that runs.
        note: what is wrong or under way now (a camera that stalled, a server that is gone); empty: nothing.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        clock: Clock,
        terminal: bool,
        note: Callable[[], str],
        columns: int = 120,
        labels: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        self._write = write
        self._clock = clock
        self._terminal = terminal
        self._note = note
        self._columns = columns
        self._labels = labels
        self._answer: Answer | None = None
        self._recent: deque[tuple[int, Outcome, int, float]] = deque()
        self._shown = False
        self.interval_s = 0.25 if terminal else 5.0

    def take(self, report: FrameReport) -> None:
        """See ``sinks.Sink``."""
        self._answer = report.answer if report.answer is not None else self._answer
        self._recent.append((self._clock(), report.outcome, report.payload_bytes, report.stages_ms.get("total", 0.0)))

    def close(self) -> None:
        """Leaves the line."""
        if self._shown and self._terminal:
            self._write("\n")

    def show(self) -> None:
        """Writes the line as it is now."""
        line = self.line()
        if self._terminal:
            self._write("\r\x1b[2K" + line[: self._columns - 1])
        else:
            self._write(line + "\n")
        self._shown = True

    def line(self) -> str:
        """Frames per second, outcomes, bytes and latency of the last five seconds."""
        now_ns = self._clock()
        while self._recent and now_ns - self._recent[0][0] > _WINDOW_NS:
            self._recent.popleft()
        parts = []
        if self._recent:
            span_s = max((now_ns - self._recent[0][0]) / NS_PER_S, 0.5)
            counts = {o: sum(r[1] is o for r in self._recent) for o in Outcome}
            answered = sorted(r[3] for r in self._recent if r[1] in (Outcome.RESULT, Outcome.LOCAL))
            sent = [r[2] for r in self._recent if r[2]]
            parts.append(f"{len(self._recent) / span_s:.1f} frames/s")
            parts.append(" ".join(f"{o.value} {n}" for o, n in counts.items() if n))
            if sent:
                parts.append(f"{sum(sent) / len(sent) / 1000:.1f} kB/frame, {sum(sent) * 8 / span_s / 1e6:.2f} Mbit/s")
            if answered:
                parts.append(f"p50 {answered[len(answered) // 2]:.0f} ms")
            if words := in_words(self._answer, self._labels()):
                parts.append(words)
        else:
            parts.append("no frames")
        if note := self._note():
            parts.append(f"[{note}]")
        return printable(" | ".join(parts))
