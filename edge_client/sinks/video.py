"""``--save-video``: annotated frames as a clip that browsers play, or as single pictures.

A clip lasts as long as the scene: every frame has its own time, and a frame that a newer one replaced shows the picture before
it. MP4 is written in fragments and made an ordinary file at its end, so that a clip whose end never came can be played, too.
"""

from __future__ import annotations

import io
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from edge_client.frames import NS_PER_S, FrameReport
from edge_client.sinks.annotate import annotate
from edge_client.sinks.base import Labels, Sink
from edge_client.sinks.output_file import OutputFile, State
from protos.errors import ConfigError, StorageError
from splitters.tasks.preprocess import Frame

if TYPE_CHECKING:
    import av

log = logging.getLogger(__name__)

_FORMATS = {".mp4": "mp4", ".mov": "mov", ".m4v": "mp4", ".mkv": "matroska", ".avi": "avi"}
_TICKS = 90_000  # a second
_LONGEST_PX = 4096  # of a side that decoders in browsers take
_PICTURES_FPS = 2.0
_NAME_CHARS = 100
_LEAST_FREE_BYTES = 8 << 20  # what a clip still needs for its index when the disk is all but full
_LOOK_EVERY = 16  # frames between two looks at the disk


class VideoFile:
    """Annotated frames as one clip; pictures of other sizes are fitted into the first one's.

    Args:
        output: opened and locked; overwritten when the first frame comes.
        labels: of the model that runs.
        fps: of the source, known once frames come; 0: it has none.
    """

    def __init__(self, output: OutputFile, labels: Labels, *, fps: Callable[[], float]) -> None:
        self._output = output
        self._path = output.path
        self._labels = labels
        self._fps = fps
        self._clip: _Clip | None = None
        self._last: Frame | None = None
        self._written = 0

    def take(self, report: FrameReport) -> None:
        """See ``Sink``.

        Raises:
            ConfigError: the clip cannot be started.
            StorageError: the disk is full, or the file is gone.
        """
        if report.frame.image is not None:
            self._last = annotate(report.frame.image, report, self._labels())
        if self._last is None:
            return  # nothing has been seen yet
        if self._written % _LOOK_EVERY == 0:
            self._look()
        at_s = report.frame.position_ns / NS_PER_S if report.frame.position_ns is not None else self._written / _PICTURES_FPS
        try:
            if self._clip is None:
                fps = self._fps() if report.frame.position_ns is not None else _PICTURES_FPS
                self._clip = _Clip(self._output, fps, self._last)
            self._clip.write(self._last, at_s)
        except OSError as error:
            raise self._failed(error) from error
        self._written += 1

    def close(self) -> None:
        """See ``Sink``.

        Raises:
            StorageError: what lies there is not the whole clip.
        """
        if self._clip is not None:
            clip, self._clip = self._clip, None
            try:
                clip.close()
            except OSError as error:
                raise self._failed(error) from error
            finally:
                state = self._output.state(0)
                self._output.close()
            if state is not State.SAME:
                raise StorageError(f"--save-video {self._path} was removed or replaced while it was written; the clip is lost")
            return
        if self._output.regular and self._output.state(1) is State.CUT:  # no frame came: an empty file is no clip
            self._path.unlink()
        self._output.close()

    def _look(self) -> None:
        if self._output.state(self._clip.size_bytes if self._clip else 0) is not State.SAME:
            raise StorageError(f"--save-video {self._path} was removed, replaced or cut off while it was written; the clip is lost")
        if self._output.regular and shutil.disk_usage(self._path.parent).free < _LEAST_FREE_BYTES:
            raise StorageError(f"--save-video {self._path}: the disk is full; the clip ends after {self._written} frames")

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"--save-video {self._path} is not whole: {error.strerror or error}; it ends after about {self._written} frames"
        )


class _Clip:
    """The encoder, its container and the file, from the first frame on."""

    def __init__(self, output: OutputFile, fps: float, first: Frame) -> None:
        import av

        self._file = _Writer(output)
        form = _FORMATS[output.path.suffix.lower()]
        options = {"movflags": "hybrid_fragmented"} if form in ("mp4", "mov") else {}
        self._size = _even(first.shape[1], first.shape[0])
        self._rate = Fraction(fps or 25.0).limit_denominator(1001)
        self._last_pts = -1
        self._first_s: float | None = None
        try:
            self._container = av.open(self._file, "w", format=form, options=options)
            self._stream = self._add_stream(av, form)
        except (ValueError, av.FFmpegError) as error:
            raise ConfigError(f"--save-video {output.path} cannot be started: {error}") from error

    def _add_stream(self, av_module: Any, form: str) -> Any:
        # AVI has no time stamps; motion JPEG in it is read everywhere.
        names = ("mjpeg",) if form == "avi" else ("libx264", "libopenh264", "h264_videotoolbox", "h264")
        codec = next((name for name in names if _can_encode(av_module, name)), None)
        if codec is None:
            raise ConfigError("--save-video needs an FFmpeg that writes H.264, which this one does not; a .avi works without")
        stream: Any = self._container.add_stream(codec, rate=self._rate)
        stream.width, stream.height = self._size
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
            stream.codec_context.time_base = 1 / self._rate
            stream.options = {"q:v": "3"}
        else:
            stream.pix_fmt = "yuv420p"  # what browsers play
            stream.codec_context.time_base = Fraction(1, _TICKS)
            stream.codec_context.gop_size = max(1, round(4 * float(self._rate)))
            # No frame waits for a later one: the clip is whole up to the last frame whatever ends us.
            stream.options = {"preset": "veryfast", "crf": "23", "bf": "0"} if codec == "libx264" else {}
        self._base = stream.codec_context.time_base
        return stream

    @property
    def size_bytes(self) -> int:
        """Bytes written so far, at least."""
        return self._file.size_bytes

    def write(self, picture: Frame, at_s: float) -> None:
        """One more frame, shown from ``at_s`` on.

        Raises:
            OSError: the file takes no more.
        """
        import av

        self._first_s = at_s if self._first_s is None else self._first_s
        frame = av.VideoFrame.from_ndarray(_fit(picture, self._size), format="bgr24")
        frame.pts = self._last_pts = max(self._last_pts + 1, round((at_s - self._first_s) / self._base))
        frame.time_base = self._base
        frame.duration = max(1, round(1 / self._rate / self._base))
        self._mux(frame)

    def _mux(self, frame: av.VideoFrame | None) -> None:
        with self._as_oserror():
            for packet in self._stream.encode(frame):
                self._container.mux(packet)

    def close(self) -> None:
        """Ends the clip.

        Raises:
            OSError: the file takes no more.
        """
        try:
            self._mux(None)
        finally:
            with self._as_oserror():
                self._container.close()

    @contextmanager
    def _as_oserror(self) -> Iterator[None]:
        """What the file refused, whatever FFmpeg makes of it."""
        import av

        try:
            yield
        except av.FFmpegError as error:
            raise self._file.failure or OSError(error.errno, error.strerror) from error


def _can_encode(av_module: Any, name: str) -> bool:
    try:
        av_module.codec.Codec(name, "w")
    except (ValueError, av_module.FFmpegError):
        return False
    return True


class _Writer(io.RawIOBase):
    """The output for FFmpeg: without its name, which would be taken for a protocol or a pattern."""

    def __init__(self, output: OutputFile) -> None:
        self._file = output.file
        self.size_bytes = 0
        self.failure: OSError | None = None
        if output.regular:
            self._file.truncate(0)
            self._file.seek(0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        size = len(view)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.failure = error
            raise
        self.size_bytes = max(self.size_bytes, self._file.tell())
        return size

    def read(self, size: int = -1) -> bytes | None:
        return self._file.read(size)

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()


def _even(width: int, height: int) -> tuple[int, int]:
    """The clip's size: even sides, as H.264 has them, and no longer than browsers take."""
    ratio = min(1.0, _LONGEST_PX / max(width, height))
    return max(2, math.floor(width * ratio) // 2 * 2), max(2, math.floor(height * ratio) // 2 * 2)


def _fit(picture: Frame, size: tuple[int, int]) -> Frame:
    width, height = size
    if picture.shape[1] == width and picture.shape[0] == height:
        return picture
    ratio = min(width / picture.shape[1], height / picture.shape[0])
    fitted = (max(1, min(width, round(picture.shape[1] * ratio))), max(1, min(height, round(picture.shape[0] * ratio))))
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
        name = re.sub(r"[^\w.-]+", "_", Path(report.frame.source.replace("/", "_")).stem)[:_NAME_CHARS].strip("_") or "frame"
        target = self._path if self._single else self._path / f"{report.frame.index:06d}-{name}.jpg"
        picture = annotate(report.frame.image, report, self._labels())
        ok, data = cv2.imencode(target.suffix, picture)
        if not ok:
            raise ConfigError(f"--save-video {target}: OpenCV cannot write such a picture")
        part = target.with_name(f".{target.name}.part")
        try:
            part.write_bytes(data.tobytes())
            part.replace(target)  # no half pictures, and nothing written through a link
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise StorageError(f"--save-video {target} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """See ``Sink``."""


def open_video(path: Path, labels: Labels, *, fps: Callable[[], float], pictures: bool, many: bool) -> Sink:
    """The sink ``--save-video`` asks for: a clip for a video suffix, a picture or a directory of pictures otherwise.

    Args:
        path: where.
        labels: of the model that runs.
        fps: of the source, known once frames come.
        pictures: whether the source is made of pictures.
        many: whether it is more than one.

    Raises:
        ConfigError: a name that is neither.
    """
    suffix = path.suffix.lower()
    if not path.parent.exists():
        raise ConfigError(f"--save-video {path}: the directory {path.parent} does not exist")
    if path.is_dir():
        return PictureFiles(path, labels, single=False)
    if suffix in _FORMATS:
        return VideoFile(OutputFile(path, "--save-video"), labels, fps=fps)
    if suffix in (".jpg", ".jpeg", ".png"):
        if many or not pictures:
            raise ConfigError(f"--save-video {path} is one picture, the source is not; give a directory or a .mp4")
        return PictureFiles(path, labels, single=True)
    if not suffix:
        return PictureFiles(path, labels, single=False)
    raise ConfigError(f"--save-video {path}: give a .mp4, .mov, .mkv or .avi, a .jpg or .png for one picture, or a directory")
