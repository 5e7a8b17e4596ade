"""Offloaded H.264: one decoder a session, all of them counted.

A predicted frame can be decoded only where the frame that it depends on was. So whatever goes wrong, the session's stream is
broken there, its next frame is refused in plain words, and the device begins again with a key frame. Nothing is concealed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from protos.errors import LimitError, PayloadError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PayloadKind
from splitters.bundle.offload import restorable, restore
from splitters.runtime.h264 import H264Decoder, padded_pixels
from splitters.runtime.h264_stream import VideoPayload

_IDLE_NS = 10_000_000_000  # a decoder unused for so long makes room for another session's


def payload_kinds(max_video_streams: int) -> list[pb.PayloadKind]:
    """What a server takes, as its welcome says it."""
    return [kind.value for kind in PayloadKind if max_video_streams > 0 or kind is not PayloadKind.VIDEO]


class VideoSlots:
    """The decoders that are open. Used on the event loop alone.

    Args:
        limit: of sessions that hold one.
        clock: monotonic ns.
    """

    def __init__(self, limit: int, clock: Callable[[], int]) -> None:
        self._limit, self._clock = limit, clock
        self._used_ns: OrderedDict[VideoStream, int] = OrderedDict()  # the one unused for the longest time comes first

    def __len__(self) -> int:
        return len(self._used_ns)

    def take(self, stream: VideoStream) -> None:
        """The stream is about to decode.

        Raises:
            LimitError: as many others as may be are at it.
        """
        now_ns = self._clock()
        if stream not in self._used_ns and len(self._used_ns) >= self._limit:
            oldest, used_ns = next(iter(self._used_ns.items()), (None, now_ns))
            if oldest is None or now_ns - used_ns < _IDLE_NS:
                raise LimitError(f"{self._limit} sessions send video; this server decodes no more at once")
            self.give_back(oldest)
            oldest.forget()
        self._used_ns[stream] = now_ns
        self._used_ns.move_to_end(stream)

    def give_back(self, stream: VideoStream) -> None:
        """The stream holds no decoder any more."""
        self._used_ns.pop(stream, None)


class VideoStream:
    """One session's."""

    def __init__(self, slots: VideoSlots) -> None:
        self._slots = slots
        self._decoder: H264Decoder | None = None
        self._held: int | None = None  # id of the frame decoded last
        self._closed = False

    def admit(self) -> None:
        """Called on the event loop before each frame.

        Raises:
            LimitError: the server decodes no more streams.
            PayloadError: the session is over.
        """
        if self._closed:
            raise PayloadError("this frame's session is over")
        self._slots.take(self)

    def decode(self, data: bytes, frame_id: int, size_px: tuple[int, int], max_pixels: int) -> NDArray[np.uint8]:
        """The model's input, in any thread, one frame after another.

        Args:
            data: the payload.
            frame_id: the frame's, which later ones refer to.
            size_px: (height, width) of the model's input.
            max_pixels: of a coded picture.

        Raises:
            PayloadError: damaged, of another size, or dependent on a frame that is not held: send a key frame.
        """
        payload = VideoPayload.from_bytes(data)
        decoder = self._decoder
        if payload.reference is None:
            decoder = H264Decoder(min(max_pixels, padded_pixels(size_px)))
        elif decoder is None or self._held is None or not payload.depends_on(self._held):
            raise PayloadError(f"the video frame depends on frame {payload.reference}, which is not held; send a key frame")
        self.forget()
        picture = decoder.decode(payload.units)
        height, width = picture.shape[:2]
        if not restorable(height, width, size_px):
            raise PayloadError(
                f"an offloaded video frame must be the model's input of {size_px[1]}x{size_px[0]} px, or that reduced to a "
                f"quarter, not {width}x{height}"
            )
        if not self._closed:
            self._decoder, self._held = decoder, frame_id
        return restore(picture, size_px)

    def forget(self) -> None:
        """The next frame must be a key frame."""
        self._decoder = self._held = None

    def close(self) -> None:
        """The session is over: its decoder is let go."""
        self._closed = True
        self.forget()
        self._slots.give_back(self)
