"""Fitting a prefilter to a scene: passages, promise, what is written into the bundle, and how the rest of the video does."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from edge_client.gates.interest import InterestGate, read_promise
from protos.errors import ConfigError
from protos.messages import Box, Detection
from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.evaluation.gating.prefilter import present
from splitters.evaluation.gating.scene import Scene, examine, fit, interesting
from splitters.zoo.prefilter.promise import clopper_pearson_lower, score_at_precision
from tests.fakes.detector_bundle import write_cell_detector

pytest.importorskip("torch")


def scene(passages: int = 8, seed: int = 0) -> Scene:
    """Passages of 20 frames, 20 empty ones between; the teacher flickers, the filter scores .5 and more where something is."""
    rng = np.random.default_rng(seed)
    there = np.tile(np.repeat([False, True], 20), passages)
    confidence = np.where(there, rng.choice([0.2, 0.45, 0.9], there.size), 0.0)
    confidence[30::40] = 0.9
    scores = np.where(there, rng.uniform(0.5, 0.9, there.size), rng.uniform(0.0, 0.45, there.size))
    own = (np.linspace(0.1, 0.9, 81), np.linspace(0.1, 0.9, 81) >= 0.4, np.zeros(81, np.int64))
    return Scene(
        category_ids=(1,), scores=scores[:, None], confidence=confidence[:, None], own=own, answered=confidence[:, None], fps=12.0
    )


def test_what_is_there_in_one_frame_is_there_in_the_next() -> None:
    confidence = np.zeros(60)
    confidence[[10, 12, 20]] = 0.3, 0.8, 0.2  # seen, sure, seen again
    confidence[50] = 0.3  # never sure
    found = present(confidence, 0.5, gap=12)
    assert np.flatnonzero(found).tolist() == list(range(10, 21))
    assert not present(confidence, 0.9).any()


def test_passages_are_the_units_and_few_promise_little() -> None:
    watched = scene()
    assert interesting(watched, [0], 0.5)[1].sum() >= 8 * 17
    fitted = fit(watched, [0], 0.98, sure=0.5, until=160)
    assert fitted.asked.units == 4
    assert fitted.asked.recall_promised == pytest.approx(clopper_pearson_lower(4, 4))
    assert not fitted.asked.kept
    assert 0.5 <= fitted.asked.threshold < 0.55
    test = examine(watched, [0], fitted, sure=0.5)
    assert test["frames"] == 160
    assert test["passages_seen"] == test["passages"] == 4
    assert test["recall"] >= fitted.asked.recall_promised
    assert test["roc_auc"] > test["roc_auc_against_single_frames"], "a flickering teacher hides what the filter can do"
    assert test["roc_auc_a_perfect_filter_would_have_there"] < 0.95
    assert test["stopped"] > 0.4


def test_the_detectors_own_scores_are_believed_from_a_precision_on() -> None:
    scores = np.linspace(0.01, 1, 100)
    right = scores >= 0.5
    believed = score_at_precision(scores, right, 0.7)
    assert right[scores >= believed].mean() >= 0.7
    assert right[scores >= believed - 0.011].mean() < 0.7
    assert score_at_precision(scores[:10], right[:10]) is None, "too few boxes to tell"
    assert score_at_precision(scores[:0], right[:0]) is None
    assert score_at_precision(scores, np.zeros(100, bool)) is None
    fitted = fit(scene(), [0], 0.98, sure=0.5, until=160)
    assert fitted.sure is not None
    assert fitted.sure == pytest.approx(0.19), "51 of 72 are right from there on"


def test_a_scene_where_nothing_passes_cannot_calibrate() -> None:
    with pytest.raises(ConfigError, match="longer video"):
        fit(scene(), [0], 0.98, sure=0.5, until=10)


def test_the_command_writes_the_promise_that_the_client_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", prefilter=True)
    video = tmp_path / "yard.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 64))
    for index in range(160):
        frame = np.full((64, 64, 3), 20, np.uint8)
        if index % 40 >= 28:  # four passages, two in each half
            frame[24:32, 8 * (index % 8) : 8 * (index % 8) + 8] = 170
        writer.write(frame)
    writer.release()
    out = tmp_path / "yard"
    arguments = ["calibrate", str(bundle.path), "--video", str(video), "--until", "0.5", "--recall", "0.9", "--out", str(out)]
    assert main([*arguments, "--sure", "0.4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["calibration"]["units"] == 2
    assert told["test"]["recall"] == 1.0
    assert told["test"]["stopped"] == pytest.approx(0.7, abs=0.02)
    assert open_bundle(bundle.path).sha256 == bundle.sha256, "--out leaves the original alone"
    promise = read_promise(open_bundle(out))
    assert promise is not None
    assert promise.threshold == pytest.approx(told["calibration"]["threshold"])
    assert promise.recall == pytest.approx(told["calibration"]["recall_promised"])
    assert promise.sure >= 0.25, "the server reports nothing below the bundle's own threshold"
    assert main([*arguments]) == ConfigError("x").exit_code, "an --out that exists is refused"
    assert main(["calibrate", str(bundle.path), "--video", str(video), "--interest", "zebra"]) == 2
    assert main(["calibrate", str(bundle.path), "--video", str(tmp_path / "none.avi")]) == 3


@pytest.mark.parametrize(("sure", "noticed"), [(0.3, True), (0.5, False)])
def test_a_weak_detectors_misses_are_noticed_where_its_own_scores_are_believed(sure: float, noticed: bool) -> None:
    from dataclasses import replace

    from tests.unit.client.test_client_gates import PROMISE

    gate = InterestGate(replace(PROMISE, sure=sure))
    answer = Detection(boxes=(Box(class_id=1, score=0.35, box_px=(0, 0, 9, 9)),))  # such a detector is never surer
    for index in range(2000):
        if not gate.stops(index, 0.9 if index % 20 == 0 else 0.2):
            gate.learn(index, answer)
    assert (gate.threshold < PROMISE.threshold) is noticed
