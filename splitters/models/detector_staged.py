"""Our detector in pieces, for a learned bottleneck at its cut.

Shape legend: N batch; stem map (N, 32, H / 2, W / 2); cut tensor (N, 40, H / 8, W / 8), the first pyramid tap.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from splitters.models.detector import TAPS, Backbone, Detector
from splitters.models.learned import StagedModel


class _Rest(nn.Module):
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


class _Neck(nn.Module):
    """The pyramid, taking its maps one by one."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, *taps: Tensor) -> tuple[Tensor, ...]:
        """Maps the taps to the pyramid's levels."""
        levels: tuple[Tensor, ...] = self.neck(taps)
        return levels


class _Predict(nn.Module):
    """The predictor, taking the levels one by one."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        """Maps the levels to raw outputs."""
        raw: tuple[Tensor, ...] = self.predictor(levels)
        return raw


def staged_detector(model: Detector) -> StagedModel:
    """The detector cut after block 4, matched at its taps, its pyramid and its raw outputs (GHND for detectors)."""
    model = copy.deepcopy(model).eval()
    backbone = model.backbone
    return StagedModel(
        stem=backbone.stem,
        body=backbone.blocks[: TAPS[0] + 1],
        stages=(_Rest(backbone), _Neck(model.neck), _Predict(model.predictor)),
        task="detection",
    )
