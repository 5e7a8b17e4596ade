"""Frames to inputs, and boxes back to source pixels."""

from __future__ import annotations

import tracemalloc
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import SourceError
from splitters.bundle.manifest import Preprocess
from splitters.tasks import preprocess as preprocess_module
from splitters.tasks.preprocess import geometry, input_image, normalise, preprocess

KINDS: list[dict[str, Any]] = [
    {"resize": "stretch"}, {"resize": "shortest", "resize_px": 64}, {"resize": "letterbox"},
    {"resize": "letterbox", "anchor": "centre"}, {"resize": "cover"}, {"resize": "cover", "box_px": (56, 70)},
    {"resize": "stretch", "box_px": (52, 80)}, {"resize": "letterbox", "anchor": "centre", "box_px": (60, 80)},
    {"resize": "shortest", "resize_px": 40}, {"resize": "cover", "resampler": "pillow"},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_every_frame_becomes_the_input_size_and_boxes_return(kind: dict[str, Any], width: int, height: int) -> None:
    spec = Preprocess(size_px=(48, 64), **kind)
    assert input_image(np.zeros((height, width, 3), np.uint8), spec).shape == (48, 64, 3)
    g = geometry(spec, width, height)
    inside = np.array([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]], np.float32)
    scale, offset = np.array([g.scale_x, g.scale_y] * 2), np.array([g.offset_x_px, g.offset_y_px] * 2)
    np.testing.assert_allclose(
        g.to_source((inside * scale + offset).astype(np.float32), width, height), inside, atol=0.01 * max(width, height)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_marked_pixel_lands_where_the_geometry_says(kind: dict[str, Any]) -> None:
    frame = np.zeros((120, 200, 3), np.uint8)
    frame[50:70, 90:110] = 255
    spec = Preprocess(size_px=(48, 64), pad=0, **kind)
    ys, xs = np.nonzero(input_image(frame, spec)[..., 0] > 127)
    g = geometry(spec, 200, 120)
    assert abs(xs.mean() + 0.5 - (100 * g.scale_x + g.offset_x_px)) <= 1
    assert abs(ys.mean() + 0.5 - (60 * g.scale_y + g.offset_y_px)) <= 1


def test_normalise_orders_channels_and_scales() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 255  # blue
    spec = Preprocess(resize="stretch", size_px=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    out = normalise(image, spec)
    assert out.shape == (1, 3, 8, 8)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[0, :, 0, 0], [-1, -1, 1], atol=1e-6)


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)])
def test_what_is_no_picture_is_refused(frame: Any) -> None:
    with pytest.raises(SourceError):
        preprocess(frame, Preprocess(resize="stretch", size_px=(8, 8)))


@pytest.mark.parametrize("size", [(30, 900), (900, 30), (3, 2000), (1, 1)])
@pytest.mark.parametrize("interpolation", ["auto", "area", "bilinear", "bicubic"])
def test_a_narrow_picture_is_cropped_before_it_is_scaled(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], interpolation: Any
) -> None:
    """The same picture within rounding, without the 600 MB that 3 x 9000 px would become in between."""
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    picture = cv2.GaussianBlur(noise, (0, 0), 2).astype(np.uint8)
    spec = Preprocess(resize="shortest", size_px=(64, 64), resize_px=72, interpolation=interpolation)
    monkeypatch.setattr(preprocess_module, "_MAX_SCALED", 10**9)
    whole = input_image(picture, spec).astype(int)
    monkeypatch.setattr(preprocess_module, "_MAX_SCALED", 0)
    assert np.abs(input_image(picture, spec) - whole).max() <= 3


def test_the_memory_of_a_narrow_picture_is_its_own() -> None:
    tracemalloc.start()
    input_image(np.zeros((9000, 3, 3), np.uint8), Preprocess(resize="shortest", size_px=(224, 224), resize_px=256))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20
