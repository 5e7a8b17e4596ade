"""torchvision beside a torch its operators were not built for: nms and roi_align against brute force."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from splitters.cutting import torchvision_compat as compat


def brute_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        for j in kept:
            width = min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0])
            height = min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1])
            both = max(width, 0.0) * max(height, 0.0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], boxes[j])]
            if both / (areas[0] + areas[1] - both) > threshold:
                break
        else:
            kept.append(int(i))
    return kept


def brute_sample(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    y0, x0 = math.floor(y), math.floor(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    top = plane[y0, x0] * (1 - fx) + plane[y0, x1] * fx
    bottom = plane[y1, x0] * (1 - fx) + plane[y1, x1] * fx
    return float(top * (1 - fy) + bottom * fy)


def brute_roi_align(
    features: np.ndarray, rois: np.ndarray, scale: float, ph: int, pw: int, ratio: int, aligned: bool
) -> np.ndarray:
    out = np.zeros((len(rois), features.shape[1], ph, pw))
    shift = 0.5 if aligned else 0.0
    for k, (n, x1, y1, x2, y2) in enumerate(rois):
        left, top, width, height = x1 * scale - shift, y1 * scale - shift, (x2 - x1) * scale, (y2 - y1) * scale
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        rows = ratio if ratio > 0 else math.ceil(height / ph)
        columns = ratio if ratio > 0 else math.ceil(width / pw)
        for c in range(features.shape[1]):
            for i in range(ph):
                for j in range(pw):
                    samples = [
                        brute_sample(
                            features[int(n), c],
                            top + (i + (a + 0.5) / rows) * height / ph,
                            left + (j + (b + 0.5) / columns) * width / pw,
                        )
                        for a in range(rows)
                        for b in range(columns)
                    ]
                    out[k, c, i, j] = sum(samples) / max(len(samples), 1)
    return out


def random_boxes(count: int, seed: int, extent: float = 60.0) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * extent
    size = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed + 1)) * 30 + 0.5
    return torch.cat([corner, corner + size], dim=1)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("block", [1024, 7])
def test_nms_is_the_greedy_one(threshold: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_NMS_BLOCK", block)
    boxes = random_boxes(150, 3)
    scores = (torch.rand(150, generator=torch.Generator().manual_seed(5)) * 20).round() / 20  # with ties
    assert compat.nms(boxes, scores, threshold).tolist() == brute_nms(boxes.numpy(), scores.numpy(), threshold)


def test_nms_follows_long_chains_of_suppression() -> None:
    # Each box covers the next by more than half, so every second one stays: the worst case for the fixed point.
    boxes = torch.tensor([[float(i), 0.0, float(i) + 4.0, 4.0] for i in range(40)])
    scores = torch.linspace(1, 0.1, 40)
    assert compat.nms(boxes, scores, 0.5).tolist() == brute_nms(boxes.numpy(), scores.numpy(), 0.5)
    assert compat.nms(boxes[:0], scores[:0], 0.5).shape == (0,)


def test_nms_refuses_boxes_of_another_shape() -> None:
    with pytest.raises(RuntimeError, match=r"boxes \(K, 4\)"):
        compat.nms(torch.zeros(3, 5), torch.zeros(3), 0.5)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 1, 2, 3])
def test_roi_align_is_the_mean_of_bilinear_samples(ratio: int, aligned: bool) -> None:
    features = torch.randn(2, 2, 9, 11, generator=torch.Generator().manual_seed(1))
    boxes = random_boxes(10, 8, 40.0) - 12.0  # some reach outside on every side
    boxes = torch.cat([boxes, torch.tensor([[5.0, 5.0, 5.0, 5.0], [-90.0, -90.0, -80.0, -80.0]])])
    rois = torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], dim=1)
    got = compat.roi_align(features, rois, 0.25, 3, 2, ratio, aligned)
    wanted = brute_roi_align(features.numpy(), rois.numpy(), 0.25, 3, 2, ratio, aligned)
    np.testing.assert_allclose(got.numpy(), wanted, atol=2e-6)


def test_roi_align_of_no_regions_keeps_its_shape() -> None:
    assert compat.roi_align(torch.zeros(1, 3, 4, 4), torch.zeros(0, 5), 1.0, 7, 7, 2, False).shape == (0, 3, 7, 7)


def test_roi_align_has_gradients() -> None:
    features = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.3, 0.2, 3.9, 4.1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: compat.roi_align(f, rois, 1.0, 2, 2, 2, True), (features,))


def test_torchvision_and_timm_import_and_detect_in_a_fresh_interpreter() -> None:
    program = """
from splitters.cutting.torchvision_compat import activate
activate(); activate()
import torch, torchvision, timm
ours = torchvision.ops.nms(torch.tensor([[0, 0, 2, 2.], [0, 0, 2, 2.1]]), torch.tensor([.1, .9]), 0.5)
assert ours.tolist() == [1], ours
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0, 0, 4, 4.]])], 2).mean() == 1
assert len(timm.list_models()) > 100
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
