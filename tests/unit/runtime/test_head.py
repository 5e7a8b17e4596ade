"""The head's stem writes into buffers it uses again: never while someone still holds what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from protos.errors import BundleError, ModelError
from splitters.bundle import Bundle
from splitters.runtime.head import BoundStem, Head
from splitters.runtime.sessions import open_graph


def images(bundle: Bundle, count: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, 3, *bundle.manifest.preprocess.size_px)).astype(np.float32) for _ in range(count)]


def test_frames_in_flight_keep_their_own_maps_and_buffers_come_back(bundle: Bundle) -> None:
    path = bundle.part_path(bundle.manifest.head.stem)
    stem, plain, shown = BoundStem(path), open_graph(path), images(bundle, 5)
    held = [stem([image]) for image in shown]
    for maps, image in zip(held, shown, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(maps, plain([image]), strict=True))
    places = {maps[0].ctypes.data for maps in held}
    assert len(places) == len(shown), "five frames in flight, five buffers"
    del maps
    held.clear()
    again = [stem([image]) for image in shown]
    assert {maps[0].ctypes.data for maps in again} == places, "no sixth buffer"
    assert all(np.array_equal(maps[0], plain([image])[0]) for maps, image in zip(again, shown, strict=True))


def test_an_input_that_is_not_contiguous_and_another_size_are_run_rightly(bundle: Bundle) -> None:
    path = bundle.part_path(bundle.manifest.head.stem)
    stem, plain = BoundStem(path), open_graph(path)
    image = images(bundle, 1)[0]
    stem([image])
    turned = np.ascontiguousarray(image.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert not turned.flags.c_contiguous
    assert np.array_equal(stem([turned])[0], plain([image])[0])
    with pytest.raises(ModelError):
        stem([image[:, :2]])
    assert np.array_equal(stem([image])[0], plain([image])[0])


def test_latents_outlive_the_frame_they_came_from(bundle: Bundle) -> None:
    head, shown = Head(bundle), images(bundle, 4)
    kept = [head.latents(head.stem([image]), bundle.points[0].graphs) for image in shown]
    alone = [Head(bundle).latents(head.stem([image]), bundle.points[0].graphs) for image in shown]
    assert all(np.array_equal(a, b) for k, w in zip(kept, alone, strict=True) for a, b in zip(k, w, strict=True))
    assert not np.array_equal(kept[0][0], kept[1][0])


def test_a_broken_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stem.onnx").write_bytes(b"no model")
    with pytest.raises(BundleError, match=r"stem\.onnx"):
        BoundStem(tmp_path / "stem.onnx")
