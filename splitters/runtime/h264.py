"""H.264 for offload: one picture in, one packet out, and back. Device, server and measurement all code with what is here.

**Quality, frame by frame.** FFmpeg lets nothing of a running libx264 be set but its mean bitrate, and x264 follows a new mean
only after many frames (measured: 1,232 bytes a frame at 160 kbit/s, 1,697 after going down to 40). What works at once is a
region of interest that covers the picture: its offset is added to every block's quantiser. So a stream is opened at one
constant rate factor, and a frame may have another. Neither a key frame nor a second encoder is needed. Which blocks are skipped
goes by the first: a stream opened at 40 and asked for 38 kept a detector's AP50 at .970 with 167 bytes a frame, where one
opened at 36 kept .996 with 235 (YOLOX-nano, vtest). So each key frame opens the stream at the quality that is wanted then. A
device's own encoder knows no regions: it is opened at a bitrate and opened again for another one, with a key frame.

Shape legend: pictures are (h, w, 3) uint8 BGR with even sides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import MissingDependencyError, ModelError, PayloadError
from splitters.runtime.h264_stream import picture_units

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

log = logging.getLogger(__name__)

Picture = NDArray[np.uint8]

SOFTWARE: Final = "libx264"
ENCODERS: Final = ("h264_v4l2m2m", "h264_nvmpi", "h264_vaapi", SOFTWARE)
"""Asked for in this order: a device's own first."""

FPS: Final = 10
MAX_QUALITY: Final = 51
_OPTIONS: Final = {
    "preset": "veryfast", "tune": "zerolatency", "x264-params": "scenecut=0:threads=1:ref=1", "forced-idr": "1",
}  # fmt: skip
_ENDLESS: Final = 1 << 30  # frames between key frames
_TRIED: Final = 3


class H264Encoder:
    """One stream of one size.

    Args:
        name: FFmpeg's name of the encoder.
        size: (width, height), even.
        quality: the rate factor that ``libx264`` is opened at, see `encode`.
        bitrate_bps: of an encoder that knows no quality; ``libx264`` takes none.

    Raises:
        MissingDependencyError: this FFmpeg has no such encoder, or the device does not open it.
    """

    def __init__(self, name: str, size: tuple[int, int], quality: int = 30, bitrate_bps: int = 0) -> None:
        import av

        self.name, self.size, self.quality, self.bitrate_bps = name, size, quality, bitrate_bps
        self._count = 0
        self._graphs: dict[int, tuple[Any, Any]] = {}
        try:
            self._context = cast("VideoCodecContext", av.CodecContext.create(name, "w"))
            self._context.width, self._context.height = size
            self._context.pix_fmt = "yuv420p"
            self._context.framerate, self._context.time_base = Fraction(FPS), Fraction(1, FPS)
            self._context.gop_size, self._context.max_b_frames, self._context.thread_count = _ENDLESS, 0, 1
            if name == SOFTWARE:
                self._context.options = {**_OPTIONS, "crf": str(quality)}
            else:
                self._context.bit_rate = bitrate_bps
            self._context.open()
        except (av.FFmpegError, ValueError, OSError) as error:
            raise MissingDependencyError(f"the encoder {name} does not open here: {error}") from error

    def encode(self, picture: Picture, quality: int, *, key: bool = False) -> tuple[bytes, bool]:
        """The picture's NAL units, and whether it became a key frame; the first one always does.

        Args:
            picture: of this stream's size.
            quality: the quantiser as libx264's rate factor counts it, 1..51; 51 is worst.
            key: it must depend on no other.

        Raises:
            ModelError: the encoder failed, or kept the picture back.
        """
        import av

        frame = coder_frame(picture)
        frame.pts, frame.time_base = self._count, Fraction(1, FPS)
        try:
            if self.name == SOFTWARE and quality != self.quality:
                frame = self._offset(frame, quality - self.quality)
            frame.pict_type = av.video.frame.PictureType.I if key else av.video.frame.PictureType.NONE
            packets = self._context.encode(frame)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise ModelError(f"the encoder {self.name} failed: {error}") from error
        self._count += 1
        if len(packets) != 1:
            raise ModelError(f"the encoder {self.name} gave {len(packets)} packets for a frame; one at once is needed")
        units, is_key = picture_units(bytes(packets[0]))
        if not units or (not is_key and (key or self._count == 1)):
            raise ModelError(f"the encoder {self.name} gave no picture, or no key frame where one is needed")
        return units, is_key

    def _offset(self, frame: Any, offset: int) -> Any:
        """The frame with a region of interest that covers it."""
        import av

        if offset not in self._graphs:
            graph = av.filter.Graph()
            width, height = self.size
            pixels = av.VideoFormat("yuv420p", width, height)
            begin = graph.add_buffer(width=width, height=height, format=pixels, time_base=Fraction(1, FPS))
            region = graph.add("addroi", f"x=0:y=0:w=iw:h=ih:qoffset={offset}/{MAX_QUALITY}")
            begin.link_to(region)
            region.link_to(graph.add("buffersink"))
            graph.configure()
            self._graphs[offset] = (graph, begin)
        graph, _ = self._graphs[offset]
        graph.push(frame)
        return graph.pull()


class H264Decoder:
    """One stream; of whatever is not right it raises, and is then of no more use.

    Args:
        max_pixels: of a picture; larger ones are refused before memory is taken for them.
    """

    def __init__(self, max_pixels: int) -> None:
        import av

        self._context = av.CodecContext.create("h264", "r")
        self._context.thread_count = 1
        self._context.options = {"err_detect": "explode", "max_pixels": str(max_pixels), "flags": "low_delay"}

    def decode(self, units: bytes) -> Picture:
        """The one picture of a packet.

        Raises:
            PayloadError: it is damaged, too large, of another kind of pixels, or not exactly one picture.
        """
        import av

        try:
            frames = self._context.decode(av.Packet(units))
        except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
            raise PayloadError("the offloaded video frame cannot be decoded: it is damaged, or too large") from error
        if len(frames) != 1 or frames[0].is_corrupt:
            raise PayloadError("the offloaded video frame is damaged, or is not one whole picture")
        if frames[0].format.name not in ("yuv420p", "yuvj420p"):
            raise PayloadError(f"an offloaded video frame has 8-bit 4:2:0 pixels, not {frames[0].format.name[:20]}")
        return cast("Picture", frames[0].to_ndarray(format="bgr24"))


def padded_pixels(size_px: tuple[int, int]) -> int:
    """Pixels that FFmpeg's decoder counts for a picture of (height, width): whole blocks, lines of whole 64 bytes."""
    return (size_px[0] + 15) // 16 * 16 * ((size_px[1] + 63) // 64 * 64)


def video_size(size_px: tuple[int, int], shorter_px: int) -> tuple[int, int]:
    """(width, height) of a model's input of (height, width) reduced to a shorter side; even, as 4:2:0 wants it. 0: not reduced."""
    height, width = size_px
    scale = min(1.0, shorter_px / min(size_px)) if shorter_px else 1.0
    return _even(width * scale, width), _even(height * scale, height)


def _even(side: float, most: int) -> int:
    return max(2, min(2 * round(side / 2), most // 2 * 2))


def reduced(picture: Picture, size: tuple[int, int]) -> Picture:
    """The picture at (width, height), reduced by area."""
    if (picture.shape[1], picture.shape[0]) == size:
        return picture
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def coder_frame(picture: Picture) -> Any:
    """The picture as video encoders take it: 4:2:0."""
    import av

    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="bgr24").reformat(format="yuv420p")


def find_encoder(size: tuple[int, int], wanted: Sequence[str] = ENCODERS) -> str:
    """The first of some encoders that really works here: it opens, gives a packet a picture, and the decoder reads them.

    Args:
        size: (width, height) of what will be coded.
        wanted: names, in the order of preference.

    Returns:
        Its name; empty: none works. What does not is named in the log.
    """
    test = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    for name in wanted:
        try:
            encoder, decoder = H264Encoder(name, size, bitrate_bps=1_000_000), H264Decoder(padded_pixels((size[1], size[0])))
            for number in range(_TRIED):
                units, key = encoder.encode(test, 30)
                if key != (number == 0) or decoder.decode(units).shape != test.shape:
                    raise ModelError(f"the encoder {name} does not give one key frame and then predicted ones")
        except (MissingDependencyError, ModelError, PayloadError) as error:
            log.debug("H.264: %s", error.message)
            continue
        return name
    return ""
