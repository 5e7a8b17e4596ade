"""The change gate and the prefilter's gate: pure, fed frame by frame."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_client.gates.change import ChangeConfig, ChangeGate
from edge_client.gates.interest import InterestGate, Promise, read_promise
from protos.errors import BundleError, ConfigError
from protos.messages import Answer, Box, Detection

S = 1_000_000_000
RNG = np.random.default_rng(0)
SCENE = np.clip(np.kron(RNG.integers(40, 200, (12, 16, 3)), np.ones((20, 20, 1))), 0, 255).astype(np.uint8)


def noisy(frame: Any, sigma: float = 6.0) -> Any:
    return np.clip(frame + RNG.normal(0, sigma, frame.shape), 0, 255).astype(np.uint8)


def person_at(x: int) -> Any:
    frame = SCENE.copy()
    frame[80:200, x : x + 40] = (20, 30, 200)
    return frame


def test_sensor_noise_is_no_change() -> None:
    gate = ChangeGate()
    passed = [gate.changed(noisy(SCENE), i * S // 30) for i in range(60)]
    assert passed[:4] == [True, True, True, False]
    assert not any(passed[4:])


def test_a_person_opens_it_and_calm_frames_close_it() -> None:
    gate = ChangeGate()
    for i in range(10):
        gate.changed(noisy(SCENE), i)
    moving = [gate.changed(noisy(person_at(10 + 6 * i)), 100 + i) for i in range(20)]
    assert all(moving)
    still = [gate.changed(noisy(person_at(124)), 200 + i) for i in range(10)]
    assert sum(still) <= ChangeConfig().calm_frames + 1
    assert not any(still[5:])


def test_a_frame_passes_now_and_then_however_calm_it_is() -> None:
    gate = ChangeGate(ChangeConfig(refresh_s=1.0))
    passed = [gate.changed(SCENE, i * S // 10) for i in range(50)]
    assert sum(passed[5:]) in (4, 5)


def test_slow_light_adds_up_against_the_last_frame_sent() -> None:
    gate = ChangeGate()
    passed = [gate.changed(np.clip(SCENE.astype(int) + i // 4, 0, 255).astype(np.uint8), i) for i in range(120)]
    assert sum(passed[5:]) >= 3


def test_after_a_reset_the_next_frame_passes() -> None:
    gate = ChangeGate()
    for i in range(10):
        gate.changed(SCENE, i)
    assert not gate.changed(SCENE, 11)
    gate.reset()
    assert gate.changed(SCENE, 12)


def test_change_settings_are_checked() -> None:
    with pytest.raises(ConfigError):
        ChangeConfig(open_level=1.0, close_level=2.0)


# ---------------------------------------------------------------- interest

PROMISE = Promise(interest=("person",), class_ids=frozenset({1}), columns=(0,), threshold=0.3, recall=0.95)


def seen(*class_ids: int) -> Answer:
    return Detection(boxes=tuple(Box(class_id=c, score=0.9, box_px=(0, 0, 9, 9)) for c in class_ids))


def test_low_scores_stop_and_one_in_a_hundred_is_sent_anyway() -> None:
    gate = InterestGate(PROMISE)
    assert not gate.stops(0, 0.3)
    stopped = [gate.stops(i, 0.1) for i in range(1, 1001)]
    assert stopped.count(False) == 10
    assert gate.stopped == 1000


def test_misses_that_break_the_promise_loosen_the_threshold() -> None:
    gate = InterestGate(PROMISE)
    index = 0
    for _ in range(50):  # the scene: 50 hits pass, and every probe of the stopped finds one more
        gate.learn(index, seen(1))
        index += 1
    loosened = False
    for _ in range(500):
        index += 1
        if not gate.stops(index, 0.2):
            loosened = gate.learn(index, seen(1)) or loosened
    assert loosened
    assert gate.threshold == pytest.approx(0.98 * 0.2), "just below what was missed"
    assert gate.loosened == 1
    assert not any(gate.stops(index + k, 0.2) for k in range(1, 200))


def test_one_step_is_never_large() -> None:
    gate = InterestGate(PROMISE)
    for index in range(5000):
        if not gate.stops(index, 0.9 if index % 20 == 0 else 0.01) and gate.learn(index, seen(1)):
            break
    assert gate.threshold == pytest.approx(0.6 * PROMISE.threshold)


def test_probes_without_misses_leave_it_alone() -> None:
    gate = InterestGate(PROMISE)
    for index in range(20_000):
        if not gate.stops(index, 0.1):
            assert not gate.learn(index, seen(3))
    assert gate.threshold == PROMISE.threshold
    assert gate.live_recall is None or gate.live_recall == 1.0


def bundle(spec: Any, prefilter: str | None = "device/prefilter.onnx") -> Any:
    manifest = SimpleNamespace(
        name="detector", head=SimpleNamespace(prefilter=prefilter), labels={1: "person", 3: "car", 18: "dog"}
    )
    return SimpleNamespace(manifest=manifest, read_part=lambda path: json.dumps(spec).encode())


SPEC = {
    "category_ids": [1, 3, 18], "interest": ["person", "car"], "threshold": 0.2, "recall_asked": 0.98, "recall_promised": 0.981,
    "recalls": [
        {"recall_asked": 0.9, "recall_promised": 0.9, "threshold": 0.4},
        {"recall_asked": 0.95, "recall_promised": 0.95, "threshold": 0.3},
    ],
    "calibrated": [
        {
            "name": "human", "interest": ["person"], "threshold": 0.25, "recall_asked": 0.98, "recall_promised": 0.97,
            "recalls": [{"recall_asked": 0.9, "recall_promised": 0.9, "threshold": 0.5}],
        },
        {"name": "", "interest": ["car"], "threshold": 0.1, "recall_asked": 0.98, "recall_promised": 0.6},
    ],
}  # fmt: skip


def test_the_promise_is_read_for_classes_and_recall() -> None:
    own = read_promise(bundle(SPEC))
    assert own is not None
    assert (own.threshold, own.recall, own.columns, own.class_ids) == (0.2, 0.981, (0, 1), {1, 3})
    looser = read_promise(bundle(SPEC), recall=0.93)
    assert looser is not None
    assert looser.threshold == 0.3
    assert read_promise(bundle(SPEC, prefilter=None)) is None


@pytest.mark.parametrize("interest", [["person"], ["human"], ["human", "person"]])
def test_every_calibrated_set_of_classes_has_its_own_promise(interest: list[str]) -> None:
    promise = read_promise(bundle(SPEC), interest=interest)
    assert promise is not None
    assert (promise.interest, promise.threshold, promise.recall, promise.columns) == (("person",), 0.25, 0.97, (0,))
    looser = read_promise(bundle(SPEC), interest=interest, recall=0.85)
    assert looser is not None
    assert (looser.threshold, looser.recall) == (0.5, 0.9)
    both = read_promise(bundle(SPEC), interest=["car", "human"])
    assert both is not None
    assert (both.threshold, both.recall) == (0.2, 0.981), "together they are what the bundle was exported for"


def test_without_a_promise_nothing_is_filtered_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    assert read_promise(bundle(SPEC), interest=["dog"]) is None
    assert "no frame is filtered" in caplog.text
    asked = read_promise(bundle(SPEC), interest=["dog"], insist=True)
    assert asked is not None
    assert asked.recall == 0
    assert InterestGate(asked).score([0.9, 0.8, 0.1]) == 0.1


def test_what_the_prefilter_cannot_do_is_said() -> None:
    with pytest.raises(ConfigError, match="zebra"):
        read_promise(bundle(SPEC), interest=["zebra"])
    with pytest.raises(ConfigError, match="calibrated"):
        read_promise(bundle(SPEC), recall=0.999)
    with pytest.raises(BundleError):
        read_promise(bundle({"nothing": 1}))
    for broken in (3, [3], [{"name": "x"}], [{"interest": ["dog"]}], {"a": 1}):
        with pytest.raises(BundleError):
            read_promise(bundle({**SPEC, "calibrated": broken}), interest=["dog"], insist=True)


def test_a_prefilter_may_give_more_scores_than_classes_and_not_fewer(tmp_path: Path) -> None:
    from edge_client.device.choices import measure
    from edge_client.device.engine import Engine
    from tests.fakes.detector_bundle import write_cell_detector

    engine = Engine(write_cell_detector(tmp_path / "bundle", prefilter=True), clock=time.monotonic_ns)
    scores = engine.head.prefilter_scores(engine.features(np.zeros((48, 64, 3), np.uint8)).maps)
    assert len(scores) == 2, "one class, and the score of interest behind it, as the shipped prefilter has"
    measure(engine)
    engine.head._prefilter = lambda _: [np.zeros((1, 0), np.float32)]
    with pytest.raises(BundleError, match="fewer"):
        measure(engine)
