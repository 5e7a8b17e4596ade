"""Tasks: raw outputs to answers, and all that depends on what an answer means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos.errors import BundleError, ModelError, ProtocolError
from protos.messages import Box, Classification, ClassScore, Detection, Tensors
from splitters.bundle.manifest import Head, LocalModel, Manifest, Preprocess
from splitters.tasks.base import open_task, task_of, tensors_of
from splitters.tasks.canvas import Canvas
from splitters.tasks.classification import ClassificationTask
from splitters.tasks.detection import DetectionTask, boxes_of
from splitters.tasks.tensors import TensorsTask

SPEC = Preprocess(resize="letterbox", size_px=(64, 64))
DENSE = {"kind": "dense_boxes", "class_ids": [1, 7], "score_min": 0.1, "iou": 0.5}


def test_softmax_gives_the_five_best() -> None:
    (answer,) = ClassificationTask({}, SPEC).decode([np.array([[0, 3, 1, 2, -9, 5, 4]], np.float32)], [(1, 1)])
    assert isinstance(answer, Classification)
    assert [s.class_id for s in answer.top] == [5, 6, 1, 3, 2]
    assert answer.top[0].score == pytest.approx(np.exp(5) / np.exp([0, 3, 1, 2, -9, 5, 4]).sum())


def test_dense_boxes_suppress_within_a_class_and_return_to_the_source() -> None:
    boxes = np.array([[[8, 8, 24, 24], [9, 8, 25, 24], [8, 8, 24, 24], [40, 40, 48, 48]]], np.float32)
    scores = np.array([[[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.05, 0.05]]], np.float32)
    (answer,) = DetectionTask(DENSE, SPEC).decode([boxes, scores], [(128, 96)])
    assert isinstance(answer, Detection)
    assert [(b.class_id, round(b.score, 2), b.box_px) for b in answer.boxes] == [
        (1, 0.9, (16, 16, 48, 48)),
        (7, 0.7, (16, 16, 48, 48)),
    ]


def test_nothing_found_is_an_empty_detection() -> None:
    empty = [np.zeros((1, 3, 4), np.float32), np.zeros((1, 3, 2), np.float32)]
    assert DetectionTask(DENSE, SPEC).decode(empty, [(64, 64)]) == [Detection(boxes=())]


def test_yolox_adds_the_grid() -> None:
    raw = np.zeros((1, 64 + 16 + 4, 7), np.float32)
    raw[0, 64 + 5] = [0.5, 0.25, np.log(2), np.log(1), 0.5, 0.9, 0.0]  # stride 16, cell (1, 1)
    (answer,) = DetectionTask(DENSE | {"kind": "yolox"}, SPEC).decode([raw], [(64, 64)])
    assert isinstance(answer, Detection)
    (box,) = answer.boxes
    assert box.score == pytest.approx(0.45)
    assert box.box_px == pytest.approx((24 - 16, 20 - 8, 24 + 16, 20 + 8))


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(BundleError, match="softmax"):
        ClassificationTask({"kind": "tarot"}, SPEC)
    with pytest.raises(BundleError, match="dense_boxes, yolox"):
        DetectionTask({"kind": "tarot"}, SPEC)


def manifest(task: str, postprocess: dict[str, Any], local: LocalModel | None = None) -> Manifest:
    return Manifest(
        name="m", task=task, preprocess=SPEC, parts=(), labels={}, latent_shape=((1,),), head=Head(stem="s"), codec="c",
        tail={"kind": "onnx"}, postprocess=postprocess, local=local, licence="none",
    )  # fmt: skip


def test_a_bundles_task_is_known_and_its_settings_fit_it() -> None:
    with pytest.raises(BundleError, match=r"task 'tarot' is unknown; there are classification, "):
        open_task(manifest("tarot", {}))
    with pytest.raises(BundleError, match="class_ids"):
        open_task(manifest("detection", {"kind": "yolox"}))
    with pytest.raises(BundleError, match="different names"):
        open_task(manifest("tensors", {"names": ["a", "a"]}))


def test_a_local_models_boxes_are_decoded_already() -> None:
    local = LocalModel(path="l", preprocess=SPEC)
    task = open_task(manifest("detection", DENSE | {"kind": "yolox"}, local), local=True)
    boxes, scores = np.array([[[8, 8, 24, 24]]], np.float32), np.array([[[0.9, 0.0]]], np.float32)
    (answer,) = task.decode([boxes, scores], [(64, 64)])
    assert [b.box_px for b in boxes_of(answer)] == [(8, 8, 24, 24)]


LABELS = {1: "person", 7: "car"}
BOXES = Detection(
    boxes=(Box(class_id=1, score=0.9, box_px=(10, 10, 30, 30)), Box(class_id=7, score=0.4, box_px=(50.126, 8, 60, 20)))
)
CLASSES = Classification(top=(ClassScore(class_id=7, score=0.75), ClassScore(class_id=1, score=0.25)))
TENSORS = Tensors(
    task="tensors",
    arrays={"mask": np.array([[True, False]]), "depth": np.array([1.5, np.inf], np.float32), "big": np.zeros(2000, np.uint8)},
)


def test_each_task_says_its_answer_in_json_and_in_words() -> None:
    assert task_of(CLASSES).to_json(CLASSES, LABELS) == {
        "predictions": [{"class_id": 7, "label": "car", "score": 0.75}, {"class_id": 1, "label": "person", "score": 0.25}]
    }
    assert task_of(BOXES).to_json(BOXES, LABELS)["detections"][1] == {
        "class_id": 7, "label": "car", "score": 0.4, "box_px": [50.13, 8, 60, 20]
    }  # fmt: skip
    assert task_of(TENSORS).to_json(TENSORS, LABELS) == {
        "tensors": {
            "mask": {"dtype": "bool", "shape": [1, 2], "values": [True, False]},
            "depth": {"dtype": "float32", "shape": [2], "values": [1.5, None]},
            "big": {"dtype": "uint8", "shape": [2000]},
        }
    }
    words = [task_of(a).in_words(a, LABELS) for a in (CLASSES, BOXES, TENSORS)]
    assert words == ["car 0.75", "person 1, car 1", "mask 1x2, depth 2, big 2000"]


def test_each_task_draws_its_answer() -> None:
    for answer in (CLASSES, BOXES, TENSORS):
        plain, drawn = (Canvas(np.full((240, 640, 3), 90, np.uint8)) for _ in range(2))
        task_of(answer).draw(drawn, answer, LABELS)
        assert (plain.finish() != drawn.finish()).any()


def test_agreement_is_one_with_itself_and_counts_what_differs() -> None:
    for answer in (CLASSES, BOXES, TENSORS):
        right, total = task_of(answer).agreement(answer, answer)
        assert right == pytest.approx(total)
    moved = Detection(boxes=(Box(class_id=1, score=0.9, box_px=(40, 40, 60, 60)), BOXES.boxes[1]))
    assert DetectionTask.agreement(moved, BOXES) == (2, 4)
    assert DetectionTask.agreement(Detection(boxes=()), BOXES) == (0, 2)
    other = Classification(top=(ClassScore(class_id=1, score=0.9),))
    assert ClassificationTask.agreement(other, CLASSES) == (0, 1)
    one, off = (Tensors(task="tensors", arrays={"v": np.array([3.0, v])}) for v in (4.0, 3.0))
    assert TensorsTask.agreement(off, one) == (pytest.approx(0.8), 1)


def test_a_stopped_frame_has_the_tasks_own_empty_answer() -> None:
    assert DetectionTask.empty() == Detection(boxes=())
    assert ClassificationTask.empty() is None
    assert TensorsTask.empty() is None


def test_a_server_that_answers_another_task_is_refused() -> None:
    task = DetectionTask(DENSE, SPEC)
    assert task.check(BOXES) is BOXES
    for answer in (CLASSES, TENSORS, None):
        with pytest.raises(ProtocolError, match="detection"):
            task.check(answer)
    with pytest.raises(ProtocolError, match="tensors"):
        TensorsTask({}, SPEC).check(Tensors(task="depth", arrays={}))


def test_raw_outputs_get_the_manifests_names() -> None:
    outputs = [np.arange(4, dtype=np.float32).reshape(2, 2), np.ones((2, 3, 1), np.float32)]
    first, second = TensorsTask({"names": ["a", "b"]}, SPEC).decode(outputs, [(1, 1), (1, 1)])
    assert first == Tensors(task="tensors", arrays={"a": outputs[0][0], "b": outputs[1][0]})
    assert second != first
    assert list(tensors_of(TensorsTask({}, SPEC).decode(outputs, [(1, 1)])[0])) == ["output_0", "output_1"]
    with pytest.raises(ModelError, match="2 outputs, the manifest names 1"):
        TensorsTask({"names": ["a"]}, SPEC).decode(outputs, [(1, 1)])


def test_answers_of_a_batch_become_arrays() -> None:
    found = DetectionTask.arrays([BOXES, Detection(boxes=())])
    assert {n: a.shape for n, a in found.items()} == {"class_ids": (2, 2), "scores": (2, 2), "boxes": (2, 2, 4)}
    assert found["class_ids"].tolist() == [[1, 7], [-1, -1]]
    assert {n: a.shape for n, a in TensorsTask.arrays([TENSORS, TENSORS]).items()} == {
        "mask": (2, 1, 2), "depth": (2, 2), "big": (2, 2000)
    }  # fmt: skip


def test_frames_whose_answers_differ_in_length_are_one_batch() -> None:
    """Class maps of two frames have as many runs as they need: for the Open Inference Protocol they are filled up."""
    from splitters.tasks.base import make_task
    from splitters.tasks.decoding import read_preset
    from splitters.tasks.dense import class_map

    spec = Preprocess(resize="stretch", size_px=(8, 8))
    task = make_task("segmentation", read_preset("segmentation").decoding.to_json(), spec)
    logits = np.zeros((2, 2, 8, 8), np.float32)
    logits[0, 1, 2:4] = 1  # three runs in the first frame, one in the second
    answers = task.decode([logits], [(8, 8), (8, 8)])
    arrays = task.arrays(answers)
    assert arrays["run_lengths"].shape == (2, 3)
    assert set(arrays) == set(task.signature())
    for row, answer in enumerate(answers):
        alone = Tensors(task="segmentation", arrays={name: array[row] for name, array in arrays.items()})
        assert np.array_equal(class_map(alone), class_map(answer))


def test_a_map_of_shares_has_its_own_threshold() -> None:
    from splitters.tasks.base import make_task
    from splitters.tasks.decoding import read_preset
    from splitters.tasks.decoding.guess import Outputs, guess
    from splitters.tasks.dense import class_map

    shares = np.full((1, 1, 8, 8), 0.1, np.float32)
    shares[0, 0, :2] = 0.9
    outputs = Outputs(names=("sigmoid_0.tmp_0",), values=(shares,), size_px=(8, 8), metadata={})
    assert guess(outputs).preset == "mask"
    task = make_task("segmentation", read_preset("mask").decoding.to_json(), Preprocess(resize="stretch", size_px=(8, 8)))
    assert class_map(task.decode([shares], [(8, 8)])[0]).sum() == 16
