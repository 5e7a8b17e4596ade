"""Annotated frames in a window."""

from __future__ import annotations

import cv2

from edge_client.frames import FrameReport
from edge_client.sinks.annotate import annotate
from edge_client.sinks.base import Labels
from protos.errors import MissingDependencyError


class Window:
    """Annotated frames in a window; needs an OpenCV with one."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        try:
            cv2.namedWindow("headtail", cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise MissingDependencyError(
                "--display needs a screen and an OpenCV with windows (pip uninstall opencv-python-headless, "
                "pip install opencv-python); --save-video works without"
            ) from error

    def take(self, report: FrameReport) -> None:
        """See ``Sink``."""
        if report.frame.image is not None:
            cv2.imshow("headtail", annotate(report.frame.image, report, self._labels()))
            cv2.waitKey(1)

    def close(self) -> None:
        """See ``Sink``."""
        cv2.destroyAllWindows()
