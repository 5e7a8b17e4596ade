"""What a run came to: frames and outcomes, bytes beside JPEG, latency by stage."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np

from edge_client.frames import NS_PER_S, Clock, FrameReport, Ledger, Outcome
from edge_client.observe.told import AnswerCounts
from splitters.tasks.preprocess import Frame

STAGES = ("capture", "preprocess", "head", "prefilter", "codec", "send", "network", "decode", "queue", "tail", "local", "total")
_KEEP = 50_000
_SAMPLES = 400


class JpegSampler:
    """JPEG sizes of some frames, measured beside the run: at most a few a second, in a thread of its own."""

    def __init__(self, *, clock: Clock, every_s: float, seed: int = 0) -> None:
        self._clock = clock
        self.every_s = every_s
        self._last_ns: int | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jpeg")
        self._waiting = 0
        self._random = random.Random(seed)  # noqa: S311 - which frames are sampled is no secret
        self._seen = 0
        self.sizes: dict[str, list[int]] = {}

    def offer(self, frame: Frame, input_image: Frame) -> None:
        """Shows a frame and the model's own input of it."""
        now_ns = self._clock()
        self._seen += 1
        kept = len(self.sizes.get("input_75", ()))
        due = self._last_ns is None or now_ns - self._last_ns >= self.every_s * NS_PER_S
        # A camera must not wait for it nor hold frames; files, which are not timed, may queue a few.
        full = self._waiting >= (2 if self.every_s else 16)
        if not due or full or (kept >= _SAMPLES and self._random.random() > _SAMPLES / self._seen):
            return
        self._last_ns = now_ns
        self._waiting += 1
        self._pool.submit(self._measure, frame, input_image)

    def _measure(self, frame: Frame, input_image: Frame) -> None:
        try:
            for name, picture in (("input", input_image), ("source", frame)):
                for quality in (75, 95):
                    ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
                    if ok:
                        self.sizes.setdefault(f"{name}_{quality}", []).append(len(data))
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Finishes what is under way."""
        self._pool.shutdown(wait=True)


class Summary:
    """Collects reports; ``as_json`` and ``as_text`` say what they came to."""

    def __init__(self, ledger: Callable[[], Ledger], sampler: JpegSampler, labels: Callable[[], Mapping[int, str]] = dict) -> None:
        self._ledger = ledger
        self._sampler = sampler
        self._payloads: deque[int] = deque(maxlen=_KEEP)
        self._stages: dict[str, deque[float]] = {name: deque(maxlen=_KEEP) for name in STAGES}
        self.bytes_total = 0
        self._labels = labels
        self._answers = AnswerCounts()

    def take(self, report: FrameReport) -> None:
        """See ``sinks.Sink``."""
        if report.payload_bytes:
            self._payloads.append(report.payload_bytes)
            self.bytes_total += report.payload_bytes
        self._answers.take(report.answer, self._labels())
        if report.outcome in (Outcome.RESULT, Outcome.LOCAL):
            for name, ms in report.stages_ms.items():
                if name in self._stages:
                    self._stages[name].append(ms)

    def close(self) -> None:
        """See ``sinks.Sink``."""

    def as_json(self) -> dict[str, Any]:
        """The summary as plain JSON types; sizes in bytes, times in ms, absent figures null."""
        ledger = self._ledger()
        jpeg = self._sampler.sizes
        total = self._stages["total"]
        return {
            "frames": ledger.captured,
            "outcomes": {o.value: ledger.outcomes[o] for o in Outcome},
            "dropped": dict(ledger.dropped),
            "classes": self._answers.as_json(),
            "balanced": ledger.balanced and not ledger.open_count,
            "payload_bytes_p50": _quantile(self._payloads, 0.5),
            "payload_bytes_p95": _quantile(self._payloads, 0.95),
            "payload_bytes_total": self.bytes_total,
            "jpeg75_bytes_p50": _quantile(jpeg.get("input_75", ()), 0.5),
            "jpeg95_bytes_p50": _quantile(jpeg.get("input_95", ()), 0.5),
            "source_jpeg75_bytes_p50": _quantile(jpeg.get("source_75", ()), 0.5),
            "source_jpeg95_bytes_p50": _quantile(jpeg.get("source_95", ()), 0.5),
            "jpeg_samples": len(jpeg.get("input_75", ())),
            "latency_ms_p50": _quantile(total, 0.5),
            "latency_ms_p95": _quantile(total, 0.95),
            "latency_ms_p99": _quantile(total, 0.99),
            "stages_ms": {
                name: {f"p{round(q * 100)}": _quantile(values, q) for q in (0.5, 0.95, 0.99)}
                for name, values in self._stages.items()
                if values
            },
        }

    def as_text(self) -> str:
        """The summary for people."""
        s = self.as_json()
        outcomes = ", ".join(f"{name} {n}" for name, n in s["outcomes"].items() if n) or "none"
        if s["dropped"]:
            outcomes += " (" + ", ".join(f"{reason} {n}" for reason, n in sorted(s["dropped"].items())) + ")"
        lines = [f"frames   {s['frames']} captured = {outcomes}"]
        if not s["balanced"]:
            lines.append("         these do not add up: please report it")
        if answers := self._answers.as_text():
            lines.append(f"answers  {answers}")
        if s["payload_bytes_p50"] is not None:
            p50, p95, total = s["payload_bytes_p50"], s["payload_bytes_p95"], s["payload_bytes_total"]
            lines.append(f"payload  {p50:,.0f} bytes a frame (p50), {p95:,.0f} (p95), in all {total:,}")
            lines += self._jpeg_lines(s)
        if s["stages_ms"]:
            lines.append(f"latency  {'ms':<11}{'p50':>9}{'p95':>9}{'p99':>9}")
            lines += [f"         {name:<11}{v['p50']:9.1f}{v['p95']:9.1f}{v['p99']:9.1f}" for name, v in s["stages_ms"].items()]
        return "\n".join(lines)

    def _jpeg_lines(self, s: dict[str, Any]) -> list[str]:
        lines = []
        for key, what in (("jpeg", "the model's own input"), ("source_jpeg", "the source frame")):
            low, high = s[f"{key}75_bytes_p50"], s[f"{key}95_bytes_p50"]
            if low:
                share = s["payload_bytes_p50"] / low
                word = f"ours is {share:.0%} of quality 75" + (": larger" if share > 1 else "")
                lines.append(f"         JPEG of {what}: {low:,.0f} at quality 75, {high:,.0f} at 95; {word}")
        return lines


def _quantile(values: Iterable[float], q: float) -> float | None:
    data = np.fromiter(values, np.float64)
    return round(float(np.quantile(data, q)), 3) if data.size else None
