"""Between two answers, the last boxes go where their pixels went; each says how old it is.

Points within a box are followed by pyramidal Lucas-Kanade optical flow, forwards and backwards; those that do not come back to
where they began are dropped (Kalal et al. 2010, "Forward-Backward Error"). The median motion of the others moves the box. A
box that keeps too few points is lost: it is no longer shown.

Shape legend: frames are (H, W, 3) uint8 BGR; N points are (N, 1, 2) float32 as OpenCV wants them, in pixels of a small grey copy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_client.frames import NS_PER_MS, Age, Clock, FrameReport, Outcome
from protos.errors import ConfigError
from protos.messages import Box, Detection
from splitters.tasks.preprocess import Frame

Floats = NDArray[np.float32]
Grey = NDArray[np.uint8]

_ENOUGH = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 10, 0.03)  # steps a level, and a step this small, in px


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackConfig:
    """How boxes are followed.

    Attributes:
        longest_px: frames are shrunk to this longest side.
        points: a side of the grid of points laid into each box.
        inner: share of the box's width and height that the grid covers: background lies at the edges.
        window_px: side of the patch that is sought.
        levels: of the image pyramid, beyond the image itself.
        back_px: a point that comes back farther than this from where it began is not believed.
        survivors: least share of the points a box needs.
        max_age_ms: boxes older than this are shown no more.
    """

    longest_px: int = 480
    points: int = 4
    inner: float = 0.6
    window_px: int = 15
    levels: int = 3
    back_px: float = 2.0
    survivors: float = 0.2
    max_age_ms: float = 3000.0

    def __post_init__(self) -> None:
        if self.longest_px < 64 or self.points < 2 or not 0 < self.inner <= 1 or self.window_px < 5 or self.levels < 0:
            raise ConfigError("tracking needs longest_px >= 64, points >= 2, 0 < inner <= 1, window_px >= 5 and levels >= 0")
        if self.back_px <= 0 or not 0 < self.survivors <= 1 or self.max_age_ms <= 0:
            raise ConfigError("tracking needs back_px > 0, 0 < survivors <= 1 and max_age_ms > 0")


@dataclass(slots=True, kw_only=True)
class _Target:
    """One box (in source pixels) and the points that carry it."""

    box: Box
    points: Floats
    least: int


class BoxTracker:
    """Follows boxes from frame to frame. Pure but for the last frame, which it keeps small and grey."""

    def __init__(self, config: TrackConfig | None = None) -> None:
        self._config = config or TrackConfig()
        self._grey: Grey | None = None
        self._scale = 1.0
        self._targets: list[_Target] = []

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Where they are now."""
        return tuple(t.box for t in self._targets)

    def restart(self, frame: Frame, boxes: Sequence[Box]) -> None:
        """Forgets everything and follows these boxes, seen in this frame."""
        self._grey, self._scale = self._shrink(frame)
        self._targets = []
        for box in boxes:
            points = self._grid(box)
            self._targets.append(_Target(box=box, points=points, least=max(3, round(self._config.survivors * len(points)))))

    def advance(self, frame: Frame) -> tuple[Box, ...]:
        """Moves the boxes to a later frame; those that cannot be found are lost."""
        grey, scale = self._shrink(frame)
        before, self._grey = self._grey, grey
        if before is None or before.shape != grey.shape or scale != self._scale:
            self._targets = []  # another picture: nothing can be followed into it
        if not self._targets or before is None:
            return ()
        moved, good = self._flow(before, grey, np.concatenate([t.points for t in self._targets]))
        kept, start = [], 0
        for target in self._targets:
            end = start + len(target.points)
            found = self._moved(target, moved[start:end], good[start:end], frame.shape[1], frame.shape[0])
            kept += [found] if found is not None else []
            start = end
        self._targets = kept
        return self.boxes

    def _shrink(self, frame: Frame) -> tuple[Grey, float]:
        scale = min(1.0, self._config.longest_px / max(frame.shape[:2]))
        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        if scale < 1:
            size = (max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale)))
            grey = cv2.resize(grey, size, interpolation=cv2.INTER_LINEAR)
        return grey.astype(np.uint8, copy=False), scale

    def _grid(self, box: Box) -> Floats:
        x1, y1, x2, y2 = (v * self._scale for v in box.box_px)
        margin = (1 - self._config.inner) / 2
        share = np.linspace(margin, 1 - margin, self._config.points)
        x, y = np.meshgrid(x1 + share * (x2 - x1), y1 + share * (y2 - y1))
        return np.stack([x, y], axis=-1).reshape(-1, 1, 2).astype(np.float32)

    def _flow(self, before: Grey, after: Grey, points: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        config = self._config
        window, levels = (config.window_px, config.window_px), config.levels
        start = points.copy()  # OpenCV's stubs want an array for the result, and use it as the first guess only when told to
        there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, points, start, winSize=window, maxLevel=levels, criteria=_ENOUGH)
        back, returned, _ = cv2.calcOpticalFlowPyrLK(
            after, before, there, start.copy(), winSize=window, maxLevel=levels, criteria=_ENOUGH
        )
        astray = np.linalg.norm(back - points, axis=2)[:, 0]
        good = (found[:, 0] == 1) & (returned[:, 0] == 1) & (astray <= config.back_px)
        return there.astype(np.float32), good

    def _moved(self, target: _Target, moved: Floats, good: NDArray[np.bool_], width_px: int, height_px: int) -> _Target | None:
        if good.sum() < target.least:
            return None
        shift = (moved - target.points)[:, 0]
        dx, dy = np.median(shift[good], axis=0) / self._scale
        x1, y1, x2, y2 = target.box.box_px
        box = (x1 + float(dx), y1 + float(dy), x2 + float(dx), y2 + float(dy))
        if not (0 <= (box[0] + box[2]) / 2 < width_px and 0 <= (box[1] + box[3]) / 2 < height_px):
            return None  # it has left
        new = replace(target.box, box_px=box)
        # Fresh points every time: those that stayed behind on the background would pull the box back.
        return _Target(box=new, points=self._grid(new), least=target.least)


class Follower:
    """Gives frames without an answer of their own the last one, moved along and marked with its age.

    Takes every frame's report in the order of capture; outcomes stay what they are.
    """

    def __init__(self, config: TrackConfig | None = None, *, clock: Clock = time.perf_counter_ns) -> None:
        self._config = config or TrackConfig()
        self._tracker = BoxTracker(self._config)
        self._clock = clock
        self._since: tuple[int, int] | None = None
        self._spent_ns: deque[int] = deque(maxlen=1000)

    @property
    def ms_p50(self) -> float | None:
        """The median time to carry the boxes to one frame; None before the first."""
        return sorted(self._spent_ns)[len(self._spent_ns) // 2] / NS_PER_MS if self._spent_ns else None

    def follow(self, report: FrameReport) -> FrameReport:
        """The report as sinks should see it."""
        frame = report.frame
        if report.outcome in (Outcome.RESULT, Outcome.LOCAL):
            if not isinstance(report.answer, Detection):
                return report
            self._since = (frame.index, frame.captured_ns)
            if frame.image is not None:
                self._tracker.restart(frame.image, report.answer.boxes)
            return replace(report, age=Age(frames=0, ms=0.0))
        if self._since is None:
            return report
        age = Age(frames=frame.index - self._since[0], ms=(frame.captured_ns - self._since[1]) / NS_PER_MS)
        if age.ms > self._config.max_age_ms:
            self._since = None
            return report
        if frame.image is None:  # replaced by a newer one before anyone looked at it: the boxes stay where they are
            return replace(report, answer=Detection(boxes=self._tracker.boxes), age=age)
        start_ns = self._clock()
        boxes = self._tracker.advance(frame.image)
        self._spent_ns.append(self._clock() - start_ns)
        return replace(report, answer=Detection(boxes=boxes), age=age)
