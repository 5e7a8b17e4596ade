"""Offload: what is compressed on the device comes back at the model's size; the table survives its file and keeps its frontier."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from protos.errors import BundleError, ConfigError
from splitters.bundle.offload import (
    OffloadOption,
    compress,
    dump_offloads,
    ladder,
    load_offloads,
    pareto_offloads,
    restorable,
    restore,
)
from splitters.bundle.operating_point import Quantiles


def option(n_bytes: float, accuracy: float, ms: float = 1.0, quality: int = 50) -> OffloadOption:
    return OffloadOption(
        format="jpeg", quality=quality, payload_bytes=Quantiles(p50=n_bytes, p95=n_bytes), accuracy=accuracy,
        encode_ms=Quantiles(p50=ms, p95=ms),
    )  # fmt: skip


def test_a_compressed_picture_comes_back_at_the_models_size() -> None:
    y, x = np.mgrid[0:96, 0:128]
    picture = np.stack([2 * y, 2 * x, x + y], -1).astype(np.uint8)  # smooth: survives being halved
    data = compress(picture, image_format="jpeg", quality=90, size_px=48)
    small = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert small is not None
    assert small.shape == (48, 64, 3)
    back = restore(small.astype(np.uint8), (96, 128))
    assert back.shape == picture.shape
    assert np.abs(back.astype(int) - picture).mean() < 6
    assert len(data) < len(compress(picture, image_format="jpeg", quality=90))


def test_only_a_reduced_input_is_taken_for_one() -> None:
    assert restorable(48, 64, (96, 128))
    assert restorable(96, 128, (96, 128))
    assert not restorable(192, 256, (96, 128)), "larger than the input"
    assert not restorable(48, 48, (96, 128)), "another shape"
    assert not restorable(12, 16, (96, 128)), "too small to be useful"


def test_the_frontier_drops_what_another_beats_in_everything() -> None:
    kept = pareto_offloads([option(3000, 0.6), option(1000, 0.5), option(3200, 0.55), option(3000, 0.6, ms=2.0)])
    assert [(o.payload_bytes.p50, o.accuracy, o.encode_ms.p50) for o in kept] == [(1000, 0.5, 1.0), (3000, 0.6, 1.0)]


def test_the_table_survives_its_file_and_a_broken_one_is_a_bundle_error() -> None:
    table = (option(1000, 0.5), option(3000, 0.6, quality=80))
    assert load_offloads(dump_offloads(table)) == table
    for broken in ("{", "[1]", '[{"format": "jpeg"}]', dump_offloads(table).replace('"jpeg"', '"gif"')):
        with pytest.raises(BundleError, match="offloads"):
            load_offloads(broken)


def test_the_ladder_follows_the_input_size() -> None:
    assert {side for _, _, side in ladder(448, ("jpeg",))} == {256, 320, 384, 448}
    with pytest.raises(ConfigError, match="quality"):
        option(1, 0.5, quality=0)
