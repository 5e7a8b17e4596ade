"""Where answers go: ``results.jsonl``, annotated pictures or a video, a window. In the order of capture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import cv2
import numpy as np

from edge_client.annotate import annotate
from edge_client.frames import FrameReport
from protos.errors import ConfigError, MissingDependencyError
from protos.messages import Answer, Classification, Detection
from splitters.preprocess import Frame

Labels = Callable[[], Mapping[int, str]]


class Sink(Protocol):
    """Takes every frame's report."""

    def take(self, report: FrameReport) -> None:
        """One frame."""

    def close(self) -> None:
        """No more will come; everything taken is written."""


class InOrder:
    """Hands reports on in the order of capture, whatever order they were settled in."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._next = 0
        self._early: dict[int, FrameReport] = {}

    def add(self, sink: Sink) -> None:
        """One more sink, before the first frame."""
        self._sinks.append(sink)

    def take(self, report: FrameReport) -> None:
        """One frame, in any order."""
        self._early[report.frame.index] = report
        while (ready := self._early.pop(self._next, None)) is not None:
            self._next += 1
            for sink in self._sinks:
                sink.take(ready)

    def close(self) -> None:
        """Hands on what is left, gaps or not."""
        for index in sorted(self._early):
            for sink in self._sinks:
                sink.take(self._early[index])
        self._early.clear()
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """``results.jsonl``: a line a frame."""

    def __init__(self, stream: TextIO, labels: Labels, *, owned: bool) -> None:
        self._stream = stream
        self._labels = labels
        self._owned = owned

    def take(self, report: FrameReport) -> None:
        """See ``Sink``."""
        self._stream.write(json.dumps(to_json(report, self._labels()), separators=(",", ":")) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """See ``Sink``."""
        if self._owned:
            self._stream.close()


def open_json_lines(path: Path, labels: Labels) -> JsonLines:
    """Creates the file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return JsonLines(path.open("w", encoding="utf-8"), labels, owned=True)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error


def to_json(report: FrameReport, labels: Mapping[int, str]) -> dict[str, Any]:
    """A line of ``results.jsonl``."""
    frame = report.frame
    line: dict[str, Any] = {
        "frame": frame.index,
        "source": frame.source or None,
        "captured_ns": frame.captured_ns,
        "captured_unix_ns": frame.captured_unix_ns,
        "model": report.model,
        "bundle_sha256": report.bundle_sha256,
        "outcome": report.outcome.value,
        "reason": report.reason or None,
        "operating_point": report.operating_point,
        "payload_bytes": report.payload_bytes,
        "latency_ms": {name: round(ms, 3) for name, ms in report.stages_ms.items()},
    }
    if report.detail:
        line["detail"] = report.detail
    return line | _answer(report.answer, labels)


def _answer(answer: Answer | None, labels: Mapping[int, str]) -> dict[str, Any]:
    if isinstance(answer, Classification):
        rows = [{"class_id": s.class_id, "label": labels.get(s.class_id, ""), "score": round(s.score, 6)} for s in answer.top]
        return {"predictions": rows}
    if isinstance(answer, Detection):
        return {
            "detections": [
                {
                    "class_id": b.class_id, "label": labels.get(b.class_id, ""), "score": round(b.score, 6),
                    "box_px": [round(v, 2) for v in b.box_px],
                }
                for b in answer.boxes
            ]
        }  # fmt: skip
    return {}


class VideoFile:
    """Annotated frames as one clip; pictures of other sizes are fitted into the first one's."""

    def __init__(self, path: Path, labels: Labels, *, fps: float) -> None:
        self._path = path
        self._labels = labels
        self._fps = fps
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def take(self, report: FrameReport) -> None:
        """See ``Sink``."""
        if report.frame.image is None:
            return
        picture = annotate(report.frame.image, report, self._labels())
        if self._writer is None:
            self._size = (picture.shape[1] // 2 * 2, picture.shape[0] // 2 * 2)
            fourcc = cv2.VideoWriter.fourcc(*_FOURCC[self._path.suffix.lower()])
            self._writer = cv2.VideoWriter(str(self._path), fourcc, self._fps, self._size)
            if not self._writer.isOpened():
                raise ConfigError(f"--save-video {self._path} cannot be written")
        self._writer.write(_fit(picture, self._size))

    def close(self) -> None:
        """See ``Sink``."""
        if self._writer is not None:
            self._writer.release()


_FOURCC = {".mp4": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}


def _fit(picture: Frame, size: tuple[int, int]) -> Frame:
    width, height = size
    if picture.shape[1] == width and picture.shape[0] == height:
        return picture
    ratio = min(width / picture.shape[1], height / picture.shape[0])
    fitted = (max(1, int(picture.shape[1] * ratio)), max(1, int(picture.shape[0] * ratio)))
    inner = cv2.resize(picture, fitted, interpolation=cv2.INTER_AREA)
    canvas = np.zeros((height, width, 3), np.uint8)
    y, x = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
    canvas[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
    return canvas


class PictureFiles:
    """Annotated frames as single pictures: one file for one picture, otherwise a directory."""

    def __init__(self, path: Path, labels: Labels, *, single: bool) -> None:
        self._path = path
        self._labels = labels
        self._single = single
        if not single:
            path.mkdir(parents=True, exist_ok=True)

    def take(self, report: FrameReport) -> None:
        """See ``Sink``."""
        if report.frame.image is None:
            return
        name = (report.frame.source or "frame").replace("/", "_")
        target = self._path if self._single else self._path / f"{report.frame.index:06d}-{Path(name).stem}.jpg"
        picture = annotate(report.frame.image, report, self._labels())
        if not cv2.imwrite(str(target), picture):
            raise ConfigError(f"--save-video {target} cannot be written")

    def close(self) -> None:
        """See ``Sink``."""


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


def open_video(path: Path, labels: Labels, *, fps: float, pictures: bool, many: bool) -> Sink:
    """The sink ``--save-video`` asks for: a clip for a video suffix, a picture or a directory of pictures otherwise.

    Args:
        path: where.
        labels: of the model that runs.
        fps: of the clip.
        pictures: whether the source is made of pictures.
        many: whether it is more than one.

    Raises:
        ConfigError: a name that is neither.
    """
    suffix = path.suffix.lower()
    if not path.parent.exists():
        raise ConfigError(f"--save-video {path}: the directory {path.parent} does not exist")
    if suffix in _FOURCC:
        return VideoFile(path, labels, fps=min(fps, 2.0) if pictures else fps)
    if suffix in (".jpg", ".jpeg", ".png"):
        if many or not pictures:
            raise ConfigError(f"--save-video {path} is one picture, the source is not; give a directory or a .mp4")
        return PictureFiles(path, labels, single=True)
    if not suffix:
        return PictureFiles(path, labels, single=False)
    raise ConfigError(f"--save-video {path}: give a .mp4, .avi or .mkv, a .jpg or .png for one picture, or a directory")
