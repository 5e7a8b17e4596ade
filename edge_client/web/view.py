"""One camera as the page shows it: a sink that keeps the newest report, and draws it only while somebody looks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2

from edge_client.frames import NS_PER_S, Clock, FrameReport, Outcome
from edge_client.observe.told import in_words
from edge_client.sinks.annotate import annotate
from edge_client.sinks.base import Labels
from edge_client.web.history import KEPT_S, History, LinkEstimate
from protos.text import printable

_LONGEST_PX = 960
_QUALITY = 80
_INTERVAL_S = 0.1  # ten pictures a second are enough to see what happens


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What is true of a camera besides its frames.

    Attributes:
        server: its address.
        up: whether a session stands.
        error: why it does not; empty: nothing is wrong.
        note: what is wrong or under way with the camera or the model; mostly empty.
        link: the controller's estimate; None: it makes none.
    """

    server: str
    up: bool
    error: str = ""
    reconnects: int = 0
    note: str = ""
    link: LinkEstimate | None = None


class CameraView:
    """A sink. Everything but drawing is done on the event loop; drawing waits for nobody, and nobody for it.

    Args:
        name: the camera's.
        labels: of the model that runs.
        circumstances: asked when a page asks.
        deadline_ms: 0: there is none.
        draw: the thread that draws, shared by all cameras.
    """

    def __init__(
        self, name: str, labels: Labels, circumstances: Callable[[], Circumstances], *, deadline_ms: float,
        draw: ThreadPoolExecutor, clock: Clock = time.monotonic_ns,
    ) -> None:  # fmt: skip
        self.name = printable(name)
        self.watchers = 0
        self._labels, self._circumstances, self._deadline_ms = labels, circumstances, deadline_ms
        self._draw, self._clock = draw, clock
        self._history = History(deadline_ms=deadline_ms)
        self._outcomes: Counter[Outcome] = Counter()
        self._newest: FrameReport | None = None
        self._seen: FrameReport | None = None
        self._wake = asyncio.Event()
        self._drawn = asyncio.Condition()
        self._picture: tuple[int, bytes] = (-1, b"")
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    # ------------------------------------------------------------------ the sink

    def take(self, report: FrameReport) -> None:
        """See ``sinks.Sink``; a few counters and a reference."""
        self._newest = report
        self._outcomes[report.outcome] += 1
        self._history.add(report, self._clock() // NS_PER_S, self._circumstances().link)
        if report.frame.image is not None:
            self._seen = report
            if self.watchers:
                self._wake.set()

    def close(self) -> None:
        """See ``sinks.Sink``; the last picture stays."""
        self._closed = True
        self._wake.set()
        if self._task is not None:
            self._task.cancel()

    # ------------------------------------------------------------------ pictures

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Somebody looks: pictures are drawn meanwhile."""
        self.watchers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._keep_drawing())
        self._wake.set()
        try:
            yield
        finally:
            self.watchers -= 1

    async def picture(self, after: int) -> tuple[int, bytes]:
        """The newest picture as JPEG and its number, once that is greater than ``after``."""
        async with self._drawn:
            await self._drawn.wait_for(lambda: self._picture[0] > after)
            return self._picture

    async def _keep_drawing(self) -> None:
        loop = asyncio.get_running_loop()
        while self.watchers and not self._closed:
            await self._wake.wait()
            self._wake.clear()
            report = self._seen
            if report is None or report.frame.index <= self._picture[0]:
                continue
            jpeg = await loop.run_in_executor(self._draw, _jpeg, report, self._labels())
            async with self._drawn:
                self._picture = (report.frame.index, jpeg)
                self._drawn.notify_all()
            await asyncio.sleep(_INTERVAL_S)

    # ------------------------------------------------------------------ words and figures

    def state(self, since: int) -> dict[str, Any]:
        """What the page shows besides the picture; the strip's seconds from ``since`` on."""
        now, newest, around = self._clock() // NS_PER_S, self._newest, self._circumstances()
        seen = self._seen or newest
        return {
            "camera": self.name,
            "now": now,
            "kept_s": KEPT_S,
            "deadline_ms": self._deadline_ms,
            "server": {
                "address": printable(around.server), "up": around.up, "error": printable(around.error),
                "reconnects": around.reconnects,
            },
            "note": printable(around.note),
            "link": {"bitrate_bps": around.link.bitrate_bps, "rtt_ms": around.link.rtt_ms} if around.link else None,
            "model": printable(newest.model) if newest else None,
            "bundle_sha256": newest.bundle_sha256[:12] if newest else None,
            "outcomes": {o.value: self._outcomes[o] for o in Outcome},
            "frame": _frame(newest),
            "sees": in_words(seen.answer, self._labels()) if seen else "",
            "minute": self._history.recent(now),
            "seconds": self._history.since(since),
        }  # fmt: skip


def _frame(report: FrameReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        "index": report.frame.index, "outcome": report.outcome.value, "reason": printable(report.reason),
        "decision": report.decision, "payload_bytes": report.payload_bytes, "latency_ms": round(report.latency_ms, 1),
    }  # fmt: skip


def _jpeg(report: FrameReport, labels: Mapping[int, str]) -> bytes:
    """A report's frame with its answer drawn in."""
    assert report.frame.image is not None  # noqa: S101 - only such are kept
    picture = annotate(report.frame.image, report, labels)
    scale = _LONGEST_PX / max(picture.shape[:2])
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(picture.dtype)
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return data.tobytes()
