"""Our EfficientNet-Lite0 is the published one, and its head ∘ tail is the whole."""

from __future__ import annotations

import pytest
import torch

from splitters.zoo.efficientnet_lite0.export_plain import CUT_BLOCK, PlainHead, PlainTail
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0, load_efficientnet_lite0, weights_path


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0()


@pytest.mark.parametrize("size_px", [160, 224])
def test_equals_the_published_definition(network: EfficientNetLite0, size_px: int) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    published = package.EfficientNet.from_name("efficientnet-lite0", image_size=size_px)
    published.load_state_dict(torch.load(weights_path(), weights_only=True))
    x = torch.randn(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = network(x), published.eval()(x)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_head_then_tail_is_the_whole(network: EfficientNetLite0) -> None:
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tail = PlainTail(network, CUT_BLOCK).eval()
    with torch.inference_mode():
        latent = PlainHead(network, CUT_BLOCK).eval()(x)
        assert latent.shape == (1, 80, 14, 14)
        torch.testing.assert_close(tail(latent), network(x), atol=1e-5, rtol=1e-5)
