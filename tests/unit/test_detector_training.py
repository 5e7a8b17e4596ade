"""Augmentation, assignment and loss: what a training step is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from splitters.models.boxes import Detections
from splitters.models.detector import STRIDES, Detector, centres
from splitters.train.detector_augment import Sampler, mosaic, paste, single
from splitters.train.detector_data import Example, teach
from splitters.train.detector_loss import assign, detection_loss, overlap, pad_boxes


def example(colour: int = 200, boxes: list[list[float]] | None = None, source: str = "a") -> Example:
    image = np.zeros((60, 100, 3), np.uint8)
    image[20:40, 50:90] = colour
    rows = boxes if boxes is not None else [[50, 20, 90, 40, 3, 1.0]]
    return Example(image=image, boxes=np.asarray(rows, np.float32).reshape(-1, 6), source=source)


@pytest.mark.parametrize("mirror", [False, True])
def test_boxes_stay_on_their_objects(mirror: bool) -> None:
    canvas = np.full((128, 128, 3), 114, np.uint8)
    boxes = paste(canvas, example(), 1.2, (4.0, 6.0), (0, 0, 128, 128), mirror=mirror)
    assert len(boxes) == 1
    bright = np.argwhere(canvas[..., 0] > 180)
    (top, left), (bottom, right) = bright.min(axis=0), bright.max(axis=0) + 1
    assert boxes[0, :4] == pytest.approx([left, top, right, bottom], abs=2)


def test_boxes_mostly_cut_away_are_left_out() -> None:
    canvas = np.full((64, 64, 3), 114, np.uint8)
    assert len(paste(canvas, example(), 1.0, (-80.0, 0.0), (0, 0, 64, 64), mirror=False)) == 0
    clipped = paste(canvas, example(), 1.0, (-65.0, 0.0), (0, 0, 64, 64), mirror=False)
    assert clipped[0, :4].tolist() == [0, 20, 25, 40]


def test_mosaic_keeps_every_picture_in_its_quarter() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        image, boxes = mosaic([example() for _ in range(4)], 128, rng)
        assert image.shape == (128, 128, 3)
        for x1, y1, x2, y2 in boxes[:, :4].astype(int):
            assert image[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1, 0].mean() > 150


def test_single_stays_on_the_canvas() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        _, boxes = single(example(), 96, rng)
        assert ((boxes[:, :4] >= 0) & (boxes[:, :4] <= 96)).all()


def test_sampler_follows_weights_and_seed() -> None:
    pool = [example(250, source="often"), example(10, source="never")]
    first, _ = Sampler(pool, {"never": 0.0}, np.random.default_rng(2)).batch(6, 64, 0.0)
    again, _ = Sampler(pool, {"never": 0.0}, np.random.default_rng(2)).batch(6, 64, 0.0)
    assert (first == again).all()
    assert all(picture.max() > 120 for picture in first)


def test_overlap_matches_hand_values() -> None:
    a, b = torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2])
    iou, giou = overlap(a, b)
    assert iou.item() == pytest.approx(1 / 3)
    assert giou.item() == pytest.approx(1 / 3)  # the enclosing box has no waste
    _, apart = overlap(a, torch.tensor([4.0, 0, 6, 2]))
    assert apart.item() == pytest.approx(-1 / 3)


def test_assignment_gives_boxes_to_the_level_that_fits() -> None:
    raw = [torch.zeros(1, 84, 64 // s, 64 // s) for s in STRIDES]
    points, strides = centres(raw)
    truth = pad_boxes([np.asarray([[8, 8, 24, 24, 2, 0.5], [0, 0, 64, 64, 5, 1.0]], np.float32)])
    size = strides * torch.tensor([1.0, 1.0, 1.0, 1.0])
    boxes = torch.cat([points - size[:, :2], points + size[:, :2]], dim=1)[None]  # every position predicts 2 x 2 strides
    targets = assign(boxes, torch.zeros(1, len(points), 80), truth, points, strides)
    small = targets.scores[0, :, 2].argmax()
    large = targets.scores[0, :, 5].argmax()
    assert strides[small].item() == 8
    assert strides[large].item() == 32
    # The best position is told the overlap times the teacher's confidence.
    iou, _ = overlap(boxes[0, small], truth[0, 0, :4])
    assert targets.scores[0, small, 2].item() == pytest.approx(0.5 * iou.item(), rel=1e-4)
    assert (targets.weight[0] > 0).sum() <= 20
    assert (targets.scores.sum(-1) == targets.weight).all()


def test_empty_pictures_train_the_background_only() -> None:
    raw = [torch.randn(2, 84, 64 // s, 64 // s, requires_grad=True) for s in STRIDES]
    losses = detection_loss(raw, pad_boxes([np.zeros((0, 6), np.float32)] * 2))
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert losses.boxes == 0
    assert torch.isfinite(losses.total)
    assert raw[0].grad is not None
    assert raw[0].grad[:, 4:].abs().sum() > 0
    assert raw[0].grad[:, :4].abs().sum() == 0


def test_a_few_steps_learn_one_picture() -> None:
    torch.manual_seed(0)
    model = Detector().train()
    optimiser = torch.optim.AdamW([*model.neck.parameters(), *model.predictor.parameters()], lr=5e-3)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(2, 3, 64, 64)).astype(np.float32))
    truth = pad_boxes([np.asarray([[8, 8, 40, 40, 7, 1.0]], np.float32), np.zeros((0, 6), np.float32)])
    with torch.no_grad():
        taps = model.backbone(x)
    history = []
    for _ in range(12):
        losses = detection_loss(model.from_taps(taps), truth)
        optimiser.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        history.append(float(losses.total.detach()))
    assert np.mean(history[-3:]) < 0.7 * np.mean(history[:3])


def test_teacher_sees_the_mirror_image_too() -> None:
    def one_sided(image: np.ndarray) -> Detections:  # finds the bright box only in the left half
        ys, xs = np.nonzero(image[..., 0] > 100)
        if xs.size == 0 or xs.mean() > image.shape[1] / 2:
            return Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
        box = np.asarray([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], np.float32)
        return Detections(box, np.asarray([0.9], np.float32), np.asarray([4]))

    found = teach(one_sided, example().image)
    assert found.boxes_px.tolist() == [[50, 20, 90, 40]]
