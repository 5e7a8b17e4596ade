"""The tails this project builds itself: what ``headtail:NAME`` in a bundle's manifest means.

Shape legend: N batch, C channels, H and W feature-map height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protos.errors import BundleError
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0


class EfficientNetLite0Tail(nn.Module):
    """Blocks after the cut, pooled classifier; and the whole network for offloaded images.

    Args:
        network: the whole network.
        at: index of the last block that runs on the device.
    """

    def __init__(self, network: EfficientNetLite0, at: int) -> None:
        super().__init__()
        self.network = network
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        """Maps the latent (N, C, H, W), the output of block ``at``, to logits (N, 1000)."""
        net = self.network
        features = net.features(net.blocks[self.at + 1 :](x))
        logits: Tensor = net.classifier(net.pool(features).flatten(1))
        return logits

    def whole(self, images: Tensor) -> Tensor:
        """Maps normalised images (N, 3, H, W) to logits (N, 1000)."""
        logits: Tensor = self.network(images)
        return logits


def _efficientnet_lite0(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    network = EfficientNetLite0()
    network.load_state_dict(state, strict=True)
    return EfficientNetLite0Tail(network, int(spec["at"]))


def _detector(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    from splitters.zoo.detector.export_plain import build_detector_tail

    return build_detector_tail(spec, state)


def _detector_learned(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    from splitters.zoo.detector.export import build_learned_detector_tail

    return build_learned_detector_tail(spec, state)


def _learned(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    from splitters.zoo.efficientnet_lite0.export import build_learned_tail

    return build_learned_tail(spec, state)


_BUILDERS = {
    "efficientnet-lite0": _efficientnet_lite0, "efficientnet-lite0-learned": _learned,
    "detector": _detector, "detector-learned": _detector_learned,
}  # fmt: skip


def build_tail(name: str, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """Builds the tail ``headtail:name``.

    Args:
        name: the part after the colon of the manifest's factory.
        spec: the manifest's ``tail``.
        state: all tensors of its safetensors parts.

    Raises:
        BundleError: the name is unknown, or the weights do not fit.
    """
    if name not in _BUILDERS:
        raise BundleError(f"tail headtail:{name} is unknown; this headtail has {', '.join(sorted(_BUILDERS))}")
    try:
        with torch.no_grad():
            return _BUILDERS[name](spec, state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise BundleError(f"the tail's weights do not fit headtail:{name}: {str(error).splitlines()[0]}") from error
