"""What ``--camera`` can be, and how each kind is opened and read. Everything here blocks; a thread of its own calls it.

``parse_source`` tells the kinds apart; ``open_camera`` opens one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np

from protos.errors import ConfigError, SourceError
from splitters.tasks.preprocess import Frame

Kind = Literal["device", "url", "video", "picture", "directory", "synthetic"]

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})
DEFAULT_FPS = 25.0
OPEN_TIMEOUT_MS = 5000
READ_TIMEOUT_MS = 5000


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
        """The target as logs and people may see it: a URL without user, password and query, where cameras take their secrets."""
        if self.kind != "url":
            return self.target
        scheme, _, rest = self.target.partition("://")
        place = rest.partition("?")[0]
        host, slash, path = place.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" + ("?…" if "?" in rest else "")

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
    if text.isdecimal():
        return Source(kind="device", target=text)
    if "://" in text:
        return Source(kind="url", target=text)
    path = Path(text).expanduser()
    if text.startswith("/dev/video"):
        if not path.exists():
            raise SourceError(f"there is no camera at {text}")
        return Source(kind="device", target=text)
    if path.is_dir():
        return Source(kind="directory", target=str(path))
    if not path.is_file():
        raise SourceError(f"{text} is neither a file, a directory, a camera index nor a URL")
    kind: Kind = "picture" if path.suffix.lower() in PICTURE_SUFFIXES else "video"
    return Source(kind=kind, target=str(path))


class Camera(Protocol):
    """An opened source: frames until the end."""

    fps: float
    """Frames per second it was recorded at or delivers; 0: unknown."""

    def read(self) -> tuple[Frame, str] | None:
        """The next frame with its file's name (or ""), None at the end. Blocks."""
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
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
        if not paths:
            raise SourceError(f"directory {root} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        return PictureCamera(paths, root=root)
    return VideoCamera(source)


class VideoCamera:
    """A device, a stream or a video file, by OpenCV."""

    def __init__(self, source: Source) -> None:
        """Raises SourceError when it cannot be opened or gives no first frame."""
        self._name = Path(source.target).name if source.kind == "video" else ""
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_TIMEOUT_MS]
        if source.kind == "device":
            target = int(source.target) if source.target.isdecimal() else source.target
            self._capture = cv2.VideoCapture(target, cv2.CAP_V4L2 if os.name == "posix" and Path("/dev").is_dir() else cv2.CAP_ANY)
            if not self._capture.isOpened():
                self._capture = cv2.VideoCapture(target, cv2.CAP_ANY)
        else:
            self._capture = cv2.VideoCapture(source.target, cv2.CAP_FFMPEG, limits)
        self._first: Frame | None = None
        opened, frame = self._capture.read() if self._capture.isOpened() else (False, None)
        if not opened or frame is None:
            self._capture.release()
            raise SourceError(_cannot_open(source))
        self._first = frame.astype(np.uint8, copy=False)
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if math.isfinite(fps) and 0 < fps <= 1000 else 0.0
        if source.kind == "video":
            self.fps = self.fps or DEFAULT_FPS
        else:
            self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)

    def read(self) -> tuple[Frame, str] | None:
        """See ``Camera``."""
        if self._first is not None:
            frame, self._first = self._first, None
            return frame, self._name
        ok, image = self._capture.read()
        return (image.astype(np.uint8, copy=False), self._name) if ok and image is not None else None

    def close(self) -> None:
        """See ``Camera``."""
        self._capture.release()


def _cannot_open(source: Source) -> str:
    match source.kind:
        case "device":
            return f"camera {source.target} does not exist or gives no picture; another program may hold it"
        case "url":
            return f"nothing at {source.shown} gives a picture"
        case _:
            return f"{source.target} is no video that can be read"


class PictureCamera:
    """Single pictures, in order of their names. One that cannot be read is an error for a file, a warning in a directory."""

    def __init__(self, paths: list[Path], *, root: Path) -> None:
        self.fps = 0.0
        self._paths: Iterator[Path] = iter(paths)
        self._root = root
        self._single = len(paths) == 1
        self.unreadable: list[Path] = []
        self._delivered = 0

    def read(self) -> tuple[Frame, str] | None:
        """See ``Camera``.

        Raises:
            SourceError: not one picture could be read.
        """
        for path in self._paths:
            image = _read_picture(path)
            if image is not None:
                self._delivered += 1
                return image, path.relative_to(self._root).as_posix()
            self.unreadable.append(path)
        if not self._delivered:
            if self._single:
                raise SourceError(f"{self.unreadable[0]} is no picture that can be read")
            raise SourceError(f"none of the {len(self.unreadable)} files in {self._root} is a picture that can be read")
        return None

    def close(self) -> None:
        """See ``Camera``."""


def _read_picture(path: Path) -> Frame | None:
    try:
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error):
        return None
    return image.astype(np.uint8, copy=False) if image is not None else None


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

    def read(self) -> tuple[Frame, str] | None:
        """See ``Camera``."""
        step = 0 if self._still else self._count
        self._count += 1
        image = self._background.copy()
        height, width = image.shape[:2]
        centre = (int(width * (0.5 + 0.35 * math.sin(step / 20))), int(height * (0.5 + 0.35 * math.cos(step / 27))))
        cv2.circle(image, centre, max(4, height // 8), (40, 40, 230), -1)
        cv2.putText(image, f"{step:06d}", (8, height - 12), cv2.FONT_HERSHEY_SIMPLEX, height / 480, (255, 255, 255), 2)
        return image, ""

    def close(self) -> None:
        """See ``Camera``."""
