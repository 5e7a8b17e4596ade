"""Video clips as a camera would deliver them: frames at a fixed pace, made ready for the model.

Shape legend: F frames; pictures are (h, w, 3) uint8 BGR of the model's input size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError, MissingDependencyError, SourceError
from splitters.bundle.manifest import Preprocess
from splitters.evaluation.measure import Photos, content_area
from splitters.tasks.preprocess import Frame, input_image

FPS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Which share of a clip is taken, by its running time.

    Attributes:
        start: 0..1.
        stop: 0..1, after ``start``.
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ConfigError(f"a part of a clip lies between 0 and 1 and is not empty, got {self.start:g}..{self.stop:g}")


WHOLE = Part()


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A part of a video, as the model takes it.

    Attributes:
        name: the file's name without suffix.
        frames: as pictures of the model's input size, with the source's size.
        fps: how many of them a second holds.
    """

    name: str
    frames: Photos
    fps: float

    def __len__(self) -> int:
        return len(self.frames)


def decoded(path: Path) -> Iterator[tuple[float, Frame]]:
    """Every frame with its time in seconds, turned upright.

    Raises:
        MissingDependencyError: PyAV is not installed.
        SourceError: the file cannot be read as video.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("PyAV is not installed; run: pip install 'headtail[video]'") from error
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SourceError(f"{path} holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            pace = float(stream.average_rate or 25)
            for number, frame in enumerate(container.decode(stream)):
                time_s = float(frame.time) if frame.time is not None else number / pace
                turns = round((frame.rotation or 0) / 90) % 4
                picture = np.rot90(frame.to_ndarray(format="bgr24"), turns)
                yield time_s, np.ascontiguousarray(picture, dtype=np.uint8)
    except (av.FFmpegError, OSError) as error:
        raise SourceError(f"{path} cannot be read as video: {error}") from error


def read_clip(path: Path, spec: Preprocess, *, fps: float = FPS, part: Part = WHOLE, limit: int | None = None) -> Clip:
    """Reads a video at a camera's pace.

    A frame is taken when its time reaches the next tick of the pace; a source slower than that gives all its frames.

    Args:
        path: any file that FFmpeg reads.
        spec: how the model's input is made of a frame.
        fps: frames a second that are taken.
        part: of the clip.
        limit: at most this many frames, from the part's start.

    Raises:
        ConfigError: a pace that is none.
        SourceError: the file is no video, or fewer than two frames of it are left.
        MissingDependencyError: PyAV is not installed.
    """
    if not fps > 0:
        raise ConfigError(f"a clip is read at more than 0 frames a second, got {fps:g}")
    pictures: list[NDArray[np.uint8]] = []
    sizes: list[tuple[int, int]] = []
    first, tick = None, 0
    for time_s, frame in decoded(path):
        first = time_s if first is None else first
        if (time_s - first) * fps < tick - 0.25:
            continue
        tick = max(tick + 1, int((time_s - first) * fps) + 1)
        pictures.append(input_image(frame, spec))
        sizes.append((frame.shape[1], frame.shape[0]))
    taken = slice(round(part.start * len(pictures)), round(part.stop * len(pictures)))
    pictures, sizes = pictures[taken][:limit], sizes[taken][:limit]
    if len(pictures) < 2:
        raise SourceError(f"{path}: {len(pictures)} frames are left of this part at {fps:g} a second; two at least are needed")
    areas = tuple(content_area(spec, *size) for size in sizes)
    return Clip(name=path.stem, frames=Photos(pictures=np.stack(pictures), sizes_px=tuple(sizes), content=areas), fps=fps)
