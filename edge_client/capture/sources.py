"""What ``--camera`` can be, and how each kind is opened and read. Everything here blocks; a thread of its own calls it.

``parse_source`` tells the kinds apart; ``open_camera`` opens one.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np

from edge_client.capture.given import PICTURE, checked_image
from edge_client.capture.masking import may_hold_secret, shown_url
from protos.errors import ConfigError, SourceError
from splitters.runtime.inputs import ARRAY_SUFFIXES, Raw, read_arrays
from splitters.runtime.pictures import PICTURE_SUFFIXES, content_of, files_below, read_picture
from splitters.runtime.video import DEFAULT_FPS, VideoReader
from splitters.tasks.preprocess import BLANK, Frame

__all__ = ["DEFAULT_FPS", "Camera", "Shot", "Source", "SourceFaults", "open_camera", "parse_source"]

log = logging.getLogger(__name__)

Kind = Literal["device", "url", "video", "picture", "directory", "synthetic"]

_NAMED = 5  # files named in a warning about many


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A parsed ``--camera``.

    Attributes:
        target: device index, URL, path, or the options after ``synthetic:``.
        camera: whether frames come whether or not they are wanted (devices, URLs, the test pattern).
    """

    kind: Kind
    target: str

    @property
    def camera(self) -> bool:
        """Whether frames come at their own time, wanted or not."""
        return self.kind in ("device", "url", "synthetic")

    @property
    def shown(self) -> str:
        """The target as logs, results and people may see it."""
        match self.kind:
            case "url":
                return shown_url(self.target)
            case "synthetic":
                return f"synthetic:{self.target}"
            case _:
                return self.target

    @property
    def pictures(self) -> bool:
        """Whether it is made of single pictures."""
        return self.kind in ("picture", "directory")


def parse_source(text: str) -> Source:
    """Tells what kind of source ``text`` names.

    Raises:
        SourceError: a path that does not exist.
        ConfigError: empty.
    """
    if not text:
        raise ConfigError("--camera is empty; give a device index, /dev/videoN, a URL, a file, a directory or synthetic:")
    if text.startswith("synthetic:"):
        SyntheticCamera(text.removeprefix("synthetic:"))  # refuses bad options now rather than in a thread
        return Source(kind="synthetic", target=text.removeprefix("synthetic:"))
    if text.isdecimal() and text.isascii():
        return Source(kind="device", target=text)
    path = _path(text)
    if path is None:
        return _elsewhere(text)
    if text.startswith("/dev/video"):
        return Source(kind="device", target=text)
    if path.is_dir():
        return Source(kind="directory", target=str(path))
    if not path.is_file():
        raise SourceError(f"{text} is no regular file; --camera takes files, directories, a camera's index or its URL")
    single = path.suffix in ARRAY_SUFFIXES or content_of(path) == "picture" or _damaged_picture(path)
    kind: Kind = "picture" if single else "video"
    return Source(kind=kind, target=str(path))


def _path(text: str) -> Path | None:
    """The existing path that ``text`` names; None: there is none."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, or the home of nobody
        return None


def _elsewhere(text: str) -> Source:
    if text.lower().startswith("file://"):
        raise SourceError("--camera takes a file by its path, without file://")
    if "://" in text:
        scheme, _, rest = text.partition("://")
        return Source(kind="url", target=f"{scheme.lower()}://{rest}")
    if text.startswith("/dev/video"):
        raise SourceError(f"there is no camera at {text}")
    if may_hold_secret(text):
        raise SourceError("--camera is no file, and no URL either: one begins with rtsp://, http:// or the like")
    raise SourceError(f"{text} is neither a file, a directory, a camera index nor a URL")


def _damaged_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES - {".gif"} and content_of(path) == "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """What a camera gives at a time.

    Attributes:
        raw: arrays that came with the picture; without a picture, ``image`` is blank.
        name: the file's name, where the frame comes from one; empty otherwise.
        position_s: the frame's own time since the source's beginning; None where the source has none.
    """

    image: Frame
    raw: Raw | None = None
    name: str = ""
    position_s: float | None = None


@dataclass(kw_only=True, slots=True)
class SourceFaults:
    """What a source could not give.

    Attributes:
        unreadable: pictures that cannot be read.
        left_out: entries of a directory that are no pictures.
        video: what a video lacks, in a few words; empty: nothing.
    """

    unreadable: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    video: str = ""

    def __str__(self) -> str:
        parts = [self.video] if self.video else []
        if self.unreadable:
            parts.append(f"{_count(self.unreadable, 'picture')} that cannot be read: {_names(self.unreadable)}")
        return "; ".join(parts)


def _count(paths: list[Path], what: str) -> str:
    return f"{len(paths)} {what}{'' if len(paths) == 1 else 's'}"


def _names(paths: list[Path]) -> str:
    names = ", ".join(p.name for p in paths[:_NAMED])
    return names + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")


class Camera(Protocol):
    """An opened source: frames until the end."""

    fps: float
    """Frames per second it was recorded at or delivers; 0: unknown."""

    def read(self) -> Shot | None:
        """The next frame, None at the end. Blocks.

        Raises:
            SourceError: reading failed, which is no end.
        """
        ...

    def faults(self) -> SourceFaults:
        """What it could not give, as far as it was read."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def open_camera(source: Source) -> Camera:
    """Opens a source.

    Raises:
        SourceError: nothing there, or nothing that gives a frame.
    """
    if source.kind == "synthetic":
        return SyntheticCamera(source.target)
    if source.kind == "picture":
        return PictureCamera([Path(source.target)], root=Path(source.target).parent)
    if source.kind == "directory":
        root = Path(source.target)
        return PictureCamera(files_below(root), root=root, directory=True)
    return DeviceCamera(source.target) if source.kind == "device" else VideoCamera(source)


class VideoCamera:
    """A network stream or a video file."""

    def __init__(self, source: Source) -> None:
        """Raises SourceError when it cannot be opened."""
        file = Path(source.target) if source.kind == "video" else None
        self._name = file.name if file is not None else ""
        self._shown = source.shown
        self._reader = VideoReader(file or source.target, shown=source.shown)
        self.fps = self._reader.fps or (DEFAULT_FPS if file is not None else 0.0)
        self._timed = file is not None

    def read(self) -> Shot | None:
        """See ``Camera``."""
        frame = self._reader.read()
        if frame is None:
            return None
        return Shot(image=frame[0], name=self._name, position_s=frame[1] if self._timed else None)

    def faults(self) -> SourceFaults:
        """See ``Camera``."""
        return SourceFaults(video=f"{self._shown} is not whole: {self._reader.faults}" if self._reader.faults else "")

    def close(self) -> None:
        """See ``Camera``."""
        self._reader.close()


class DeviceCamera:
    """A camera of this device, by OpenCV: FFmpeg's wheels know no V4L2."""

    def __init__(self, target: str) -> None:
        """Raises SourceError when it cannot be opened or gives no first frame."""
        device = int(target) if target.isdecimal() else target
        on_linux = os.name == "posix" and Path("/dev").is_dir()
        self._capture = cv2.VideoCapture(device, cv2.CAP_V4L2 if on_linux else cv2.CAP_ANY)
        if not self._capture.isOpened():
            self._capture = cv2.VideoCapture(device, cv2.CAP_ANY)
        self._first = self.read() if self._capture.isOpened() else None
        if self._first is None:
            self._capture.release()
            raise SourceError(f"camera {target} does not exist or gives no picture; another program may hold it")
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else 0.0
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)

    _first: Shot | None = None

    def read(self) -> Shot | None:
        """See ``Camera``."""
        if self._first is not None:
            shot, self._first = self._first, None
            return shot
        ok, image = self._capture.read()
        return Shot(image=image.astype(np.uint8, copy=False)) if ok and image is not None else None

    def faults(self) -> SourceFaults:
        """See ``Camera``."""
        return SourceFaults()

    def close(self) -> None:
        """See ``Camera``."""
        self._capture.release()


class PictureCamera:
    """Single pictures, or files of arrays, by name. One that cannot be read is an error for a file, a warning in a directory."""

    def __init__(self, paths: list[Path], *, root: Path, directory: bool = False) -> None:
        self.fps = 0.0
        self._paths = iter(paths)
        self._root = root
        self._directory = directory
        self._faults = SourceFaults()
        self._delivered = 0

    def read(self) -> Shot | None:
        """See ``Camera``.

        Raises:
            SourceError: not one picture could be read.
        """
        for path in self._paths:
            if self._directory and not self._promising(path):
                self._faults.left_out.append(path)
                continue
            try:
                image, raw = _arrays(path) if path.suffix in ARRAY_SUFFIXES else (read_picture(path), None)
            except SourceError as error:
                if not self._directory:
                    raise
                log.warning("%s; it is left out", error.message)
                self._faults.unreadable.append(path)
                continue
            self._delivered += 1
            return Shot(image=image, raw=raw, name=path.relative_to(self._root).as_posix())
        self._end()
        return None

    def _promising(self, path: Path) -> bool:
        """Whether a file is a picture by its content or, perhaps damaged, by its name."""
        try:
            return path.is_file() and (
                path.suffix in ARRAY_SUFFIXES or content_of(path) != "other" or path.suffix.lower() in PICTURE_SUFFIXES
            )
        except SourceError:
            return True  # it cannot be opened: reading it says why

    def _end(self) -> None:
        left_out, unreadable = self._faults.left_out, self._faults.unreadable
        if not self._delivered:
            if unreadable:
                raise SourceError(f"none of the {len(unreadable)} files in {self._root} is a picture that can be read")
            also = f"; it holds {_names(left_out)}" if left_out else ""
            raise SourceError(f"directory {self._root} holds no pictures{also}")
        if left_out:
            log.warning("%s of %s is no picture and left out: %s", _count(left_out, "file"), self._root, _names(left_out))

    def faults(self) -> SourceFaults:
        """See ``Camera``."""
        return self._faults

    def close(self) -> None:
        """See ``Camera``."""


def _arrays(path: Path) -> tuple[Frame, Raw]:
    """The arrays of a file, of which one called ``image`` is the frame's picture."""
    raw = read_arrays(path)
    picture = raw.pop(PICTURE, None)
    return (BLANK if picture is None else checked_image(picture)), raw


class SyntheticCamera:
    """A moving test pattern: ``synthetic:fps=30,size=640x480,still=0`` (any subset; ``still=1`` does not move)."""

    def __init__(self, options: str) -> None:
        """Raises ConfigError for an option it does not know."""
        self.fps = 30.0
        width, height, self._still = 640, 480, False
        for item in filter(None, options.split(",")):
            name, _, value = item.partition("=")
            try:
                if name == "fps":
                    self.fps = float(value)
                elif name == "size":
                    width, height = (int(v) for v in value.split("x"))
                elif name == "still":
                    self._still = bool(int(value))
                else:
                    raise ConfigError(f"synthetic: has no option {name!r}; it takes fps=30, size=640x480 and still=1")
            except ValueError as error:
                raise ConfigError(f"synthetic: {item!r} is not understood; for example synthetic:fps=30,size=640x480") from error
        if not (0 < self.fps <= 1000 and 16 <= width <= 8192 and 16 <= height <= 8192):
            raise ConfigError("synthetic: needs 0 < fps <= 1000 and sides of 16..8192 px")
        y, x = np.mgrid[:height, :width]
        waves = [127 + 80 * np.sin(x / 23), 127 + 80 * np.sin(y / 31), 127 + 80 * np.sin((x + y) / 47)]
        self._background: Frame = np.stack(waves, axis=-1).astype(np.uint8)
        self._count = 0

    def read(self) -> Shot | None:
        """See ``Camera``."""
        step = 0 if self._still else self._count
        self._count += 1
        image = self._background.copy()
        height, width = image.shape[:2]
        centre = (int(width * (0.5 + 0.35 * math.sin(step / 20))), int(height * (0.5 + 0.35 * math.cos(step / 27))))
        cv2.circle(image, centre, max(4, height // 8), (40, 40, 230), -1)
        cv2.putText(image, f"{step:06d}", (8, height - 12), cv2.FONT_HERSHEY_SIMPLEX, height / 480, (255, 255, 255), 2)
        return Shot(image=image)

    def faults(self) -> SourceFaults:
        """See ``Camera``."""
        return SourceFaults()

    def close(self) -> None:
        """See ``Camera``."""
