"""Raw outputs to answers: softmax, dense boxes with suppression, YOLOX's grid."""

from __future__ import annotations

import numpy as np
import pytest

from protos.errors import BundleError
from protos.messages import Classification, Detection
from splitters.bundle.manifest import Preprocess
from splitters.tasks.postprocess import build_postprocess

SPEC = Preprocess(resize="letterbox", size_px=(64, 64))
DENSE = {"kind": "dense_boxes", "class_ids": [1, 7], "score_min": 0.1, "iou": 0.5}


def test_softmax_gives_the_five_best() -> None:
    (answer,) = build_postprocess({}, SPEC)([np.array([[0, 3, 1, 2, -9, 5, 4]], np.float32)], [(1, 1)])
    assert isinstance(answer, Classification)
    assert [s.class_id for s in answer.top] == [5, 6, 1, 3, 2]
    assert answer.top[0].score == pytest.approx(np.exp(5) / np.exp([0, 3, 1, 2, -9, 5, 4]).sum())


def test_dense_boxes_suppress_within_a_class_and_return_to_the_source() -> None:
    boxes = np.array([[[8, 8, 24, 24], [9, 8, 25, 24], [8, 8, 24, 24], [40, 40, 48, 48]]], np.float32)
    scores = np.array([[[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.05, 0.05]]], np.float32)
    (answer,) = build_postprocess(DENSE, SPEC)([boxes, scores], [(128, 96)])
    assert isinstance(answer, Detection)
    assert [(b.class_id, round(b.score, 2), b.box_px) for b in answer.boxes] == [
        (1, 0.9, (16, 16, 48, 48)),
        (7, 0.7, (16, 16, 48, 48)),
    ]


def test_nothing_found_is_an_empty_detection() -> None:
    empty = [np.zeros((1, 3, 4), np.float32), np.zeros((1, 3, 2), np.float32)]
    assert build_postprocess(DENSE, SPEC)(empty, [(64, 64)]) == [Detection(boxes=())]


def test_yolox_adds_the_grid() -> None:
    raw = np.zeros((1, 64 + 16 + 4, 7), np.float32)
    raw[0, 64 + 5] = [0.5, 0.25, np.log(2), np.log(1), 0.5, 0.9, 0.0]  # stride 16, cell (1, 1)
    (answer,) = build_postprocess(DENSE | {"kind": "yolox"}, SPEC)([raw], [(64, 64)])
    assert isinstance(answer, Detection)
    (box,) = answer.boxes
    assert box.score == pytest.approx(0.45)
    assert box.box_px == pytest.approx((24 - 16, 20 - 8, 24 + 16, 20 + 8))


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(BundleError, match="softmax"):
        build_postprocess({"kind": "tarot"}, SPEC)
    with pytest.raises(BundleError, match="incomplete"):
        build_postprocess({"kind": "yolox"}, SPEC)
