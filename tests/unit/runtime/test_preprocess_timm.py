"""What a cut model of timm or torchvision sees is what it is evaluated with: compared with their own transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from splitters.cutting import sources, torchvision_compat
from splitters.tasks.preprocess import preprocess

torchvision_compat.activate()
timm_data = pytest.importorskip("timm.data")

PHOTOS = [(480, 640), (641, 427), (500, 333), (224, 224), (97, 91), (31, 300)]
CONFIGS = [
    (mode, crop, size, interpolation)
    for mode in ("center", "squash", "border")
    for crop, size, interpolation in (
        (0.875, (224, 224), "bicubic"), (0.95, (224, 224), "bilinear"), (1.0, (384, 384), "bicubic"), (1.15, (96, 96), "bicubic"),
        (0.9, (128, 96), "bilinear"), (1.0, (75, 101), "bicubic"), (0.965, (331, 331), "bicubic"),
    )
]  # fmt: skip


def photo(height: int, width: int) -> np.ndarray:
    """Fine detail, so that filters and offsets show."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / a) * np.cos(y / b) for a, b in ((1.7, 3.1), (9, 2.2), (31, 17))]
    return np.clip(np.stack(waves, 2) + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_crop_mode_and_size_is_timms_own(config: tuple[str, float, tuple[int, int], str]) -> None:
    mode, crop, size, interpolation = config
    data: dict[str, Any] = {
        "input_size": (3, *size), "interpolation": interpolation, "crop_pct": crop, "crop_mode": mode,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip
    own = timm_data.create_transform(**data, is_training=False)
    spec = sources._timm_preprocess(data, size)
    assert spec is not None
    for shape in PHOTOS:
        picture = photo(*shape)
        wanted = own(Image.fromarray(picture)).numpy()[None]
        got = preprocess(np.ascontiguousarray(picture[..., ::-1]), spec)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, atol=2e-6, err_msg=str(shape))


def test_a_models_own_configuration_is_used_at_another_size_too() -> None:
    for size in (None, (160, 160), (128, 192)):
        source = sources.load_source("timm:mobilenetv3_small_050", size_px=size)
        import timm

        config = timm.data.resolve_model_data_config(timm.create_model("mobilenetv3_small_050"))
        height, width = size or config["input_size"][1:]
        own = timm_data.create_transform(**{**config, "input_size": (3, height, width)}, is_training=False)
        picture = photo(300, 401)
        assert source.preprocess is not None
        got = preprocess(np.ascontiguousarray(picture[..., ::-1]), source.preprocess)
        np.testing.assert_allclose(got, own(Image.fromarray(picture)).numpy()[None], atol=2e-6)


@pytest.mark.parametrize("name", ["mobilenet_v2", "regnet_y_400mf"])
def test_torchvision_models_get_the_transform_of_their_weights(name: str) -> None:
    from torchvision import models

    source = sources.load_source(f"torchvision:{name}")
    own = models.get_model_weights(name).DEFAULT.transforms()
    assert source.preprocess is not None
    for shape in PHOTOS:
        picture = photo(*shape)
        got = preprocess(np.ascontiguousarray(picture[..., ::-1]), source.preprocess)
        np.testing.assert_allclose(got, own(Image.fromarray(picture)).numpy()[None], atol=2e-6, err_msg=str(shape))


def test_a_very_narrow_picture_is_seen_as_if_it_were_scaled_as_a_whole() -> None:
    source = sources.load_source("torchvision:mobilenet_v2")
    from torchvision import models

    own = models.get_model_weights("mobilenet_v2").DEFAULT.transforms()
    for shape in ((3, 900), (700, 2)):
        picture = photo(*shape)
        assert source.preprocess is not None
        got = preprocess(np.ascontiguousarray(picture[..., ::-1]), source.preprocess)
        wanted = own(Image.fromarray(picture)).numpy()[None]
        assert np.abs(got - wanted).max() <= 1.01 / 255 / 0.224  # one step of 8 bits: sums are rounded in another order
