"""Our detector in pieces, for a learned bottleneck at its cut.

Shape legend: N batch; stem map (N, 32, H / 2, W / 2); cut tensor (N, 40, H / 8, W / 8), the first pyramid tap.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from splitters.bottleneck.learned import StagedModel
from splitters.bottleneck.raw_outputs import RawOutput
from splitters.zoo.detector.network import STRIDES, TAPS, Backbone, Detector


class Rest(nn.Module):
    """The backbone after the cut: all three taps."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(list(backbone.blocks.children())[TAPS[0] + 1 :])

    def forward(self, cut: Tensor) -> tuple[Tensor, ...]:
        """Maps the cut tensor to the taps, itself the first."""
        taps, x = [cut], cut
        for index, block in enumerate(self.blocks, start=TAPS[0] + 1):
            x = block(x)
            if index in TAPS:
                taps.append(x)
        return tuple(taps)


class Neck(nn.Module):
    """The pyramid, taking its maps one by one."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, *taps: Tensor) -> tuple[Tensor, ...]:
        """Maps the taps to the pyramid's levels."""
        levels: tuple[Tensor, ...] = self.neck(taps)
        return levels


class Predict(nn.Module):
    """The predictor, taking the levels one by one, its two kinds of output apart."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        """Maps the levels to box distances (N, 4, h, w) and class logits (N, 80, h, w) of each, in turn."""
        return tuple(part for raw in self.predictor(levels) for part in (raw[:, :4], raw[:, 4:]))


def joined(branches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``Predict``'s output as the predictor's own: one tensor (N, 84, h, w) a level."""
    return tuple(torch.cat(branches[i : i + 2], dim=1) for i in range(0, len(branches), 2))


def branches(size_px: int) -> tuple[RawOutput, ...]:
    """What ``Predict`` returns, in order."""
    return tuple(
        RawOutput(node=f"{kind}_{stride}", probability=kind == "classes", channel_axis=1, cells=(size_px // stride,) * 2)
        for stride in STRIDES
        for kind in ("boxes", "classes")
    )


def staged_detector(model: Detector, size_px: int) -> StagedModel:
    """The detector cut after block 4, matched at its taps, its pyramid and its raw outputs (GHND for detectors).

    Args:
        model: whose pieces are copied.
        size_px: side of the pictures it will see.
    """
    model = copy.deepcopy(model).eval()
    backbone = model.backbone
    return StagedModel(
        stem=backbone.stem, body=backbone.blocks[: TAPS[0] + 1],
        stages=(Rest(backbone), Neck(model.neck), Predict(model.predictor)),
        task="detection", taps=2 * len(TAPS), raw=branches(size_px), same_front=True,
    )  # fmt: skip
