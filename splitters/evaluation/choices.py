"""What a device can do besides splitting: the image as JPEG or WebP, and the bundle's local model, measured on the same photos."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from protos.messages import Answer, Detection
from splitters.bundle import Bundle
from splitters.bundle.offload import OffloadOption, compress, ladder, pareto_offloads, restore
from splitters.evaluation.measure import Each, Measured, Photos, nothing, run_whole
from splitters.runtime.head import quantiles
from splitters.runtime.local import open_local
from splitters.runtime.pictures import read_picture
from splitters.runtime.tail import Tail
from splitters.tasks.base import form_of

Value = Callable[[Sequence[Answer]], float]
Remember = Callable[[Mapping[str, object], Callable[[], Measured]], Measured]
_CLOCKED = 40
_DETECTOR_QUALITY = 28


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
                payload_bytes=quantiles(measured.sizes), accuracy=value(measured.answers),
                encode_ms=quantiles(np.array(taken[2:] or taken)),
            )
        )  # fmt: skip
        tick(f"offload {image_format} q{quality} {side} px")
    return pareto_offloads(found)


def offload_ladder(tail: Tail, photos: Photos) -> list[tuple[str, int, int]]:
    """A detector takes seconds a setting and needs its resolution: the coarse half of the ladder is left out."""
    settings = ladder(photos.input_px)
    if form_of(tail.bundle.manifest.task) is not Detection:
        return settings
    sides = sorted({side for _, _, side in settings})
    return [s for s in settings if s[1] >= _DETECTOR_QUALITY and s[2] in (sides[1], sides[-1])]


def _run(tail: Tail, photos: Photos, image_format: str, quality: int, side: int, each: Each) -> Measured:
    size_px = (photos.pictures.shape[1], photos.pictures.shape[2])
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
