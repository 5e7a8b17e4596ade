"""A bundle's operating-point table, measured on photos as they will be served: bytes, agreement with the whole model, head ms.

What is judged is what the tail answers from a real, decoded payload, against what the whole model answers to the same photo.
A bundle that holds no whole model is compared with its own halves with nothing lost between them: its head and tail are the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError
from protos.messages import Detection
from splitters.bundle import Bundle, Measured
from splitters.bundle.operating_point import mark_pareto
from splitters.runtime.head import Head, open_codec, quantiles
from splitters.runtime.local import open_local
from splitters.runtime.tail import load_tail
from splitters.tasks.base import task_of
from splitters.tasks.preprocess import Frame, input_image

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]
Told = Callable[[int, int, str], None]
METRIC = "agreement"
_FEW = 50
_ROUNDS = 14
_WARM = 2


def few(photos: Sequence[Frame]) -> list[Frame]:
    """Evenly drawn photos, as many as are worth the time of running the whole model and every operating point on them."""
    return [photos[i * len(photos) // _FEW] for i in range(_FEW)] if len(photos) > _FEW else list(photos)


def measure_table(bundle: Bundle, frames: Sequence[Frame], show: Told | None = None) -> Measured:
    """Measures every operating point, and the local model where there is one.

    Args:
        bundle: written, its table not yet measured.
        frames: photos as OpenCV reads them.
        show: told how many photos are measured, of how many.

    Raises:
        SourceError: no photo.
    """
    if not frames:
        raise SourceError("an operating-point table is measured on photographs, and there are none: give --photos DIR")
    codec = open_codec(bundle)
    head, tail, local = Head(bundle), load_tail(bundle), open_local(bundle)
    settings = list(dict.fromkeys(p.graphs for p in bundle.points))
    sizes: dict[int, list[int]] = {p.id: [] for p in bundle.points}
    agreed: dict[int, list[tuple[float, float]]] = {p.id: [] for p in bundle.points}
    alone: list[tuple[float, float]] = []
    found = 0
    for number, frame in enumerate(frames, 1):
        picture, size_px = input_image(frame, bundle.manifest.preprocess), (frame.shape[1], frame.shape[0])
        maps = head.stem_of(picture)
        latents = {graphs: head.latents(maps, graphs) for graphs in settings}
        whole = (
            tail.run_images([picture], [size_px])
            if tail.takes_images
            else tail.run([tensor[None] for tensor in latents[settings[0]]], [size_px])
        )
        judge = task_of(whole[0])
        found += not isinstance(whole[0], Detection) or bool(whole[0].boxes)
        for point in bundle.points:
            layers = codec.compress(latents[point.graphs], point.codec_point).payloads
            sizes[point.id].append(sum(map(len, layers)))
            decoded = [tensor[None] for tensor in codec.dequantise(codec.decode(layers))]
            agreed[point.id].append(judge.agreement(tail.run(decoded, [size_px])[0], whole[0]))
        if local is not None:
            alone.append(judge.agreement(local(frame), whole[0]))
        if show is not None:
            show(number, len(frames), "photos at every operating point")
    if not found:
        log.warning("the whole model finds nothing in these %d photos: how far the points agree with it says little", len(frames))
    head_ms = head.times_ms(input_image(frames[0], bundle.manifest.preprocess), settings)
    points = [
        replace(
            p,
            payload_bytes=quantiles(sizes[p.id]),
            accuracy=_share(agreed[p.id]),
            accuracy_metric=METRIC,
            head_ms=head_ms[p.graphs],
        )
        for p in bundle.points
    ]
    return Measured(points=tuple(mark_pareto(points)), local=(_share(alone), METRIC) if alone else None)


def _share(parts: Sequence[tuple[float, float]]) -> float:
    """The share of all that agrees; where there was nothing to find and nothing was found, all agreed."""
    right, of = np.sum(np.array(parts, np.float64).reshape(-1, 2), axis=0)
    return float(right / of) if of else 1.0
