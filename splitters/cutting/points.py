"""Operating points of plain latents, measured: payload bytes and head times on photographs.

Shape legend: a run holds the latents of one photograph, batch of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from splitters.bundle.operating_point import UNMEASURED_METRIC, OperatingPoint, Quantiles
from splitters.codec import LatentCodec

_TIMED_RUNS = 20
Given = TypeVar("Given")


def channel_axis(shape: Sequence[int]) -> int:
    """Which axis of a latent (without batch) holds channels: first of (C, H, W), last of (L, C) and of (H, W, C)."""
    if len(shape) == 2 or (len(shape) == 3 and shape[0] == shape[1] != shape[2]):
        return len(shape) - 1
    return 0


def measure_points(
    head: Callable[[Given], object],
    images: Sequence[Given],
    runs: Sequence[Sequence[NDArray[Any]]],
    codec: LatentCodec,
    shapes: Sequence[Sequence[int]],
    bits: Sequence[int],
    *,
    accuracy: Sequence[float] | None = None,
    metric: str = UNMEASURED_METRIC,
) -> list[OperatingPoint]:
    """One point for each number of bits.

    Args:
        head: runs on one frame's input; its time is taken.
        images: inputs, of the photographs.
        runs: what the head made of them.
        codec: its points are named 0, 1, … in the order of ``bits``.
        shapes: of the latents, without batch.
        bits: of a symbol.
        accuracy: of each point; None: not measured.
        metric: of the accuracy.
    """
    spent = []
    for number in range(_TIMED_RUNS):
        start = time.perf_counter_ns()
        head(images[number % len(images)])
        spent.append((time.perf_counter_ns() - start) / 1e6)
    channels = sum(shape[channel_axis(shape)] if shape else 1 for shape in shapes)
    points = []
    for number, width in enumerate(bits):
        sizes = [sum(map(len, codec.encode(codec.quantise([t[0] for t in run], str(number))))) for run in runs]
        points.append(
            OperatingPoint(
                id=number, channels=channels, bits=width, payload_bytes=Quantiles.of(sizes), head_ms=Quantiles.of(spent),
                accuracy=accuracy[number] if accuracy else 0.0, accuracy_metric=metric,
            )
        )  # fmt: skip
    return points
