"""Offload as H.264 on this device: its encoder, and what the server's decoder holds.

An H.264 frame depends on the one encoded just before it. On a stream that one arrives before, or the session ends; but a frame may
be held back, refused undecoded, or lost with the session. Each of these breaks the chain, and the next frame is a key frame.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from protos.errors import HeadtailError, MissingDependencyError, ModelError, PayloadError
from protos.messages import Result
from splitters.runtime.h264 import ENCODERS, FPS, SOFTWARE, H264Encoder, find_encoder, reduced, video_size
from splitters.runtime.h264_stream import VideoPayload
from splitters.tasks.preprocess import Frame

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
_KEPT = 256  # more than can be in flight


class VideoSender:
    """This device's encoder. Used by the device's worker alone.

    Args:
        size_px: (height, width) of the model's input.
        encoder: FFmpeg's name of the one wanted; ``auto``: the device's own where it works, else libx264; ``off``: none.

    Attributes:
        name: of the encoder that works here; empty: none.
    """

    def __init__(self, size_px: tuple[int, int], encoder: str = AUTO) -> None:
        self._size_px = size_px
        self._stream: H264Encoder | None = None
        self.name = ""
        if encoder == OFF:
            return
        wanted: Sequence[str] = ENCODERS if encoder == AUTO else (encoder, SOFTWARE)
        self.name = find_encoder(video_size(size_px, 0), wanted)
        if not self.name:
            log.warning("no H.264 encoder works on this device (tried %s): pictures are sent one by one", ", ".join(wanted))
        elif encoder not in (AUTO, self.name):
            log.warning("the H.264 encoder %s does not work on this device; %s is used", encoder, self.name)

    def encode(self, picture: Frame, quality: int, shorter_px: int, reference: int | None, bitrate_bps: int) -> VideoPayload:
        """One frame.

        Args:
            picture: the model's input.
            quality: see `H264Encoder.encode`.
            shorter_px: shorter side of what is coded; 0: the input's.
            reference: id of the frame encoded just before; None: this must be a key frame.
            bitrate_bps: of an encoder that knows no quality.

        Raises:
            ModelError: no encoder works any more.
        """
        size = video_size(self._size_px, shorter_px)
        try:
            return self._encode(picture, quality, size, reference, bitrate_bps)
        except (ModelError, MissingDependencyError) as error:
            self._stream = None
            if self.name in ("", SOFTWARE):
                raise ModelError(f"no H.264 encoder works: {error.message}") from error
            log.warning("%s; %s is used from here on", error.message, SOFTWARE)
            self.name = SOFTWARE
        return self.encode(picture, quality, shorter_px, None, bitrate_bps)

    def _encode(self, picture: Frame, quality: int, size: tuple[int, int], reference: int | None, bitrate_bps: int) -> VideoPayload:
        stream = self._stream
        if stream is not None and self.name == SOFTWARE:
            again = reference is None and stream.quality != quality
        else:  # a device's own encoder begins again for a key frame and for another bitrate
            again = reference is None or stream is None or stream.bitrate_bps != bitrate_bps
        if stream is None or again or stream.size != size:
            stream = self._stream = H264Encoder(self.name, size, quality, bitrate_bps)
        units, key = stream.encode(reduced(picture, size), quality, key=reference is None)
        return VideoPayload(units=units, reference=None if key else reference)


def bitrate_of(payload_bytes: float) -> int:
    """The bitrate, bits/s, at which an encoder gives frames of so many bytes."""
    return int(8 * FPS * payload_bytes)


class VideoChain:
    """What the server's decoder holds of this session's H.264 stream, as far as the device knows. Pure state."""

    def __init__(self) -> None:
        self._size_px = 0
        self._newest: int | None = None  # id of the frame encoded last; None: the next is a key frame
        self._ids: deque[int] = deque(maxlen=_KEPT)  # frames from the newest key frame on that depend on each other

    @property
    def standing_px(self) -> int | None:
        """The size setting of the stream that can go on; None: the next frame is a key frame, whatever its size."""
        return self._size_px if self._newest is not None else None

    def take(self, size_px: int) -> int | None:
        """A frame of that size is about to be encoded: the id that it depends on; None: it must be a key frame.

        Until `queued` says that it went out the stream does not stand, since the encoder has gone on.
        """
        reference = self._newest if size_px == self._size_px else None
        self._newest, self._size_px = None, size_px
        return reference

    def holds(self, reference: int | None) -> bool:
        """Whether a frame with that reference can be decoded, by all that is known; a key frame, None, always can."""
        return reference is None or reference in self._ids

    def queued(self, wire_id: int, reference: int | None) -> None:
        """The frame that was taken was handed to the session."""
        if reference is None:
            self._ids.clear()
        elif reference not in self._ids:  # that was lost while this one was encoded
            return
        self._ids.append(wire_id)
        self._newest = wire_id

    def lost(self, wire_id: int) -> None:
        """The frame was held back, or not decoded; those of an earlier stream, and what is no video, matter no more."""
        if wire_id in self._ids:
            self.reset()

    def answered(self, result: Result) -> None:
        """A result came; one that refuses a video frame says whether it was decoded all the same."""
        if result.error is not None and not result.layers_decoded:
            self.lost(result.frame_id)

    def reset(self) -> None:
        """A new session: its server holds nothing."""
        self._newest = None
        self._ids.clear()


def is_hopeless(error: HeadtailError, *, key: bool) -> bool:
    """Whether a refusal means that video frames will go on being refused: a key frame that cannot be decoded, or a limit."""
    return key if isinstance(error, PayloadError) else not error.retryable
