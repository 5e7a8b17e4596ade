"""Video codecs as a camera's user would send them: one stream, no delay, the model's own input at three sizes.

The letterbox's border is no part of what is coded: the picture's content alone is, and is put back into its border.

Shape legend: F frames; pictures are (h, w, 3) uint8 BGR.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError, MissingDependencyError
from splitters.runtime.h264 import coder_frame, reduced
from splitters.runtime.h264_stream import joined_units, split_units

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

Picture = NDArray[np.uint8]

SHARES = (1.0, 0.75, 0.5)  # of the model's input size
_NO_KEY = 1_000_000  # frames between key frames: one, at the start


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoCodec:
    """An encoder of FFmpeg's and how it is set.

    Attributes:
        encoder: FFmpeg's name of it.
        decoder: FFmpeg's name of the decoder.
        options: all but the quality.
        crfs: the ladder, best quality first.
        drop: type of the NAL units in which the encoder writes about itself, and which no receiver needs; 0: none.
    """

    encoder: str
    decoder: str
    options: tuple[tuple[str, str], ...]
    crfs: tuple[int, ...]
    drop: int = 0


CODECS = {
    "h264": VideoCodec(
        encoder="libx264", decoder="h264", crfs=(20, 24, 28, 32, 36, 40),
        options=(("preset", "veryfast"), ("tune", "zerolatency"), ("x264-params", "scenecut=0:threads=1")),
        drop=6,
    ),
    "h265": VideoCodec(
        encoder="libx265", decoder="hevc", crfs=(20, 24, 28, 32, 36, 40),
        options=(
            ("preset", "veryfast"), ("tune", "zerolatency"),
            ("x265-params", "scenecut=0:pools=none:frame-threads=1:info=0:log-level=none"),
        ),
    ),
    "av1": VideoCodec(
        encoder="libsvtav1", decoder="libdav1d", crfs=(24, 32, 40, 48, 55, 61),
        options=(("preset", "9"), ("svtav1-params", "pred-struct=1:lp=1:scd=0")),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSetting:
    """One way to send a clip.

    Attributes:
        codec: of `CODECS`.
        crf: constant rate factor.
        share: side of what is sent, in the model's input's.
    """

    codec: str
    crf: int
    share: float

    def __str__(self) -> str:
        return f"{self.codec} crf{self.crf} {self.share:.0%}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """A clip that went through a video codec.

    Attributes:
        sizes: bytes of every frame, (F,); the stream's own headers count with the first.
        pictures: what the receiver sees, at the size that was given.
        encode_ms: of every frame, one thread, the colour conversion included; (F,).
    """

    sizes: NDArray[np.float64]
    pictures: list[Picture]
    encode_ms: NDArray[np.float64]


def video_ladder(codec: str, crfs: Sequence[int] | None = None, shares: Sequence[float] = SHARES) -> list[VideoSetting]:
    """Every setting of one codec.

    Raises:
        ConfigError: no such codec.
        MissingDependencyError: PyAV is not installed, or its FFmpeg has no such encoder.
    """
    if codec not in CODECS:
        raise ConfigError(f"video codec {codec!r} is unknown; there are {', '.join(CODECS)}")
    spec = CODECS[codec]
    for name, mode in ((spec.encoder, "w"), (spec.decoder, "r")):
        _find(name, mode)
    return [VideoSetting(codec=codec, crf=crf, share=share) for share in shares for crf in crfs or spec.crfs]


def _find(name: str, mode: Any) -> None:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("PyAV is not installed; run: pip install 'headtail[video]'") from error
    try:
        av.Codec(name, mode)
    except av.codec.codec.UnknownCodecError as error:
        raise MissingDependencyError(f"this PyAV's FFmpeg has no {name}; install PyAV's own wheel") from error


def code_clip(pictures: Sequence[Picture], setting: VideoSetting, fps: float) -> Coded:
    """Encodes and decodes a clip, frame by frame, as a live sender and receiver would.

    Args:
        pictures: of one size.
        setting: the codec's.
        fps: of the clip.
    """
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 tells its settings to stderr; errors alone are wanted
    spec = CODECS[setting.codec]
    height, width = pictures[0].shape[:2]
    size = (_even(width * setting.share), _even(height * setting.share))
    encoder, decoder = _encoder(spec, setting, size, fps), _decoder(spec)
    sizes, encode_ms = np.zeros(len(pictures)), np.zeros(len(pictures))
    seen: list[Picture] = []
    order = 0
    for number, picture in enumerate([*pictures, None]):
        start_ns = time.perf_counter_ns()
        packets = encoder.encode(None if picture is None else _frame(picture, size, number))
        taken_ms = (time.perf_counter_ns() - start_ns) / 1e6
        if picture is not None:
            encode_ms[number] = taken_ms
        for packet in packets:
            packet = _bare(packet, spec.drop) if spec.drop else packet  # noqa: PLW2901
            sizes[order] += packet.size
            order += 1
            seen += [_picture(f, width, height) for f in decoder.decode(packet)]
    seen += [_picture(f, width, height) for f in decoder.decode(None)]
    if order != len(pictures) or len(seen) != len(pictures):
        raise ConfigError(f"{setting} gave {order} packets and {len(seen)} pictures for {len(pictures)} frames")
    return Coded(sizes=sizes, pictures=seen, encode_ms=encode_ms)


def _even(side: float) -> int:
    """The nearest even number of pixels that x264's chroma and SVT-AV1's smallest picture allow."""
    return max(64, 2 * round(side / 2))


def _encoder(spec: VideoCodec, setting: VideoSetting, size: tuple[int, int], fps: float) -> VideoCodecContext:
    import av

    encoder = cast("VideoCodecContext", av.CodecContext.create(spec.encoder, "w"))
    encoder.width, encoder.height = size
    encoder.pix_fmt = "yuv420p"
    encoder.framerate = Fraction(fps).limit_denominator(1000)
    encoder.time_base = 1 / encoder.framerate
    encoder.gop_size = _NO_KEY
    encoder.max_b_frames = 0
    encoder.thread_count = 1
    encoder.options = {**dict(spec.options), "crf": str(setting.crf)}
    return encoder


def _bare(packet: Any, drop: int) -> Any:
    """A packet without the NAL units of one type: x264 writes its version and settings into every stream, 700 bytes of them."""
    import av

    units = split_units(bytes(packet))
    kept = [u for u in units if u[0] & 0x1F != drop]
    return packet if len(kept) == len(units) else av.Packet(joined_units(kept))


def _decoder(spec: VideoCodec) -> VideoCodecContext:
    import av

    decoder = cast("VideoCodecContext", av.CodecContext.create(spec.decoder, "r"))
    decoder.thread_count = 1
    return decoder


def _frame(picture: Picture, size: tuple[int, int], number: int) -> Any:
    frame = coder_frame(reduced(picture, size))
    frame.pts = number
    return frame


def _picture(frame: Any, width: int, height: int) -> Picture:
    picture: Picture = frame.to_ndarray(format="bgr24")
    if picture.shape[:2] != (height, width):
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)
    return picture
