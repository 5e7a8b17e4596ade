"""What a device can send besides latents, measured on photos."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from protos.messages import Answer
from splitters.evaluation.choices import measure_offloads, past, video_settings
from splitters.evaluation.measure import load_photos, run_whole
from splitters.runtime.tail import load_tail
from tests.fakes.bundles import write_tiny_bundle


def test_h264_is_measured_on_photos_that_are_given_a_past(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle")
    (tmp_path / "photos").mkdir()
    y, x = np.mgrid[0:60, 0:80]
    for number in range(6):
        waves = [128 + 90 * np.sin((x + 9 * number) / p + y / q) for p, q in ((5, 9), (7, 6), (11, 8))]
        cv2.imwrite(str(tmp_path / "photos" / f"{number}.png"), np.stack(waves, -1).astype(np.uint8))
    photos = load_photos(sorted((tmp_path / "photos").iterdir()), bundle)
    tail = load_tail(bundle)
    whole = run_whole(tail, photos)

    def value(answers: Sequence[Answer]) -> float:
        return sum(a.top[0].class_id == b.top[0].class_id for a, b in zip(answers, whole, strict=True)) / len(whole)  # type: ignore[union-attr]

    told: list[str] = []
    found = [o for o in measure_offloads(tail, photos, value, tick=told.append) if o.is_video]
    assert found
    assert len([t for t in told if "h264" in t]) == len(video_settings(tail, photos))
    for o in found:
        assert o.key_bytes is not None
        assert 0 < o.payload_bytes.p50 < o.key_bytes.p50
        assert o.encode_ms.p50 > 0
    assert max(o.accuracy for o in found) >= 0.5
    last = past(photos.pictures[0], np.random.default_rng(0))
    assert np.array_equal(last[-1], photos.pictures[0])
    assert all(not np.array_equal(a, b) for a, b in pairwise(last))
