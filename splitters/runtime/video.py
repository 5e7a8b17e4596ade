"""The one reader of videos and network streams, on FFmpeg through PyAV.

Frames come upright (rotation metadata is applied) and with their own time. A video that ends before its container says so,
or has holes, is read as far as it goes; ``faults`` tells what was missing. A read that fails is an error, never an end.

Shape legend: frames are (H, W, 3) uint8 BGR.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError
from splitters.runtime.pictures import turned

if TYPE_CHECKING:
    import av
    import av.container

Frame = NDArray[np.uint8]

DEFAULT_FPS = 25.0
MAX_FPS = 1000.0
_GAP_S, _GAP_FRAMES = 0.5, 3  # a shorter pause in a constant frame rate is an encoder's, no hole
_EARLY_S = 0.3


@dataclass(kw_only=True, slots=True)
class VideoFaults:
    """What a video lacks.

    Attributes:
        missing: frames the container promises and does not hold.
        undecodable: frames that are there and cannot be decoded.
        damaged: frames that were decoded in part, and delivered.
        gaps: pauses in a constant frame rate, where the container counts no frames.
        ends_at_s, promised_s: where it ends and where it should, if earlier; else 0.
    """

    missing: int = 0
    undecodable: int = 0
    damaged: int = 0
    gaps: int = 0
    ends_at_s: float = 0.0
    promised_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.missing or self.undecodable or self.damaged or self.gaps or self.promised_s)

    def __str__(self) -> str:
        parts = [f"{n} {'frame' if n == 1 else 'frames'} {what}" for n, what in (
            (self.missing, "missing"), (self.undecodable, "that cannot be decoded"), (self.damaged, "damaged"),
        ) if n]  # fmt: skip
        if self.gaps:
            parts.append(f"{self.gaps} {'gap' if self.gaps == 1 else 'gaps'} in time")
        if self.promised_s:
            parts.append(f"it ends at {self.ends_at_s:.1f} s of {self.promised_s:.1f} s")
        return ", ".join(parts)


class VideoReader:
    """An opened video file or network stream.

    Args:
        target: a path, or a URL.
        shown: the target as people may see it.
        open_timeout_s, read_timeout_s: for URLs.

    Raises:
        SourceError: it cannot be opened, or holds no video.
    """

    def __init__(self, target: Path | str, *, shown: str, open_timeout_s: float = 5.0, read_timeout_s: float = 5.0) -> None:
        import av

        self.faults = VideoFaults()
        self._shown = shown
        self._live = isinstance(target, str)
        self._file: _File | None = None
        try:
            if isinstance(target, Path):
                self._file = _File(target)
                self._container = av.open(self._file, "r", metadata_errors="replace")
            else:
                limits = (open_timeout_s, read_timeout_s)
                self._container = av.open(target, "r", metadata_errors="replace", timeout=limits, options=_options(target))
            stream = next((s for s in self._container.streams.video if not _is_cover(s)), None)
        except (OSError, ValueError, av.FFmpegError) as error:
            self.close()
            raise SourceError(self._why_not(error)) from None  # its text may hold the URL with its password
        if stream is None:
            self.close()
            raise SourceError(f"{shown} holds no video")
        self._stream = stream
        self._stream.thread_type = "SLICE"  # threads by frame delay a camera, and lose frames beside a damaged one
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        self.fps = rate if math.isfinite(rate) and 0 < rate <= MAX_FPS else 0.0
        self._constant = _is_constant(self._stream.average_rate, self._stream.base_rate)
        self._packets = self._wanted = self._decoded = self._failed = 0
        self._start_s: float | None = None
        self._before_s = -math.inf
        self._end_s = 0.0
        self._read_error: SourceError | None = None
        self._frames = self._all()

    def _why_not(self, error: Exception) -> str:
        if not self._live and isinstance(error, OSError) and error.errno and error.errno < 4096:
            return f"{self._shown} cannot be read: {error.strerror}"
        if not self._live:
            return f"{self._shown} is no video that can be read"
        return f"nothing at {self._shown} gives a picture: {_reason(error)}"

    def read(self) -> tuple[Frame, float] | None:
        """The next frame and its time in seconds since the first; None at the end. Blocks.

        Raises:
            SourceError: reading failed, or a network stream broke.
        """
        return next(self._frames, None)

    def close(self) -> None:
        """Frees file or connection."""
        container: av.container.InputContainer | None = getattr(self, "_container", None)
        if container is not None:
            container.close()
        if self._file is not None:
            self._file.close()

    # ------------------------------------------------------------------ inside

    def _all(self) -> Iterator[tuple[Frame, float]]:
        import av

        packets = self._container.demux()
        while True:
            try:
                packet = next(packets, None)
            except (OSError, ValueError, av.FFmpegError) as error:
                yield from self._decoded_from(None)
                if isinstance(error, av.InvalidDataError) and not self._live:
                    break  # damaged to the point that nothing more is found: what is missing is counted below
                raise SourceError(f"{self._shown} cannot be read any further: {_reason(error)}") from None
            if packet is None:
                break
            self._note(packet)
            if packet.stream is self._stream:
                yield from self._decoded_from(packet)
        self._judge()

    def _decoded_from(self, packet: Any) -> Iterator[tuple[Frame, float]]:
        import av

        try:
            frames = self._stream.codec_context.decode(packet) if packet is None else packet.decode()
        except EOFError:
            return
        except (OSError, ValueError, av.FFmpegError):
            self._failed += 1
            return
        for frame in frames:
            self._decoded += 1
            self.faults.damaged += bool(frame.is_corrupt)
            yield _upright(frame), self._position(frame)

    def _position(self, frame: av.VideoFrame) -> float:
        """Seconds since the first frame; never backwards, whatever the stamps say."""
        step = 1 / (self.fps or DEFAULT_FPS)
        at = frame.time
        if at is None:
            at = self._before_s + step if self._start_s is not None else 0.0
        if self._start_s is None:
            self._start_s = at
        elif at - self._before_s > max(_GAP_S, (_GAP_FRAMES + 0.5) * step) and self._constant and not self._stream.frames:
            self.faults.gaps += 1
        self._before_s = max(at, self._before_s)
        return self._before_s - self._start_s

    def _note(self, packet: Any) -> None:
        """Counts a packet, of sound too: the container's length is that of its longest stream."""
        if packet.size and packet.stream is self._stream:
            self._packets += 1
            self._wanted += not packet.is_discard
        if packet.size and packet.pts is not None:
            self._end_s = max(self._end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))

    def _judge(self) -> None:
        """At the end of a file: what was promised, and what came."""
        if self._live:
            return
        faults = self.faults
        faults.missing = max(0, self._stream.frames - self._packets)
        if self._failed or faults.damaged:
            faults.undecodable = max(self._failed, self._wanted - self._decoded)
        start_s = (self._container.start_time or 0) / 1e6
        promised_s = (self._container.duration or 0) / 1e6
        early = promised_s - (self._end_s - start_s)
        counted = self._stream.frames and not faults.missing
        # FLV and some cameras count the length from zero, not from the first stamp.
        if promised_s and not counted and early > max(_EARLY_S, 3 / (self.fps or DEFAULT_FPS)) + start_s:
            faults.ends_at_s, faults.promised_s = max(0.0, self._end_s - start_s), promised_s
        if self._packets and not self._decoded:
            raise SourceError(f"{self._shown} is no video that can be read: not one of its {self._packets} frames can be decoded")


class _File(io.RawIOBase):
    """A file for FFmpeg without its name, which would be taken for a protocol, a pattern or a format."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes | None:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never opened
            self._file.close()
        super().close()


def _reason(error: Exception) -> str:
    """FFmpeg's reason without the address it was about, which may hold a password."""
    import av

    if isinstance(error, av.error.ExitError):
        return "nothing came within the time limit"
    return str(getattr(error, "strerror", "") or type(error).__name__).lower()


def _options(url: str) -> dict[str, str]:
    """FFmpeg's, for a camera: TCP where there is a choice, since lost datagrams are grey pictures; nothing held back."""
    options = {"fflags": "nobuffer", "rw_timeout": "5000000"}
    if url.lower().startswith("rtsp"):
        options |= {"rtsp_flags": "prefer_tcp"}
    return options


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the picture on a sound file's cover."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _is_constant(average: Fraction | None, base: Fraction | None) -> bool:
    return bool(average and base and abs(float(average) / float(base) - 1) < 0.01)


def _upright(frame: av.VideoFrame) -> Frame:
    image: Frame = frame.to_ndarray(format="bgr24", threads=1).astype(np.uint8, copy=False)
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return image
    # Row vectors: x' = a·x + c·y, y' = b·x + d·y, in 16.16 fixed point; only quarter turns and mirrors are applied.
    a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return turned(image, False, a < 0, d < 0)
    return turned(image, True, c < 0, b < 0)
