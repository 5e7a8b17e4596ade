"""What a sink is, and how reports reach several of them in the order of capture.

A disk may fill up while a camera runs. The sink that cannot go on is closed with what it has, whole; the others get every
frame to the end, and the run ends with the error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import cv2

from edge_client.frames import FrameReport
from protos.errors import HeadtailError, StorageError

log = logging.getLogger(__name__)

Labels = Callable[[], Mapping[int, str]]


class Sink(Protocol):
    """Takes every frame's report."""

    def take(self, report: FrameReport) -> None:
        """One frame."""

    def close(self) -> None:
        """No more will come; everything taken is written."""


class InOrder:
    """Hands reports on in the order of capture, whatever order they were settled in.

    Args:
        sinks: who gets them. One that fails gets no more; the others do not notice.
        on_failure: called once, at the first failure.
        follow: what becomes of each report, in order, before the sinks see it; None: nothing.
    """

    def __init__(
        self,
        sinks: list[Sink],
        on_failure: Callable[[], None] = lambda: None,
        follow: Callable[[FrameReport], FrameReport] | None = None,
    ) -> None:
        self._sinks = sinks
        self._on_failure = on_failure
        self._follow = follow
        self._next = 0
        self._early: dict[int, FrameReport] = {}
        self.failure: HeadtailError | None = None

    def add(self, sink: Sink) -> None:
        """One more sink, before the first frame."""
        self._sinks.append(sink)

    def take(self, report: FrameReport) -> None:
        """One frame, in any order."""
        self._early[report.frame.index] = report
        while (ready := self._early.pop(self._next, None)) is not None:
            self._next += 1
            self._hand_on(ready)

    def close(self) -> None:
        """Hands on what is left, gaps or not."""
        for index in sorted(self._early):
            self._hand_on(self._early[index])
        self._early.clear()
        for sink in list(self._sinks):
            try:
                sink.close()
            except (HeadtailError, OSError, cv2.error) as error:
                self._failed(sink, error)

    def _hand_on(self, report: FrameReport) -> None:
        if self._follow is not None:
            report = self._follow(report)
        for sink in list(self._sinks):
            try:
                sink.take(report)
            except (HeadtailError, OSError, cv2.error) as error:
                self._sinks.remove(sink)
                with suppress(HeadtailError, OSError, cv2.error):
                    sink.close()
                self._failed(sink, error)

    def _failed(self, sink: Sink, error: Exception) -> None:
        if not isinstance(error, HeadtailError):
            error = StorageError(f"{type(sink).__name__} failed: {error}")
        log.error("%s", error.message)
        if self.failure is None:
            self.failure = error
            self._on_failure()
