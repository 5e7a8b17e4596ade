"""One of torchvision's detectors cut in torch and compared with the uncut one, tensor by tensor and box by box."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protos.errors import CutError
from splitters.cutting.checks import inference
from splitters.cutting.graph.split import Cutter, Split
from splitters.cutting.rcnn.detectors import PREFIX, Found, RcnnTail, Size, shell

# Whose outputs are "all tensors before suppression": dense heads, proposals, and what is predicted from regions.
BEFORE_NMS = ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor", "roi_heads.keypoint_predictor")


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorVerification:
    """What was compared with the uncut detector on real photographs.

    Attributes:
        boxes: how many detections were compared.
        worst_before_nms: largest difference of a tensor before suppression, over its standard deviation.
        worst_iou: smallest overlap of a box with its match.
        worst_score: largest difference of a score to its match's.
        backbone: what :meth:`splitters.cutting.graph.split.Split.verify` found for the backbone.
    """

    boxes: int
    worst_before_nms: float
    worst_iou: float
    worst_score: float
    backbone: Any


class DetectorSplit:
    """A detector cut after a module of its backbone, for photographs of one size.

    Args:
        detector: left as it is.
        at: a module of the backbone, with or without ``backbone.``.
        photos: (3, H, W) each, 0..1; their common padded size is what the halves are made for.

    Raises:
        CutError: the backbone has no such cut.
    """

    def __init__(self, detector: Any, at: str, photos: Sequence[Tensor]) -> None:
        self.detector = detector
        with inference(detector):
            images, _ = detector.transform(list(photos))
        self.input_size: Size = tuple(images.tensors.shape[-2:])
        self.cutter = Cutter(detector.backbone, images.tensors)
        self.backbone: Split = self.cutter.split(at.removeprefix(PREFIX))
        self.tail = RcnnTail(shell(detector), self.backbone.tail, self.input_size).eval()

    def head(self, photos: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Size]]:
        """The device's side in torch: latents, and the sizes that travel with them."""
        with inference(self.detector):
            images, _ = self.detector.transform(list(photos))
            return self.backbone.head(images.tensors), list(images.image_sizes)

    def __call__(self, photos: Sequence[Tensor]) -> Found:
        """Head, then tail."""
        latents, sizes = self.head(photos)
        with torch.no_grad():
            found: Found = self.tail(latents, sizes, [(p.shape[1], p.shape[2]) for p in photos])
        return found

    def verify(self, photos: Sequence[Tensor], *, tolerance: float = 1e-4) -> DetectorVerification:
        """Compares with the uncut detector: tensors before suppression, then boxes, labels and scores, matched by box.

        Raises:
            CutError: something differs: a tensor by more than ``tolerance``, a box (IoU below .999), label or score (1e-3).
        """
        with inference(self.detector):
            images, _ = self.detector.transform(list(photos))
            with _watch(self.detector) as wanted_before:
                wanted: Found = self.detector(list(photos))
        backbone = self.backbone.verify(images.tensors, tolerance=tolerance)
        with _watch(self.tail.detector) as got_before:
            got = self(photos)
        before = _compare(wanted_before, got_before)
        if not before <= tolerance:
            raise CutError(
                f"the detector cut at {self.backbone.at!r} is wrong: before suppression a tensor differs by {before:.3g}"
            )
        count, iou, score = 0, 1.0, 0.0
        for w, g in zip(wanted, got, strict=True):
            if len(w["boxes"]) != len(g["boxes"]):
                raise CutError(f"the cut detector finds {len(g['boxes'])} objects, the uncut one {len(w['boxes'])}")
            closest, distance = match(w, g)
            count, iou, score = count + len(w["boxes"]), min(iou, closest), max(score, distance)
        if iou < 0.999 or score > 1e-3:
            raise CutError(f"the cut detector's objects differ: overlap {iou:.4f}, scores {score:.2g}")
        return DetectorVerification(boxes=count, worst_before_nms=before, worst_iou=iou, worst_score=score, backbone=backbone)


def match(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> tuple[float, float]:
    """Pairs every wanted object with the best unpaired one of its label; the smallest overlap, the largest score difference."""
    from torchvision.ops import box_iou

    if not len(wanted["boxes"]):
        return 1.0, 0.0
    overlap = box_iou(wanted["boxes"].double(), got["boxes"].double()).nan_to_num(0.0)
    same = (wanted["boxes"][:, None] == got["boxes"][None]).all(dim=2)  # empty boxes have no overlap with themselves
    overlap[same] = 1.0
    overlap[wanted["labels"][:, None] != got["labels"][None]] = -1.0
    gap = (wanted["scores"][:, None] - got["scores"][None]).abs()
    worst_iou, worst_score = 1.0, 0.0
    for i in range(len(overlap)):
        j = int((overlap[i] - gap[i]).argmax())
        worst_iou, worst_score = min(worst_iou, float(overlap[i, j])), max(worst_score, float(gap[i, j]))
        overlap[:, j] = -2.0
    return worst_iou, worst_score


@contextmanager
def _watch(detector: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collects what the modules before suppression return, in the order of :data:`BEFORE_NMS`."""
    modules = dict(detector.named_modules())
    seen: list[list[Tensor]] = [[] for _ in BEFORE_NMS]
    handles = []
    for number, name in enumerate(BEFORE_NMS):
        if name in modules:
            handles.append(modules[name].register_forward_hook(_collector(seen[number])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _collector(into: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def collect(_module: nn.Module, _arguments: Any, output: Any) -> None:
        into.extend(leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor))

    return collect


def _compare(wanted: Sequence[Sequence[Tensor]], got: Sequence[Sequence[Tensor]]) -> float:
    worst = 0.0
    for w_all, g_all in zip(wanted, got, strict=True):
        if [w.shape for w in w_all] != [g.shape for g in g_all]:
            raise CutError("the cut detector's tensors before suppression have other shapes than the uncut one's")
        for w, g in zip(w_all, g_all, strict=True):
            if w.numel():
                scale = float(w.double().std(correction=0)) or 1.0
                worst = max(worst, float((w.double() - g.double()).abs().amax()) / scale)
    return worst
