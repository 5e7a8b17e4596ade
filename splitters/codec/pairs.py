"""Two frames of a fixed camera, made from still photos: what the predicted mode's tables are fitted on.

Real fixed-camera video differs between frames by sensor and compression noise, by slow changes of exposure, and by
objects that move over a still background. `camera_pair` imitates the three, so that tables can be fitted from any
folder of photos and no test video is ever seen in training.

Shape legend: photos are (H, W, 3) uint8.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Photo = NDArray[np.uint8]


def camera_pair(photo: Photo, other: Photo, rng: np.random.Generator) -> tuple[Photo, Photo]:
    """Returns an earlier and a later frame of the scene `photo`, through which pieces of `other` move.

    Args:
        photo: the background.
        other: another photo of the same size, from which moving objects are cut.
        rng: source of all randomness.

    Raises:
        ValueError: the two photos differ in size.
    """
    if photo.shape != other.shape or photo.ndim != 3:
        raise ValueError(f"a pair is made from two photos of one size, got {photo.shape} and {other.shape}")
    height, width = photo.shape[:2]
    earlier, later = photo.astype(np.float32), photo.astype(np.float32)
    for _ in range(int(rng.integers(0, 4))):
        radius_y, radius_x = (rng.uniform(0.03, 0.2) * side for side in (height, width))
        centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
        shift_y, shift_x = rng.normal(0, 0.02, size=2) * (height, width)
        earlier = _paste(earlier, other, (centre_y, centre_x), (0.0, 0.0), (radius_y, radius_x))
        later = _paste(later, other, (centre_y, centre_x), (shift_y, shift_x), (radius_y, radius_x))
    later = later * np.float32(rng.normal(1, 0.004)) + np.float32(rng.normal(0, 0.4))
    strength = 10 ** rng.uniform(-0.6, 0.5)
    return _finish(earlier, strength, rng), _finish(later, strength, rng)


def _finish(frame: NDArray[np.float32], strength: float, rng: np.random.Generator) -> Photo:
    noisy = np.rint(frame + _noise(frame.shape, strength, rng))
    finished: Photo = np.clip(noisy, 0, 255).astype(np.uint8)
    return finished


def _paste(
    frame: NDArray[np.float32],
    other: Photo,
    centre: tuple[float, float],
    shift: tuple[float, float],
    radius: tuple[float, float],
) -> NDArray[np.float32]:
    """Puts the ellipse around `centre` of `other` into `frame`, moved by `shift` (whole pixels)."""
    dy, dx = round(shift[0]), round(shift[1])
    y, x = np.ogrid[: frame.shape[0], : frame.shape[1]]
    inside = ((y - dy - centre[0]) / radius[0]) ** 2 + ((x - dx - centre[1]) / radius[1]) ** 2 <= 1
    return np.where(inside[:, :, None], np.roll(other, (dy, dx), axis=(0, 1)).astype(np.float32), frame)


def _noise(shape: tuple[int, ...], strength: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Sensor noise, half of it smooth over 8 x 8 blocks as video compression leaves it."""
    fine = rng.normal(0, strength, size=shape).astype(np.float32)
    blocks = rng.normal(0, strength / 2, size=(-(-shape[0] // 8), -(-shape[1] // 8), shape[2])).astype(np.float32)
    coarse = blocks.repeat(8, axis=0).repeat(8, axis=1)[: shape[0], : shape[1]]
    return fine + coarse
