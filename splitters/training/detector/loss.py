"""Which position answers for which box, and what it is told (task-aligned learning, Feng et al. 2021, arXiv 2108.07755).

Shape legend: N batch, P positions of all levels, G boxes of the fullest picture (others are padded with confidence 0), C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from splitters.tasks.decoding.boxes import Floats
from splitters.training.detector.teacher import Dense
from splitters.zoo.detector.network import centres, dense

ALPHA, BETA, TOP = 0.5, 6.0, 10


class Targets(NamedTuple):
    """What every position is told: class scores (N, P, C), its box (N, P, 4), and its weight (N, P), 0 for background."""

    scores: Tensor
    boxes: Tensor
    weight: Tensor


class Losses(NamedTuple):
    """The weighted sum, and its two parts for the log."""

    total: Tensor
    classes: float
    boxes: float


def pad_boxes(boxes: Sequence[Floats]) -> Tensor:
    """Lists of (K, 6) boxes as one (N, G, 6) tensor, padded with zeros (G is at least 1)."""
    most = max(1, *(len(b) for b in boxes))
    padded = np.zeros((len(boxes), most, 6), np.float32)
    for row, found in zip(padded, boxes, strict=True):
        row[: len(found)] = found
    return torch.from_numpy(padded)


def overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU (Rezatofighi et al. 2019) of boxes (..., 4), broadcast against each other."""
    inside = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1).clamp(min=1e-6)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inside
    iou = inside / union.clamp(min=1e-6)
    return iou, iou - (around - union) / around


@torch.no_grad()
def assign(boxes: Tensor, logits: Tensor, truth: Tensor, points: Tensor, strides: Tensor) -> Targets:
    """Gives each true box its ``TOP`` best-aligned positions; a position wanted by several goes to the best overlap.

    Args:
        boxes: predicted corners (N, P, 4) in px.
        logits: (N, P, C).
        truth: (N, G, 6) true boxes with class index and confidence.
        points: (P, 2) centres in px.
        strides: (P, 1).
    """
    corners, label, confidence = truth[..., :4], truth[..., 4].long(), truth[..., 5]
    middle, half = (corners[..., :2] + corners[..., 2:]) / 2, (corners[..., 2:] - corners[..., :2]) / 2
    reach = torch.maximum(half[:, :, None], 0.75 * strides[None, None])  # (N, G, P, 2): a box between centres still gets one
    candidate = ((points[None, None] - middle[:, :, None]).abs() < reach).all(-1) & (confidence > 0)[..., None]
    iou, _ = overlap(corners[:, :, None], boxes[:, None])
    score = logits.sigmoid().transpose(1, 2).gather(1, label[..., None].expand(-1, -1, logits.shape[1]))  # (N, G, P)
    align = (score**ALPHA * iou**BETA + 1e-12) * candidate
    top = align.topk(TOP, dim=-1)
    chosen = torch.zeros_like(candidate).scatter_(-1, top.indices, top.values > 0)
    best = (iou * chosen + chosen * 1e-6).max(dim=1)
    owner = best.indices  # (N, P)
    chosen &= torch.zeros_like(chosen).scatter_(1, owner[:, None], value=True)
    align = align * chosen
    # The best-aligned position of a box is told the best overlap, the others less in proportion.
    scale = (iou * chosen).amax(-1, keepdim=True) / align.amax(-1, keepdim=True).clamp(min=1e-12)
    weight = (align * scale * confidence[..., None]).amax(1)  # (N, P)
    scores = torch.zeros_like(logits)
    scores.scatter_(2, label.gather(1, owner)[..., None], weight[..., None])
    return Targets(scores, corners.gather(1, owner[..., None].expand(-1, -1, 4)), weight)


def detection_loss(raw: Sequence[Tensor], truth: Tensor, teacher: Dense | None = None, *, box_gain: float = 2.5) -> Losses:
    """Quality focal loss (Li et al. 2020, arXiv 2006.04388) on classes plus GIoU on the boxes of answering positions.

    Args:
        raw: the network's outputs.
        truth: (N, G, 6) true boxes.
        teacher: what a teacher says at every position. A position is told the higher of the two scores of a class, so the truth
            holds where the teacher is blind; a position without a true box is told the teacher's.
        box_gain: weight of the boxes.
    """
    points, strides = centres(raw)
    boxes, logits = dense(raw)
    targets = assign(boxes.detach(), logits.detach(), truth, points, strides)
    if teacher is not None:
        targets = add_teacher(targets, teacher)
    total = targets.weight.sum().clamp(min=1.0)
    focus = (logits.detach().sigmoid() - targets.scores).square()
    classes = (F.binary_cross_entropy_with_logits(logits, targets.scores, reduction="none") * focus).sum() / total
    answering = targets.weight > 0
    _, giou = overlap(boxes[answering], targets.boxes[answering])
    distance = ((1 - giou) * targets.weight[answering]).sum() / total
    return Losses(classes * 2.0 + box_gain * distance, float(classes.detach()), float(distance.detach()))


def add_teacher(targets: Targets, teacher: Dense, *, least: float = 0.05) -> Targets:
    """Targets that also tell what a teacher says, see ``detection_loss``.

    Args:
        targets: from the true boxes.
        teacher: scores (N, P, C) and boxes (N, P, 4).
        least: teacher scores below teach no box.
    """
    confidence = teacher.scores.amax(-1)
    alone = (targets.weight == 0) & (confidence > least)
    return Targets(
        torch.maximum(targets.scores, teacher.scores),
        torch.where(alone[..., None], teacher.boxes, targets.boxes),
        torch.where(alone, confidence, targets.weight),
    )
