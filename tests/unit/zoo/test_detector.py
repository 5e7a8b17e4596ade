"""The detector: boxes, network, decoding, cut, and the committed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from protos.errors import ModelError
from splitters.tasks.decoding.boxes import empty_detections, iou_matrix, letterbox, nms, select, to_source
from splitters.tasks.labels.coco_classes import CATEGORY_IDS, INDEX_OF, NAME_OF, NAMES
from splitters.zoo.detector.export_plain import CUT_BLOCK, DetectorBlocks, DetectorTail, WholeDetector
from splitters.zoo.detector.network import (
    PREPROCESS,
    STRIDES,
    TAPS,
    WEIGHTS,
    Backbone,
    Detector,
    PhotoDetector,
    decode,
    dense,
    load_detector,
)
from splitters.zoo.efficientnet_lite0.network import EfficientNetLite0


@pytest.fixture(scope="module")
def fresh() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


def test_classes_are_cocos() -> None:
    assert len(NAMES) == len(CATEGORY_IDS) == 80
    assert (NAME_OF[1], NAME_OF[18], NAME_OF[44], NAME_OF[62], NAME_OF[90]) == ("person", "dog", "bottle", "chair", "toothbrush")
    assert INDEX_OF[90] == 79


def test_iou_by_hand() -> None:
    a = np.asarray([[0, 0, 10, 10]], np.float32)
    b = np.asarray([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [10, 0, 20, 10]], np.float32)
    assert iou_matrix(a, b)[0] == pytest.approx([1, 1 / 3, 0, 0])


def test_suppression_is_per_class_and_keeps_the_best() -> None:
    boxes = np.asarray([[0, 0, 10, 10], [1, 0, 11, 10], [1, 0, 11, 10], [50, 50, 60, 60]], np.float32)
    scores = np.asarray([0.5, 0.9, 0.4, 0.1], np.float32)
    assert nms(boxes, scores, np.asarray([1, 1, 2, 1]), iou=0.5).tolist() == [1, 2, 3]
    assert nms(boxes, scores, np.asarray([1, 1, 2, 1]), iou=0.5, keep=2).tolist() == [1, 2]


def test_suppression_survives_boxes_left_of_the_image() -> None:
    # Negative corners must not make boxes of neighbouring classes overlap after they are moved apart.
    boxes = np.asarray([[-90, -90, 0, 0], [0, 0, 90, 90], [-90, -90, 0, 0]], np.float32)
    assert len(nms(boxes, np.ones(3, np.float32), np.asarray([1, 2, 3]), iou=0.1)) == 3


def test_select_limits_the_candidates_to_the_best() -> None:
    boxes = np.stack([np.arange(50) * 20, np.zeros(50), np.arange(50) * 20 + 10, np.ones(50)], axis=1).astype(np.float32)
    scores = np.linspace(0.1, 0.9, 50, dtype=np.float32)[:, None]
    found = select(boxes, scores, np.asarray([7]), score_min=0.2, iou=0.5, candidates=10)
    assert found.scores.tolist() == sorted(scores[-10:, 0].tolist(), reverse=True)
    assert set(found.class_ids.tolist()) == {7}
    assert select(boxes, scores, np.asarray([7]), score_min=0.95, iou=0.5).boxes_px.shape == empty_detections().boxes_px.shape


def test_letterbox_and_back() -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    square, scale = letterbox(image, 64)
    assert (square.shape, scale) == ((64, 64, 3), 0.32)
    assert square[31].max() == 0
    assert (square[32:] == 114).all()
    found = empty_detections()._replace(boxes_px=np.asarray([[0, 0, 32, 64]], np.float32))
    assert to_source(found, scale, 100, 200).boxes_px.tolist() == [[0, 0, 100, 100]]


def test_folding_changes_nothing() -> None:
    torch.manual_seed(1)
    network = EfficientNetLite0().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.blocks(network.stem(x))
        taps = Backbone(network)(x)
    assert torch.allclose(taps[-1], expected, atol=1e-4)
    assert [tuple(t.shape[1:]) for t in taps] == [(40, 8, 8), (112, 4, 4), (320, 2, 2)]


@pytest.mark.parametrize(("height", "width"), [(96, 64), (64, 160)])
def test_shapes_for_other_sizes(fresh: Detector, height: int, width: int) -> None:
    raw = fresh(torch.zeros(2, 3, height, width))
    assert [tuple(r.shape) for r in raw] == [(2, 84, height // s, width // s) for s in STRIDES]
    boxes, logits = dense(raw)
    positions = sum(height * width // s**2 for s in STRIDES)
    assert boxes.shape == (2, positions, 4)
    assert logits.shape == (2, positions, 80)
    assert (boxes[..., 2:] > boxes[..., :2]).all()


def test_decode_finds_what_was_put_in() -> None:
    raw = [torch.full((1, 84, 64 // s, 64 // s), -20.0) for s in STRIDES]
    raw[1][0, :4, 1, 2] = torch.log(torch.tensor([1.0, 0.5, 1.5, 1.0]))  # distances in strides of 16 px from (40, 24)
    raw[1][0, 4 + 16, 1, 2] = 3.0
    (found,) = decode(raw)
    assert found.boxes_px.tolist() == [pytest.approx([24, 16, 64, 40], abs=1e-3)]
    assert found.class_ids.tolist() == [18]
    assert found.scores[0] == pytest.approx(torch.sigmoid(torch.tensor(3.0)).item())


@pytest.mark.parametrize("at", [0, CUT_BLOCK])
def test_head_and_tail_are_the_whole(fresh: Detector, at: int) -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    tail = DetectorTail(fresh, at)
    with torch.no_grad():
        parts = tail(DetectorBlocks(fresh, at)(fresh.backbone.stem(x)))
        whole = WholeDetector(fresh)(x)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_no_cut_after_the_first_tap(fresh: Detector) -> None:
    with pytest.raises(ValueError, match=str(TAPS[0])):
        DetectorTail(fresh, TAPS[0] + 1)


def test_absent_or_foreign_weights_say_so(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match="train them with"):
        load_detector(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="does not hold"):
        load_detector(tmp_path / "other.safetensors")


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no detector weights in this tree")
def test_committed_weights_are_small_and_half() -> None:
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size < 8_000_000
    with safe_open(WEIGHTS, "pt") as opened:
        kinds = {opened.get_tensor(k).dtype for k in opened.keys()}  # noqa: SIM118 - not a dict
    assert kinds <= {torch.float16, torch.int64}


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no detector weights in this tree")
def test_a_frame_of_any_shape_gives_boxes_inside_it() -> None:
    detector = PhotoDetector(score_min=0.001)
    rng = np.random.default_rng(0)
    for shape in ((90, 300, 3), (300, 90, 3)):
        found = detector(rng.integers(0, 256, shape, dtype=np.uint8))
        assert len(found.scores)
        assert (found.boxes_px >= 0).all()
        assert (found.boxes_px <= [shape[1], shape[0]] * 2).all()
        assert (np.diff(found.scores) <= 0).all()
    assert PREPROCESS.size_px == (320, 320)


def test_staged_pieces_are_the_whole(fresh: Detector) -> None:
    from splitters.bottleneck.learned import run_stages
    from splitters.zoo.detector.staged import joined, staged_detector

    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    staged = staged_detector(fresh, 64)
    with torch.no_grad():
        outputs = run_stages(staged.stages, staged.body(staged.stem(x)))
        whole = fresh(x)
    assert len(outputs) == 12, "three taps, three levels, boxes and classes of each"
    assert all(torch.equal(a, b) for a, b in zip(joined(outputs[-6:]), whole, strict=True))
