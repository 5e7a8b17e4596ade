"""Draws an answer on a frame: what the task draws, the outcome and the bytes it cost."""

from __future__ import annotations

from collections.abc import Mapping

from edge_client.frames import FrameReport, Outcome
from splitters.tasks.base import task_of
from splitters.tasks.canvas import Canvas
from splitters.tasks.preprocess import Frame

_COLOURS = {
    Outcome.RESULT: (80, 200, 80), Outcome.LOCAL: (60, 160, 250), Outcome.UNCHANGED: (200, 200, 120),
    Outcome.FILTERED: (160, 160, 160), Outcome.DROPPED: (60, 60, 220), Outcome.EXPIRED: (60, 60, 220),
}  # fmt: skip


def annotate(image: Frame, report: FrameReport, labels: Mapping[int, str]) -> Frame:
    """A copy of the frame with its answer drawn in; a small one is enlarged to 640 px width, so that the text can be read."""
    carried = report.age is not None and report.age.frames > 0
    canvas = Canvas(image, note=f", {report.age.ms:.0f} ms old" if report.age is not None and carried else "", thin=carried)
    canvas.line(_status(report), _COLOURS[report.outcome])
    if report.answer is not None:
        task_of(report.answer).draw(canvas, report.answer, labels)
    return canvas.finish()


def _status(report: FrameReport) -> str:
    text = report.outcome.value + (f" ({report.reason})" if report.reason else "")
    if report.payload_bytes:
        text += f"  {report.payload_bytes} B"
    text += f"  {report.stages_ms.get('total', 0):.0f} ms" + (f"  {report.detail}" if report.detail else "")
    return text + (f"  boxes {report.age.frames} frames old" if report.age is not None and report.age.frames else "")
