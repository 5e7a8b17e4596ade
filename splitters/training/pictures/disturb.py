"""Poor pictures for a training: less light, noise, blur or coarse compression, each of a random strength.

Teacher and student see the same poor picture, so a student learns to lose no more by it than its model does.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

_LIGHT = (0.12, 0.8)  # share of it that is left
_NOISE = (4.0, 28.0)  # standard deviation, of 255
_BLUR = (0.003, 0.018)  # standard deviation, of the picture's side
_QUALITY = (8, 50)  # of JPEG


def _darker(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    light = np.exp(rng.uniform(*np.log(_LIGHT)))
    table = 255 * light ** (1 / 2.2) * (np.arange(256) / 255)  # a camera's curve, of values in linear light
    darker: NDArray[np.uint8] = np.rint(table).astype(np.uint8)[picture]
    return darker


def _noisy(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    noise = rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(*_NOISE))
    return np.clip(np.rint(picture + noise), 0, 255).astype(np.uint8)


def _blurred(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), rng.uniform(*_BLUR) * min(picture.shape[:2])), np.uint8)


def _compressed(picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    quality = int(rng.integers(_QUALITY[0], _QUALITY[1] + 1))
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


DISTURBANCES = (_darker, _noisy, _blurred, _compressed)


def disturbed(picture: NDArray[np.uint8], probability: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture (H, W, 3), with some probability a poorer one; the input is left as it was.

    Args:
        picture: in either order of colours.
        probability: that one of the disturbances, equally often each, befalls it.
        rng: of the choice, its strength and the noise.
    """
    if rng.random() >= probability:
        return picture
    return DISTURBANCES[int(rng.integers(len(DISTURBANCES)))](np.ascontiguousarray(picture), rng)
