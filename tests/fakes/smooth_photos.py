"""Smooth photographs of chance, for tests that compress, train or judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_smooth_photos(folder: Path, count: int, *, seen_px: tuple[int, int], size_px: tuple[int, int]) -> Path:
    """Writes ``count`` PNGs, 0.png and on, into a new folder.

    Args:
        folder: made here.
        count: of photos.
        seen_px: width and height of the noise that is enlarged: how much there is to see.
        size_px: width and height of the photos.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 255, (*seen_px[::-1], 3), dtype=np.uint8)
        Image.fromarray(small).resize(size_px, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder
