"""Augmentation, assignment and loss: what a training step is told."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from splitters.tasks.decoding.boxes import Detections, yolox_boxes
from splitters.training.detector.augment import Sampler, mosaic, paste, single
from splitters.training.detector.data import Example, held_out, teach
from splitters.training.detector.loss import Targets, add_teacher, assign, detection_loss, overlap, pad_boxes
from splitters.training.detector.teacher import Dense, DenseTeacher
from splitters.training.fast import speed_up
from splitters.zoo.detector.network import STRIDES, Detector, centres
from splitters.zoo.efficientnet_lite0.network import SamePadConv
from splitters.zoo.layers import conv_unit, separable_unit
from splitters.zoo.onnx_detectors import IMAGENET_MEAN, IMAGENET_STD


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


def test_fast_convolutions_have_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        separable_unit(6, 8), SamePadConv(8, 8, 5, 2, groups=8), conv_unit(8, 12), nn.Conv2d(12, 12, 3, 2, 1, groups=12),
        nn.Conv2d(12, 4, 1), nn.Conv2d(4, 4, 3, padding=1),
    )  # fmt: skip
    fast = copy.deepcopy(plain)
    speed_up(fast)
    x = torch.randn(2, 6, 32, 24).contiguous(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model(images) for model, images in zip((plain, fast), inputs, strict=True)]
    assert torch.allclose(*outputs, atol=1e-5)
    for y in outputs:
        y.square().sum().backward()
    pairs = [*zip(plain.parameters(), fast.parameters(), strict=True), tuple(inputs)]
    for a, b in pairs:
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    assert max(float(a.grad.abs().max()) for a, _ in pairs if a.grad is not None) > 1


def test_a_teacher_speaks_where_no_true_box_does() -> None:
    targets = Targets(
        torch.tensor([[[0.6, 0.0], [0.0, 0.0], [0.0, 0.0]]]), torch.zeros(1, 3, 4), torch.tensor([[0.6, 0.0, 0.0]])
    )  # fmt: skip
    teacher = Dense(torch.tensor([[[0.9, 0.3], [0.0, 0.5], [0.01, 0.02]]]), torch.ones(1, 3, 4))
    told = add_teacher(targets, teacher)
    assert told.scores[0].flatten().tolist() == pytest.approx([0.9, 0.3, 0.0, 0.5, 0.01, 0.02])
    assert told.weight[0].tolist() == pytest.approx([0.6, 0.5, 0.0])
    assert told.boxes[0, :, 0].tolist() == [0.0, 1.0, 0.0]  # the true box stays, the second is the teacher's


def test_held_out_pictures_are_every_nth_of_their_folder() -> None:
    pool = [example(source=s) for s in ["coco/train"] * 17 + ["video/vtest.avi"] * 5 + ["photos/voc5"] * 17]
    assert [i for i, out in enumerate(held_out(pool)) if out] == [0, 8, 16, 22, 38]


@pytest.mark.skipif("HEADTAIL_DATA" not in os.environ, reason="needs HEADTAIL_DATA")
def test_dense_teacher_is_the_published_network() -> None:
    path = Path(os.environ["HEADTAIL_DATA"]) / "weights" / "yolox_nano_416.onnx"
    picture = np.random.default_rng(0).integers(0, 255, (1, 416, 416, 3), dtype=np.uint8)
    said = DenseTeacher(path)(picture)
    x = ((picture.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2)
    raw = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"images": np.ascontiguousarray(x)})[0][0]
    boxes, scores = yolox_boxes(raw, (416, 416))
    assert np.abs(said.scores[0].numpy() - scores).max() < 1e-4
    assert np.abs(said.boxes[0].numpy() - boxes).max() < 0.5
    assert DenseTeacher(path)(picture[:, :256, :256]).boxes.shape == (1, 1344, 4)
