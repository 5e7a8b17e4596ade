"""What a device can do besides splitting, measured on the same photos: the image as JPEG, WebP or H.264, and the local model.

A photo is no video. For H.264 each is given a past: a camera that pans, with sensor noise, and ends on the photo as it is. The last
frame is judged; its bytes are those of a frame that depends on another. A scene of one's own costs more or less: the client
learns that as it goes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.messages import Answer, Detection
from splitters.bundle import Bundle
from splitters.bundle.offload import VIDEO, OffloadOption, compress, ladder, pareto_offloads, restore, video_ladder
from splitters.bundle.operating_point import Quantiles
from splitters.evaluation.measure import Each, Measured, Photos, nothing, run_whole
from splitters.runtime.h264 import SOFTWARE, H264Decoder, H264Encoder, find_encoder, padded_pixels, reduced, video_size
from splitters.runtime.h264_stream import VideoPayload
from splitters.runtime.local import open_local
from splitters.runtime.pictures import read_picture
from splitters.runtime.tail import Tail
from splitters.tasks.base import form_of

Value = Callable[[Sequence[Answer]], float]
Remember = Callable[[Mapping[str, object], Callable[[], Measured]], Measured]
_CLOCKED = 40
_DETECTOR_QUALITY = 28
_PAST, _PAN_PX, _NOISE = 3, 2.0, 1.5


def measure_offloads(
    tail: Tail,
    photos: Photos,
    value: Value,
    *,
    tick: Callable[[str], None],
    remember: Remember = lambda _what, run: run(),
    each: Each = nothing,
) -> list[OffloadOption]:
    """The Pareto frontier of the offload ladder, through the compressor the device uses and the decoder the server uses.

    Args:
        tail: of a bundle that holds the whole model.
        photos: the photos, at the model's input size.
        value: accuracy of the answers, 0..1.
        tick: told of every finished setting.
        remember: gives what an earlier call measured for the same setting, or measures now.
        each: called after every photo at every setting.
    """
    found = []
    for image_format, quality, side in offload_ladder(tail, photos):
        what = {"offload": image_format, "quality": quality, "size_px": side, "opencv": cv2.__version__}
        measured = remember(what, partial(_run, tail, photos, image_format, quality, side, each))
        taken = []
        for picture in photos.pictures[:_CLOCKED]:
            start = time.thread_time_ns()
            compress(picture, image_format=image_format, quality=quality, size_px=side)
            taken.append((time.thread_time_ns() - start) / 1e6)
        found.append(
            OffloadOption(
                format=image_format, quality=quality, size_px=0 if side >= photos.input_px else side,
                payload_bytes=Quantiles.of(measured.sizes), accuracy=value(measured.answers),
                encode_ms=Quantiles.of(np.array(taken[2:] or taken)),
            )
        )  # fmt: skip
        tick(f"offload {image_format} q{quality} {side} px")
    if find_encoder(video_size(size_of(photos), 0), (SOFTWARE,)):
        found += _measure_video(tail, photos, value, tick, remember, each)
    return pareto_offloads(found)


def _measure_video(
    tail: Tail, photos: Photos, value: Value, tick: Callable[[str], None], remember: Remember, each: Each
) -> list[OffloadOption]:
    found = []
    for quality, side in video_settings(tail, photos):
        what = {"offload": VIDEO, "quality": quality, "size_px": side, "past": _PAST}
        keys, taken = np.zeros(len(photos)), list[float]()
        run = partial(_run_video, tail, photos, quality, side, each)
        measured = remember(what, run)
        for number, picture in enumerate(photos.pictures[:_CLOCKED]):
            (keys[number], *_), ms, _ = _code(picture, quality, side)
            taken += ms[1:]
        found.append(
            OffloadOption(
                format=VIDEO, quality=quality, size_px=0 if side >= photos.input_px else side,
                payload_bytes=Quantiles.of(measured.sizes), key_bytes=Quantiles.of(keys[:_CLOCKED]),
                accuracy=value(measured.answers), encode_ms=Quantiles.of(taken),
            )
        )  # fmt: skip
        tick(f"offload {VIDEO} q{quality} {side} px")
    return found


def _run_video(tail: Tail, photos: Photos, quality: int, side: int, each: Each) -> Measured:
    coded = [_code(p, quality, side) for p in photos.pictures]
    sizes = np.array([sizes[-1] for sizes, _, _ in coded], np.float64)
    return Measured(sizes=sizes, answers=run_whole(tail, photos, [last for _, _, last in coded], each=each))


def _code(picture: NDArray[np.uint8], quality: int, side: int) -> tuple[list[int], list[float], NDArray[np.uint8]]:
    """Payload bytes and thread milliseconds of a photo's past and itself, and what the server sees of the photo."""
    height, width = picture.shape[:2]
    size = video_size((height, width), side)
    encoder, decoder = H264Encoder(SOFTWARE, size, quality), H264Decoder(padded_pixels((height, width)))
    sizes, taken, seen = [], [], picture
    for number, frame in enumerate(past(picture, np.random.default_rng(0))):
        start = time.thread_time_ns()
        units, key = encoder.encode(reduced(frame, size), quality)
        taken.append((time.thread_time_ns() - start) / 1e6)
        sizes.append(len(VideoPayload(units=units, reference=None if key else number - 1).to_bytes()))
        seen = decoder.decode(units)
    return sizes, taken, restore(seen, (height, width))


def past(picture: NDArray[np.uint8], rng: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Frames of a camera that pans and ends on ``picture``, sensor noise on all but that."""
    frames = []
    for back in range(_PAST, 0, -1):
        shift = np.array([[1, 0, back * _PAN_PX], [0, 1, back * _PAN_PX / 2]], np.float32)
        moved = cv2.warpAffine(picture, shift, picture.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        noisy = moved + rng.normal(0, _NOISE, picture.shape)
        frames.append(np.clip(noisy, 0, 255).astype(np.uint8))
    return [*frames, picture]


def size_of(photos: Photos) -> tuple[int, int]:
    """(height, width) of the model's input."""
    return photos.pictures.shape[1], photos.pictures.shape[2]


def offload_ladder(tail: Tail, photos: Photos) -> list[tuple[str, int, int]]:
    """A detector takes seconds a setting and needs its resolution: the coarse half of the ladder is left out."""
    settings = ladder(photos.input_px)
    if form_of(tail.bundle.manifest.task) is not Detection:
        return settings
    sides = sorted({side for _, _, side in settings})
    return [s for s in settings if s[1] >= _DETECTOR_QUALITY and s[2] in (sides[1], sides[-1])]


def video_settings(tail: Tail, photos: Photos) -> list[tuple[int, int]]:
    """The same of H.264: rate factor, shorter side."""
    settings = video_ladder(photos.input_px)
    if tail.bundle.manifest.task != "detection":
        return settings
    qualities, sides = sorted({q for q, _ in settings}), sorted({side for _, side in settings})
    return [s for s in settings if s[0] in qualities[1:-1] and s[1] in sides[1:]]


def _run(tail: Tail, photos: Photos, image_format: str, quality: int, side: int, each: Each) -> Measured:
    size_px = size_of(photos)
    payloads = [compress(p, image_format=image_format, quality=quality, size_px=side) for p in photos.pictures]
    decoded = [cv2.imdecode(np.frombuffer(p, np.uint8), cv2.IMREAD_COLOR) for p in payloads]
    pictures = [restore(d.astype(np.uint8, copy=False), size_px) for d in decoded if d is not None]
    return Measured(sizes=np.array([len(p) for p in payloads], np.float64), answers=run_whole(tail, photos, pictures, each=each))


def measure_local(bundle: Bundle, files: Sequence[Path], value: Value, *, each: Each = nothing) -> float | None:
    """Accuracy, 0..1, of the bundle's local model over the photos; None where it has none.

    Raises:
        SourceError: a photo cannot be read.
    """
    local = open_local(bundle)
    if local is None:
        return None
    answers: list[Answer] = []
    for file in files:
        answers.append(local(read_picture(file)))
        each()
    return value(answers)
