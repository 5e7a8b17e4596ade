"""Makes torchvision, and timm which imports it, usable beside a torch its compiled operators were not built for.

PyPI's torchvision carries operators compiled against one build of torch. Beside another, CPU-only torch among them, the
library does not load, and ``import torchvision`` ends in "operator torchvision::nms does not exist", though almost all
of torchvision is plain Python. :func:`activate` tries the compiled operators first. Only where they do not load does it
declare the schemas whose absence stops the import, with ``nms`` and ``roi_align`` (all that torchvision's detectors
need) written in plain torch. Any other compiled operator stays missing and says so when it is called.

Shape legend: N images, C channels, H × W feature map, K boxes or regions, PH × PW bins of a region.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

from protos.errors import MissingDependencyError

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    (
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    ),
)
_NMS_BLOCK = 1024
_libraries: list[torch.library.Library] = []  # a torch Library lives as long as it is referred to


@functools.cache
def activate() -> bool:
    """Imports torchvision, with stand-ins for its operators if the real ones are absent. Safe to call often.

    Returns:
        Whether the stand-ins of this module are in use; False means that the compiled operators work.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError("torchvision is not installed; install the extra: pip install 'headtail[server]'")
    if "torchvision" in sys.modules or _compiled_operators_load(Path(spec.submodule_search_locations[0])):
        importlib.import_module("torchvision")
        return False
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    library.impl("nms", nms, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    importlib.import_module("torchvision")
    # The two public functions ask whether the compiled operators are there; for these two, now something is.
    boxes = importlib.import_module("torchvision.ops.boxes")
    regions = importlib.import_module("torchvision.ops.roi_align")
    for module, name, value in ((boxes, "_assert_has_ops", None), (regions, "_assert_has_ops", None), (regions, "_has_ops", True)):
        setattr(module, name, functools.partial(_answer, value))
    return True


def _answer(value: bool | None) -> bool | None:
    return value


def _compiled_operators_load(package: Path) -> bool:
    for library in (*package.glob("_C*.so"), *package.glob("_C*.pyd"), *package.glob("_C*.dylib")):
        with contextlib.suppress(OSError, ImportError):
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            return True
    return False


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: a box goes if it overlaps a better box that stays by more than the threshold.

    Boxes are taken in blocks by falling score (equal scores in their given order). Within a block the greedy answer is
    the fixed point of "a box stays unless a better box that stays covers it"; it is reached in at most as many rounds
    as the longest chain of boxes suppressing one another.

    Args:
        dets: (K, 4) corners x1, y1, x2, y2.
        scores: (K,).
        iou_threshold: intersection over union above which the worse box goes.

    Returns:
        Indices (int64) of the boxes that stay, best score first.
    """
    if dets.ndim != 2 or dets.shape[1] != 4 or scores.shape != dets.shape[:1]:
        message = f"nms needs boxes (K, 4) and scores (K,), not {tuple(dets.shape)} and {tuple(scores.shape)}"
        raise RuntimeError(message)
    order = scores.sort(descending=True, stable=True).indices
    boxes = dets[order]
    stays = torch.ones(len(order), dtype=torch.bool, device=dets.device)
    for start in range(0, len(order), _NMS_BLOCK):
        block = slice(start, start + _NMS_BLOCK)
        earlier = boxes[:start][stays[:start]]
        alive = ~(_overlap(earlier, boxes[block]) > iou_threshold).any(dim=0)
        covers = (_overlap(boxes[block], boxes[block]) > iou_threshold).triu(diagonal=1)
        kept = alive
        while True:
            again = alive & ~(covers & kept[:, None]).any(dim=0)
            if torch.equal(again, kept):
                break
            kept = again
        stays[block] = kept
    return order[stays]


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of (K, 4) with (L, 4) boxes, as (K, L); not-a-number for two empty boxes."""
    corner = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    both = corner.clamp(min=0).prod(dim=2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(dim=1), (b[:, 2:] - b[:, :2]).prod(dim=1)
    return both / (area_a[:, None] + area_b[None, :] - both)


def roi_align(
    input: Tensor,  # noqa: A002  (the operator's own argument names)
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Region-of-interest align (Mask R-CNN, He et al. 2017): the mean of bilinear samples in each bin of each region.

    Args:
        input: (N, C, H, W) feature map.
        rois: (K, 5): image index, then x1, y1, x2, y2 in image pixels.
        spatial_scale: feature map pixels per image pixel.
        pooled_height: PH.
        pooled_width: PW.
        sampling_ratio: samples along each side of a bin; 0 or less: as many as the bin has feature map pixels.
        aligned: whether to shift by half a pixel, so that coordinates mean pixel centres.

    Returns:
        (K, C, PH, PW).
    """
    start = rois[:, 1:3].flip(1) * spatial_scale - (0.5 if aligned else 0.0)  # (K, 2) as y, x
    size = rois[:, 3:5].flip(1) * spatial_scale - (0.5 if aligned else 0.0) - start
    if not aligned:
        size = size.clamp(min=1.0)
    bins = size.new_tensor([pooled_height, pooled_width])
    result = input.new_zeros(len(rois), input.shape[1], pooled_height, pooled_width)
    if sampling_ratio > 0:
        grids = torch.full_like(size, sampling_ratio, dtype=torch.int64)
    else:
        grids = (size / bins).ceil().clamp(min=0).to(torch.int64)
    # Regions with equally many samples go together. An empty grid has no samples, so its bins stay zero.
    for rows, columns in torch.unique(grids, dim=0).tolist():
        if rows and columns:
            chosen = (grids == grids.new_tensor([rows, columns])).all(dim=1).nonzero()[:, 0]
            y = _samples(start[chosen, 0], size[chosen, 0], pooled_height, rows)
            x = _samples(start[chosen, 1], size[chosen, 1], pooled_width, columns)
            result = result.index_put((chosen,), _pool(input, rois[chosen, 0].long(), y, x))
    return result


def _samples(start: Tensor, size: Tensor, bins: int, per_bin: int) -> Tensor:
    """Sample positions (K, bins, per_bin) along one axis of K regions."""
    step = torch.arange(per_bin, dtype=start.dtype, device=start.device).add(0.5) / per_bin
    bin_index = torch.arange(bins, dtype=start.dtype, device=start.device)
    return start[:, None, None] + (bin_index[:, None] + step)[None] * (size / bins)[:, None, None]


def _corners(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The two pixels round each position and their weights, stacked last; more than a pixel outside weighs nothing."""
    outside = (position < -1.0) | (position > length)
    inside = position.clamp(0, length - 1)
    low = inside.detach().floor().long()
    fraction = inside - low
    weights = torch.stack([1 - fraction, fraction], dim=-1).masked_fill(outside[..., None], 0.0)
    return torch.stack([low, (low + 1).clamp(max=length - 1)], dim=-1), weights


def _pool(features: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Mean of the bilinear samples of each bin: ``y`` (K, PH, IY), ``x`` (K, PW, IX) → (K, C, PH, PW)."""
    batch, channels, height, width = features.shape
    (count, rows, per_row), (_, columns, per_column) = y.shape, x.shape
    y_at, y_weight = (part.reshape(count, rows, 1, 2 * per_row, 1) for part in _corners(y, height))
    x_at, x_weight = (part.reshape(count, 1, columns, 1, 2 * per_column) for part in _corners(x, width))
    at = ((image[:, None, None, None, None] * height + y_at) * width + x_at).flatten(0, 2).flatten(1)
    weight = (y_weight * x_weight / (per_row * per_column)).flatten(0, 2).flatten(1).to(features.dtype)
    table = features.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
    pooled = torch.nn.functional.embedding_bag(at, table, per_sample_weights=weight, mode="sum")
    return pooled.reshape(count, rows, columns, channels).permute(0, 3, 1, 2)
