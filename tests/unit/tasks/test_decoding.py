"""Declared decoding: presets against formulas written out, guesses from shapes, and tasks that carry more than a box."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.errors import BundleError, ConfigError, ProtocolError
from protos.messages import Answer, Classification, Detection, Tensors
from splitters.bundle.manifest import Preprocess
from splitters.cli import main
from splitters.tasks import runs
from splitters.tasks.base import make_task, task_of
from splitters.tasks.canvas import Canvas
from splitters.tasks.decoding import preset_names, read_preset
from splitters.tasks.decoding.guess import Outputs, fitted, guess
from splitters.tasks.dense import class_map
from splitters.tasks.objects import mask_of
from tests.fakes.onnx_models import NAMES, detector
from tests.unit.cutting.test_cut_onnx import cut, photos, read_photos, served  # noqa: F401  (a fixture)

SPEC = Preprocess(resize="letterbox", size_px=(64, 64), anchor="centre")
RNG = np.random.default_rng(5)


def outputs(*values: np.ndarray[Any, Any], names: tuple[str, ...] = (), metadata: Mapping[str, str] | None = None) -> Outputs:
    return Outputs(
        names=names or tuple(f"out{i}" for i in range(len(values))), values=values, size_px=(64, 64), metadata=metadata or {}
    )


def decoded(
    preset: str, *values: np.ndarray[Any, Any], spec: Preprocess = SPEC, size: tuple[int, int] = (64, 64), **more: Any
) -> Answer:
    how = fitted(preset, outputs(*values, **more)).decoding
    return make_task(how.task, how.to_json(), spec).decode(list(values), [size])[0]


def test_every_preset_is_a_declaration_with_a_preprocessing_that_can_be() -> None:
    for name in preset_names():
        preset = read_preset(name)
        assert preset.about
        fields = {"resize": "stretch", **preset.preprocess, "size_px": (64, 64)}
        if fields["resize"] == "shortest":
            fields["resize_px"] = 64
        Preprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        again = make_task(preset.decoding.task, preset.decoding.to_json(), SPEC)
        assert again.name == preset.decoding.task


def test_yolov8_columns_are_boxes_in_pixels_and_the_best_class() -> None:
    raw = np.zeros((1, 7, 84), np.float32)
    raw[0, :, 3] = [20, 30, 8, 12, 0.1, 0.9, 0.3]
    raw[0, :, 4] = [21, 30, 8, 12, 0.1, 0.8, 0.3]  # the same object
    raw[0, :, 5] = [20, 30, 8, 12, 0.7, 0.1, 0.3]  # another class
    answer = decoded("yolov8", raw, size=(128, 128))
    assert isinstance(answer, Detection)
    assert [(b.class_id, round(b.score, 2), b.box_px) for b in answer.boxes] == [
        (1, 0.9, (32, 48, 48, 72)), (0, 0.7, (32, 48, 48, 72)),
    ]  # fmt: skip


def test_yolox_and_nanodet_lie_on_their_grids() -> None:
    raw = np.zeros((1, 84, 7), np.float32)
    raw[0, 64 + 5] = [0.5, 0.25, np.log(2), 0, 0.5, 0.9, 0.0]  # stride 16, cell (1, 1)
    answer = decoded("yolox", raw)
    assert isinstance(answer, Detection)
    assert answer.boxes[0].score == pytest.approx(0.45)
    assert answer.boxes[0].box_px == pytest.approx((24 - 16, 20 - 8, 24 + 16, 20 + 8))

    def levels(counts: list[int]) -> list[np.ndarray[Any, Any]]:
        return [np.zeros((1, n, c), np.float32) for c in (3, 32) for n in counts]

    for preset, counts, shift in (("nanodet", [64, 16, 4], -0.5), ("picodet", [64, 16, 4, 1], 0.0)):
        parts = levels(counts)
        parts[1][0, 5] = [0, 0.8, 0]  # stride 16, cell (1, 1)
        far = parts[len(counts) + 1]
        far[...] = -20
        for side, distance in enumerate([0, 1, 2, 1]):
            far[0, 5, 8 * side + distance] = 20
        answer = decoded(preset, *parts)
        assert isinstance(answer, Detection)
        x = y = 1.5 * 16 + shift
        assert answer.boxes[0].box_px == pytest.approx((x, y - 16, x + 32, y + 16), abs=0.01)
        assert answer.boxes[0].class_id == 1


def test_detr_leaves_out_nothing_and_queries_are_not_suppressed() -> None:
    logits, boxes = np.full((1, 5, 4), -9, np.float32), np.zeros((1, 5, 4), np.float32)
    boxes[0, :, :] = [0.5, 0.5, 0.25, 0.5]
    logits[0, 0, 2] = logits[0, 1, 2] = 3
    logits[0, 2:, 3] = 9  # nothing
    answer = decoded("detr", boxes, logits, names=("pred_boxes", "logits"))
    assert isinstance(answer, Detection)
    assert [(b.class_id, b.box_px) for b in answer.boxes] == [(2, (24, 16, 40, 48))] * 2


def test_a_wrong_preset_says_what_it_saw() -> None:
    with pytest.raises(BundleError, match="strides"):
        decoded("yolox", np.zeros((1, 80, 7), np.float32))
    with pytest.raises(BundleError, match="axes"):
        decoded("yolov8", np.zeros((1, 7), np.float32))
    with pytest.raises(ConfigError, match="output 1"):
        decoded("boxes-scores", np.zeros((1, 7, 4), np.float32))


def _shares() -> np.ndarray[Any, Any]:
    return np.asarray([[0.2, 0.3, 0.5]], np.float32)


GUESSES: list[tuple[str, Outputs]] = [
    ("softmax", outputs(RNG.standard_normal((1, 5)).astype(np.float32) * 4)),
    ("probabilities", outputs(_shares())),
    ("embedding", outputs(np.asarray([[0.6, -0.8]], np.float32))),
    ("yolov8", outputs(RNG.random((1, 9, 84), dtype=np.float32))),
    ("yolov5", outputs(np.concatenate([RNG.random((1, 252, 4)) * 64, RNG.random((1, 252, 4))], 2).astype(np.float32))),
    ("end-to-end", outputs(np.asarray([[[1, 2, 9, 9, 0.5, 3]] * 9], np.float32))),
    ("yolov7-end-to-end", outputs(np.asarray([[[0, 1, 2, 9, 9, 3, 0.5]] * 9], np.float32))),
    ("fastestdet", outputs(RNG.random((1, 8, 4, 4), dtype=np.float32))),
    ("segmentation", outputs(RNG.random((1, 8, 16, 16), dtype=np.float32))),
    ("segmentation", outputs(RNG.integers(0, 9, (1, 64, 64)))),
    ("nanodet", outputs(*(np.zeros((1, n, c), np.float32) for n in (64, 16, 4) for c in (3, 32)))),
    ("picodet", outputs(*(np.zeros((1, n, c), np.float32) for c in (3, 32) for n in (64, 16, 4, 1)))),
    ("labels-boxes-scores", outputs(*[np.zeros((1, 3))] * 3, names=("labels", "boxes", "scores"))),
    ("detr", outputs(np.zeros((1, 9, 92)), np.full((1, 9, 4), 0.5), names=("logits", "pred_boxes"))),
    ("rtdetr", outputs(np.zeros((1, 9, 80)), np.full((1, 9, 4), 0.5), names=("logits", "pred_boxes"))),
    ("rfdetr", outputs(np.full((1, 9, 4), 0.5), np.zeros((1, 9, 91)), names=("dets", "labels"))),
]


@pytest.mark.parametrize(("preset", "seen"), GUESSES, ids=[f"{i} {p}" for i, (p, _) in enumerate(GUESSES)])
def test_a_form_is_known_by_its_shapes(preset: str, seen: Outputs) -> None:
    assert guess(seen).preset == preset
    fitted(preset, seen)


@pytest.mark.parametrize(
    "seen",
    [
        outputs(RNG.random((1, 84, 9), dtype=np.float32)),  # YOLOX: with which preprocessing?
        outputs(np.zeros((1, 9, 7)), np.full((1, 9, 4), 0.5), names=("logits", "pred_boxes")),  # softmax or sigmoid?
        outputs(RNG.random((1, 3, 128, 128), dtype=np.float32)),  # a larger picture?
        outputs(RNG.random((1, 1, 64, 64), dtype=np.float32)),  # depth, or a mask?
        outputs(RNG.random((4, 4), dtype=np.float32), RNG.random((7,), dtype=np.float32)),
    ],
)
def test_what_is_ambiguous_or_unknown_is_not_guessed(seen: Outputs) -> None:
    with pytest.raises(ConfigError, match="--output"):
        guess(seen)


def test_a_declaration_of_ones_own_is_checked_by_name(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"task": "detection", "boxes": {"outputs": ["b"]}, "scores": {"outputs": ["s"]}}))
    how = fitted(str(own), outputs(np.zeros((1, 2, 4)), np.zeros((1, 2, 3)), names=("b", "s"))).decoding
    assert (how.boxes and how.boxes.outputs, how.scores.outputs) == ((0,), (1,))
    for text, said in (("[]", "own.json"), ('{"task": "detection"}', "boxes are"), ('{"task": "detektion"}', "detektion")):
        own.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_preset(str(own))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_preset(str(tmp_path / "absent.json"))


def test_keypoints_angles_and_masks_come_back_in_the_frames_pixels() -> None:
    """A frame of 128 x 64 in a letterbox of 64: half size, 16 px of border above."""
    row = [20, 32, 8, 8, 0.9]
    pose = np.zeros((1, 11, 84), np.float32)
    pose[0, :, 7] = [*row, 18, 30, 0.8, 22, 34, 0.1]
    answer = decoded("yolo-pose", pose, size=(128, 64), metadata={"kpt_shape": "[2, 3]"})
    assert isinstance(answer, Tensors)
    assert answer.arrays["boxes"].tolist() == [[32, 24, 48, 40]]
    assert answer.arrays["keypoints"][0].tolist() == pytest.approx(np.asarray([[36, 28, 0.8], [44, 36, 0.1]]))

    turned = np.zeros((1, 6, 84), np.float32)
    turned[0, :, 7] = [20, 32, 12, 4, 0.9, np.pi / 2]
    answer = decoded("yolo-obb", turned, size=(128, 64))
    assert isinstance(answer, Tensors)
    assert answer.arrays["boxes"][0].tolist() == pytest.approx([36, 20, 44, 44], abs=1e-3)  # it stands upright
    assert sorted(map(tuple, np.round(answer.arrays["corners"][0]).tolist())) == [(36, 20), (36, 44), (44, 20), (44, 44)]

    instance = np.zeros((1, 6, 84), np.float32)
    instance[0, :, 7] = [20, 32, 16, 16, 0.9, 1.0]
    prototypes = np.where(np.arange(16) < 5, 4.0, -4.0) * np.ones((1, 1, 16, 1))  # left of x = 20 in the input, 40 in the frame
    answer = decoded("yolo-segment", instance, prototypes.astype(np.float32), size=(128, 64))
    assert isinstance(answer, Tensors)
    rows, columns = np.nonzero(mask_of(answer.arrays, 0))
    assert (rows.min(), rows.max(), columns.min()) == (16, 47, 24)
    assert abs(columns.max() - 39) <= 1


@pytest.mark.parametrize("preset", ["yolov8", "yolo-pose", "yolo-obb", "yolo-segment"])
def test_a_frame_without_an_object_is_an_empty_answer(preset: str) -> None:
    raw = np.zeros((1, {"yolo-pose": 11}.get(preset, 6), 84), np.float32)
    answer = decoded(preset, raw, np.zeros((1, 1, 16, 16), np.float32), metadata={"kpt_shape": "[2, 3]"})
    kind = task_of(answer)
    assert kind.to_json(answer, {}) == {"detections": []}
    assert kind.agreement(answer, answer)[1] == 0
    canvas = Canvas(np.zeros((64, 64, 3), np.uint8))
    kind.draw(canvas, answer, {})
    nothing = kind.empty()
    assert nothing is not None
    assert kind.to_json(nothing, {}) == {"detections": []}


def test_a_class_map_and_a_vector() -> None:
    logits = np.zeros((1, 3, 16, 16), np.float32)
    logits[0, 2, :, :4] = logits[0, 0, :, 4:] = 5
    answer = decoded("segmentation", logits, spec=Preprocess(resize="stretch", size_px=(64, 64)), size=(128, 64))
    found = class_map(answer)
    assert found.shape == (64, 128)
    assert float((found == 2).mean()) == pytest.approx(0.25, abs=0.02)
    told = task_of(answer).to_json(answer, {2: "road"})["segmentation"]
    assert {c["label"] for c in told["classes"]} == {"", "road"}
    assert sum(told["lengths"]) == found.size
    vector = decoded("embedding", np.asarray([[3, -4]], np.float32))
    assert task_of(vector).to_json(vector, {}) == {"embedding": [3.0, -4.0]}
    assert task_of(vector).agreement(vector, vector) == pytest.approx((1.0, 1.0))


def test_runs_hold_any_map_and_hostile_ones_are_refused() -> None:
    grid = RNG.integers(0, 3, (7, 9))
    assert np.array_equal(runs.decode(*runs.encode(grid), (7, 9)), grid)
    assert runs.mask_size(8000, 4000) == (1334, 2667) or np.prod(runs.mask_size(8000, 4000)) <= runs.MAX_PIXELS
    for lengths, size in (([5], (2, 2)), ([-1, 5], (2, 2)), ([1 << 40], (1 << 20, 1 << 20)), ([4], (-2, -2))):
        with pytest.raises(ProtocolError):
            runs.decode(np.asarray(lengths), np.zeros(len(lengths)), size)


@pytest.mark.parametrize(("task", "name"), [("pose", "keypoints"), ("obb", "oriented"), ("segment", "instances")])
def test_models_of_more_than_boxes_are_cut_and_served_without_a_flag(task: str, name: str, tmp_path: Path, photos: Path) -> None:  # noqa: F811
    from splitters.bundle import open_bundle

    assert cut(detector(tmp_path / "model.onnx", task=task), tmp_path / "bundle", photos) == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.task == name
    frames = read_photos(photos, 3)
    answers = served(bundle, frames, together=True)
    found = 0
    kind = make_task(name, bundle.manifest.postprocess, bundle.manifest.preprocess)
    for frame, answer in zip(frames, answers, strict=True):
        kind.check(answer)
        rows = kind.to_json(answer, NAMES)["detections"]
        assert all({"keypoints": "keypoints", "oriented": "corners_px", "instances": "mask"}[name] in row for row in rows)
        found += len(rows)
        canvas = Canvas(frame)
        kind.draw(canvas, answer, NAMES)
        assert not rows or not np.array_equal(canvas.finish(), Canvas(frame).finish())
    assert found
    arrays = kind.arrays(answers)
    assert all(len(a) == len(frames) for a in arrays.values())


def test_tensors_rescue_whatever_cuts(tmp_path: Path, photos: Path) -> None:  # noqa: F811
    import onnxruntime as ort

    from splitters.bundle import open_bundle
    from splitters.tasks.preprocess import preprocess

    path = detector(tmp_path / "model.onnx", task="segment")
    assert main(["cut", f"onnx:{path}", "--out", str(tmp_path / "b"), "--photos", str(photos), "--output", "tensors"]) == 0
    bundle = open_bundle(tmp_path / "b")
    frames = read_photos(photos, 2)
    session = ort.InferenceSession(str(path))
    names = [o.name for o in session.get_outputs()]
    for frame, answer in zip(frames, served(bundle, frames, together=True), strict=True):
        wanted = session.run(None, {"images": preprocess(frame, bundle.manifest.preprocess)})
        assert isinstance(answer, Tensors)
        assert list(answer.arrays) == names
        for name, array in zip(names, wanted, strict=True):
            assert np.abs(answer.arrays[name] - array[0]).max() <= 2e-3 * np.abs(array).max()
    assert not isinstance(answer, Classification)
