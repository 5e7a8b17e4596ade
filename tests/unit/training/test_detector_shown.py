"""The score from which on a viewer is shown boxes."""

from __future__ import annotations

import numpy as np
import pytest

from protos.errors import ConfigError
from splitters.tasks.decoding.boxes import Detections
from splitters.training.detector.data import left_out
from splitters.training.detector.shown import best_threshold, matched
from splitters.zoo.detector.export_plain import shown_from
from splitters.zoo.detector.network import WEIGHTS


def test_a_wrong_box_weighs_more_than_a_missed_one() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    right = np.array([True, True, False, True, False, True])
    careful, balanced = best_threshold(scores, right, 4), best_threshold(scores, right, 4, beta=1.0)
    assert (careful.score, careful.precision, careful.recall, careful.boxes) == (0.8, 1.0, 0.5, 2)
    assert (balanced.score, balanced.f) == (0.4, pytest.approx(0.8))


def test_equal_scores_are_shown_together() -> None:
    found = best_threshold(np.array([0.5, 0.5, 0.5]), np.array([True, False, False]), 1)
    assert found.boxes == 3
    assert found.precision == pytest.approx(1 / 3)
    with pytest.raises(ConfigError):
        best_threshold(np.array([0.5]), np.array([True]), 0)


def test_an_object_is_found_once_and_unlabelled_classes_are_not_judged() -> None:
    truth = np.array([[0, 0, 10, 10, 0, 1.0]], np.float32)  # a person
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    found = Detections(boxes, np.array([0.6, 0.9, 0.8, 0.7], np.float32), np.array([1, 1, 18, 1]))
    rows = matched(found, truth, frozenset({1, 3}))
    assert [(round(score, 1), hit) for score, hit in rows] == [(0.9, True), (0.7, False), (0.6, False)]


def test_every_eighth_labelled_photo_is_left_out() -> None:
    blank = np.zeros((2, 2, 3), np.uint8)
    photos = [("coco/train", blank, np.full((1, 6), n, np.float32)) for n in range(17)]
    assert [int(truth[0, 0]) for _, _, truth in left_out(photos)] == [0, 8, 16]


def test_the_score_was_measured_for_the_committed_weights() -> None:
    assert shown_from(WEIGHTS) == 0.4748
    assert shown_from(WEIGHTS.parent / "prefilter.safetensors") is None, "other weights: measure again"
