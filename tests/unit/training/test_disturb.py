"""Poor pictures for a training: each kind is poorer in its own way, as often as asked, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from protos.errors import ConfigError
from splitters.training.config import Stage, TrainConfig
from splitters.training.pictures.disturb import DISTURBANCES, disturbed
from splitters.training.pictures.photos import Crops, PhotoCache


def picture(side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (side // 4, side // 4, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)


def edges(image: np.ndarray) -> float:
    return float(np.abs(np.diff(image.astype(np.float32), axis=1)).mean())


def test_every_kind_is_poorer_in_its_own_way() -> None:
    clean = picture(192)
    kept = clean.copy()
    dark, noisy, blurred, compressed = (kind(clean, np.random.default_rng(3)) for kind in DISTURBANCES)
    assert np.array_equal(clean, kept)
    assert dark.mean() < 0.95 * clean.mean()
    assert edges(noisy) > edges(clean)
    assert abs(noisy.mean() - clean.mean()) < 2
    assert edges(blurred) < edges(clean)
    assert 0.5 < np.abs(compressed.astype(int) - clean).mean() < 40


def test_as_often_as_asked_and_all_kinds() -> None:
    clean = picture(32)
    rng = np.random.default_rng(0)
    drawn = [disturbed(clean, 0.4, rng) for _ in range(400)]
    poorer = [d for d in drawn if not np.array_equal(d, clean)]
    assert 0.3 < len(poorer) / 400 < 0.5
    assert all(d.shape == clean.shape and d.dtype == np.uint8 for d in drawn)
    assert disturbed(clean, 0.0, rng) is clean
    again = [disturbed(clean, 1.0, np.random.default_rng(i)) for i in (7, 7, 8)]
    assert np.array_equal(again[0], again[1])
    assert not np.array_equal(again[0], again[2])


def test_a_batch_is_disturbed_where_the_recipe_says_so(tmp_path: Path) -> None:
    Image.fromarray(picture(64)).save(tmp_path / "a.png")
    photos = PhotoCache([tmp_path / "a.png"], tmp_path / "cache", short_px=64)

    def batch(disturb: float) -> np.ndarray:
        crops = Crops(size_px=32, area=1.0, mean=(0.0,) * 3, std=(1.0,) * 3, disturb=disturb)
        return photos.batch([0] * 4, crops, np.random.default_rng(5)).numpy()

    assert not np.array_equal(batch(0.0), batch(1.0))
    with pytest.raises(ConfigError, match="disturb"):
        TrainConfig(model="x", stages=(Stage(steps=1),), target_bytes=(9.0,), disturb=1.5)
