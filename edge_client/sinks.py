"""Where answers go: ``results.jsonl``, annotated pictures or a video, a window. In the order of capture.

A disk may fill up while a camera runs. The sink that cannot go on is closed with what it has, whole; the others get every
frame to the end, and the run ends with the error.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

import cv2
import numpy as np

from edge_client.annotate import annotate
from edge_client.frames import Age, FrameReport
from protos.errors import ConfigError, HeadtailError, MissingDependencyError, StorageError
from protos.messages import Answer, Classification, Detection
from splitters.tasks.preprocess import Frame

log = logging.getLogger(__name__)

Labels = Callable[[], Mapping[int, str]]

_LEAST_FREE_BYTES = 8 << 20  # what a clip still needs for its index when the disk is all but full
_LOOK_EVERY = 16  # frames between two looks at the disk


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


class JsonLines:
    """Results as lines on a stream that belongs to someone else: standard output."""

    def __init__(self, stream: TextIO, labels: Labels) -> None:
        self._stream = stream
        self._labels = labels

    def take(self, report: FrameReport) -> None:
        """See ``Sink``.

        Raises:
            StorageError: nobody reads it any more.
        """
        try:
            self._stream.write(to_line(report, self._labels()))
            self._stream.flush()
        except BrokenPipeError as error:
            raise StorageError("whoever read standard output has closed it; results go nowhere") from error
        except OSError as error:
            raise StorageError(f"results cannot be written to standard output any more: {error.strerror}") from error

    def close(self) -> None:
        """See ``Sink``."""


class JsonFile:
    """``results.jsonl``: a line a frame, each written at once; however the run ends, the file ends with a whole line."""

    def __init__(self, path: Path, file: BinaryIO, labels: Labels, *, whole_bytes: int = 0) -> None:
        """``file`` is unbuffered and stands at its end, which is ``whole_bytes`` from its beginning."""
        self._path = path
        self._file = file
        self._labels = labels
        self._whole_bytes = whole_bytes

    def take(self, report: FrameReport) -> None:
        """See ``Sink``.

        Raises:
            StorageError: the disk takes no more.
        """
        data = memoryview(to_line(report, self._labels()).encode())
        size = len(data)
        try:
            while data:
                data = data[self._file.write(data) :]  # a disk that fills up takes a part before it refuses
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._whole_bytes)
            raise StorageError(
                f"--output {self._path} cannot be written any more: {error.strerror}; it ends before frame {report.frame.index}"
            ) from error
        self._whole_bytes += size

    def close(self) -> None:
        """See ``Sink``."""
        self._file.close()


def open_json_file(path: Path, labels: Labels, *, append: bool = False) -> JsonFile:
    """Creates the file, or goes on with it: behind its last whole line, should an earlier run have been cut off.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        if not append:
            return JsonFile(path, path.open("wb", buffering=0), labels)
        file = path.open("r+b" if path.is_file() else "wb", buffering=0)
        return JsonFile(path, file, labels, whole_bytes=_to_last_line(file))
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from error


def _to_last_line(file: BinaryIO) -> int:
    """Cuts off what stands behind the last line's end and goes there; how many bytes remain."""
    end = file.seek(0, 2)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            end = start + at + 1
            break
        end = start
    file.seek(end)
    if file.read(1) not in (b"", b"{"):
        raise OSError(errno.EINVAL, "what stands behind its last line is no result; it is left as it is")
    file.truncate(end)
    return file.seek(end)


def to_line(report: FrameReport, labels: Mapping[int, str]) -> str:
    """A line of ``results.jsonl``, its end included."""
    return json.dumps(to_json(report, labels), separators=(",", ":")) + "\n"


def to_json(report: FrameReport, labels: Mapping[int, str]) -> dict[str, Any]:
    """What a line of ``results.jsonl`` says."""
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
    return line | _answer(report.answer, labels, report.age)


def _answer(answer: Answer | None, labels: Mapping[int, str], age: Age | None) -> dict[str, Any]:
    if isinstance(answer, Classification):
        rows = [{"class_id": s.class_id, "label": labels.get(s.class_id, ""), "score": round(s.score, 6)} for s in answer.top]
        return {"predictions": rows}
    if isinstance(answer, Detection):
        return {
            "detections": [
                {
                    "class_id": b.class_id, "label": labels.get(b.class_id, ""), "score": round(b.score, 6),
                    "box_px": [round(v, 2) for v in b.box_px],
                    **({"age_frames": age.frames, "age_ms": round(age.ms, 1)} if age is not None else {}),
                }
                for b in answer.boxes
            ]
        }  # fmt: skip
    return {}


class VideoFile:
    """Annotated frames as one clip; pictures of other sizes are fitted into the first one's.

    OpenCV does not say when a write fails, so the disk is looked at while there is room for the clip's index, and the clip
    is opened again at the end.
    """

    def __init__(self, path: Path, labels: Labels, *, fps: float) -> None:
        self._path = path
        self._labels = labels
        self._fps = fps
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._written = 0

    def take(self, report: FrameReport) -> None:
        """See ``Sink``.

        Raises:
            ConfigError: the clip cannot be begun.
            StorageError: the disk is full.
        """
        if report.frame.image is None:
            return
        picture = annotate(report.frame.image, report, self._labels())
        if self._written % _LOOK_EVERY == 0 and shutil.disk_usage(self._path.parent).free < _LEAST_FREE_BYTES:
            raise StorageError(f"--save-video {self._path}: the disk is full; the clip ends after {self._written} frames")
        if self._writer is None:
            self._size = (picture.shape[1] // 2 * 2, picture.shape[0] // 2 * 2)
            fourcc = cv2.VideoWriter.fourcc(*_FOURCC[self._path.suffix.lower()])
            self._writer = cv2.VideoWriter(str(self._path), fourcc, self._fps, self._size)
            if not self._writer.isOpened():
                raise ConfigError(f"--save-video {self._path} cannot be written")
        self._writer.write(_fit(picture, self._size))
        self._written += 1

    def close(self) -> None:
        """See ``Sink``.

        Raises:
            StorageError: what lies there is not the whole clip.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        clip = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG)
        frames = int(clip.get(cv2.CAP_PROP_FRAME_COUNT)) if clip.isOpened() else 0
        clip.release()
        if frames < 0.9 * self._written - 1:  # some containers only know their length
            raise StorageError(
                f"--save-video {self._path} is not whole: {frames} of {self._written} frames can be read; is the disk full?"
            )


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
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--save-video {path} cannot be made a directory: {error.strerror}") from error

    def take(self, report: FrameReport) -> None:
        """See ``Sink``."""
        if report.frame.image is None:
            return
        name = (report.frame.source or "frame").replace("/", "_")
        target = self._path if self._single else self._path / f"{report.frame.index:06d}-{Path(name).stem}.jpg"
        picture = annotate(report.frame.image, report, self._labels())
        ok, data = cv2.imencode(target.suffix, picture)
        if not ok:
            raise ConfigError(f"--save-video {target}: OpenCV cannot write such a picture")
        try:
            target.write_bytes(data.tobytes())
        except OSError as error:
            with suppress(OSError):
                target.unlink()  # no half pictures
            raise StorageError(f"--save-video {target} cannot be written: {error.strerror}") from error

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
