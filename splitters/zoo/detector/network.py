"""Our detector: EfficientNet-Lite0 backbone, light pyramid, anchor-free box predictor for COCO's 80 classes.

Shape legend: N batch, H and W input height and width (multiples of 32 px), s a level's stride (8, 16, 32), P the positions of
all levels together. A level's raw output is (N, 84, H / s, W / s): 4 box distances (left, top, right, bottom, as logarithms of
strides from the position's centre), then 80 class logits.

The predictor follows FCOS (Tian et al. 2019, arXiv 1904.01355) without centre-ness: the class score itself is trained to be the
quality of the box (task-aligned learning, Feng et al. 2021, arXiv 2108.07755).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from protos.errors import MissingDependencyError, ModelError
from splitters.bundle.manifest import Preprocess
from splitters.tasks.decoding.boxes import Detections, Pixels, select
from splitters.tasks.labels.coco_classes import CATEGORY_IDS
from splitters.tasks.preprocess import geometry, preprocess
from splitters.zoo.detector.fpn import LightPan
from splitters.zoo.efficientnet_lite0.network import INPUT_MEAN, INPUT_STD, EfficientNetLite0
from splitters.zoo.layers import conv_unit, fold_batch_norm

STRIDES = (8, 16, 32)
TAPS = (4, 10, 15)  # the backbone's last blocks at strides 8, 16 and 32
TAP_CHANNELS = (40, 112, 320)
CHANNELS = 96
INPUT_SIZE_PX = 320
PAD = 114
WEIGHTS = Path(__file__).parent / "weights" / "detector.safetensors"

# How a frame becomes the network's input.
PREPROCESS = Preprocess(
    resize="letterbox", size_px=(INPUT_SIZE_PX, INPUT_SIZE_PX), interpolation="auto", anchor="top_left", pad=PAD,
    mean=(INPUT_MEAN,) * 3, std=(INPUT_STD,) * 3, channel_order="rgb",
)  # fmt: skip


class Backbone(nn.Module):
    """EfficientNet-Lite0 up to its last block, batch norms folded; its classifier is left out.

    Args:
        network: whose ``stem`` and ``blocks`` are taken over (and changed in place); a fresh one when None.
    """

    def __init__(self, network: EfficientNetLite0 | None = None) -> None:
        super().__init__()
        network = network or EfficientNetLite0()
        self.stem, self.blocks = network.stem, network.blocks
        fold_batch_norm(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps (N, 3, H, W) to the taps: (N, 40, H / 8, W / 8), (N, 112, H / 16, W / 16), (N, 320, H / 32, W / 32)."""
        return self.after(self.stem(x), 0, ())

    def after(self, x: Tensor, block: int, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Goes on from the input of ``blocks[block]``, with the taps already passed."""
        found = list(taps)
        for index in range(block, len(self.blocks)):
            x = self.blocks[index](x)
            if index in TAPS:
                found.append(x)
        return tuple(found)


class Predictor(nn.Module):
    """Class logits and box distances at every position; convolutions shared by the levels, batch norms not.

    Args:
        channels: of every level.
        classes: number of object classes.
        depth: separable convolutions before the outputs.
    """

    def __init__(self, channels: int, classes: int = len(CATEGORY_IDS), depth: int = 2) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False) for _ in range(depth)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(channels, momentum=0.03, eps=1e-3) for _ in range(2 * depth)) for _ in STRIDES
        )
        self.box_tower = conv_unit(channels, channels)
        self.boxes = nn.Conv2d(channels, 4, 1)
        self.classes = nn.Conv2d(channels, classes, 1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))
        nn.init.normal_(self.boxes.weight, std=0.01)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.constant_(_bias(self.boxes), 0.7)  # about two strides to each side
        nn.init.constant_(_bias(self.classes), -4.6)  # every class starts at 1 %

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (N, C, H / s, W / s) of each level to (N, 4 + classes, H / s, W / s)."""
        raw = []
        for index, level in enumerate(levels):
            x, norms = level, cast("nn.ModuleList", self.norms[index])
            for step, (depthwise, pointwise) in enumerate(zip(self.depthwise, self.pointwise, strict=True)):
                x = nn.functional.relu6(norms[2 * step](depthwise(x)))
                x = nn.functional.relu6(norms[2 * step + 1](pointwise(x)))
            raw.append(torch.cat([self.boxes(self.box_tower(x)) * self.scales[index], self.classes(x)], dim=1))
        return tuple(raw)


def _bias(conv: nn.Conv2d) -> nn.Parameter:
    return cast("nn.Parameter", conv.bias)


class Detector(nn.Module):
    """Backbone, pyramid, predictor.

    Args:
        backbone: a pretrained one; a fresh one when None.
    """

    def __init__(self, backbone: Backbone | None = None) -> None:
        super().__init__()
        self.backbone = backbone or Backbone()
        self.neck = LightPan(TAP_CHANNELS, CHANNELS)
        self.predictor = Predictor(CHANNELS)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps normalised RGB (N, 3, H, W) to the raw outputs of the three levels, see the module."""
        return self.from_taps(self.backbone(x))

    def from_taps(self, taps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Raw outputs from the backbone's three taps."""
        levels: tuple[Tensor, ...] = self.predictor(self.neck(taps))
        return levels


def centres(raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Every position's centre (P, 2) in input pixels and its stride (P, 1), levels fine to coarse, row-major."""
    points, strides = [], []
    for stride, level in zip(STRIDES, raw, strict=True):
        height, width = level.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append((torch.stack([x, y], dim=-1).reshape(-1, 2).float() + 0.5) * stride)
        strides.append(torch.full((height * width, 1), float(stride)))
    return torch.cat(points), torch.cat(strides)


def dense(raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Corner boxes (N, P, 4) in input pixels and class logits (N, P, 80) of every position."""
    points, strides = centres(raw)
    flat = torch.cat([level.flatten(2) for level in raw], dim=2).transpose(1, 2).float()
    distances = flat[..., :4].clamp(-6, 4).exp() * strides
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1), flat[..., 4:]


@torch.no_grad()
def decode(raw: Sequence[Tensor], *, score_min: float = 0.05, iou: float = 0.6, keep: int = 100) -> list[Detections]:
    """Detections of each image: boxes in input pixels, scores in 0..1, COCO category ids.

    Args:
        raw: the network's outputs.
        score_min: detections below are not returned.
        iou: overlap above which the lesser box of a class is suppressed.
        keep: detections at most.
    """
    boxes, logits = dense(raw)
    height, width = (side * STRIDES[0] for side in raw[0].shape[-2:])
    limits = np.asarray([width, height, width, height], np.float32)
    found = []
    for image_boxes, image_scores in zip(boxes.cpu().numpy(), logits.sigmoid().cpu().numpy(), strict=True):
        clipped = np.clip(image_boxes, 0, limits).astype(np.float32)
        found.append(select(clipped, image_scores, CATEGORY_IDS, score_min=score_min, iou=iou, keep=keep))
    return found


def load_detector(weights: Path = WEIGHTS) -> Detector:
    """Our trained detector in eval mode, on the CPU, float32.

    Raises:
        ModelError: the weights are absent or of another network.
        MissingDependencyError: safetensors is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependencyError("safetensors is not installed; run: pip install 'headtail[server]'") from error
    if not weights.exists():
        raise ModelError(f"no detector weights at {weights}; train them with: python -m splitters.training.detector.loop --help")
    model = Detector()
    try:
        model.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
    except RuntimeError as error:
        raise ModelError(f"{weights} does not hold this detector's weights: {error}") from error
    return model.eval()


class PhotoDetector:
    """The detector on photos: preprocessing, network, decoding, boxes back in the photo's pixels.

    Args:
        model: in eval mode; ours as committed when None.
        spec: how a photo becomes the input.
        score_min: detections below are not returned.
    """

    def __init__(self, model: Detector | None = None, *, spec: Preprocess = PREPROCESS, score_min: float = 0.01) -> None:
        self._model = model or load_detector()
        self._spec, self._score_min = spec, score_min

    @torch.no_grad()
    def __call__(self, image: Pixels) -> Detections:
        """Detections of one (H, W, 3) uint8 RGB image, boxes in its own pixels."""
        x = torch.from_numpy(preprocess(np.ascontiguousarray(image[..., ::-1]), self._spec))
        found = decode(self._model(x), score_min=self._score_min)[0]
        height, width = image.shape[:2]
        return found._replace(boxes_px=geometry(self._spec, width, height).to_source(found.boxes_px, width, height))
