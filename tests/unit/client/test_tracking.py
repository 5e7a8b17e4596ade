"""Boxes between answers: a square that moves, one that vanishes, and what is told of their age."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_client.frames import NS_PER_MS, CapturedFrame, FrameReport, Outcome
from edge_client.gates.tracking import BoxTracker, Follower, TrackConfig
from edge_client.sinks import InOrder, to_json
from edge_client.sinks.annotate import annotate
from protos.errors import ConfigError
from protos.messages import Answer, Box, Classification, ClassScore, Detection
from splitters.tasks.preprocess import Frame

SIDE = 60
TEXTURE = np.random.default_rng(1).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)
GROUND = np.random.default_rng(2).integers(90, 110, (240, 640, 3)).astype(np.uint8)


def scene(x: int | None, y: int = 80) -> Frame:
    frame = GROUND.copy()
    if x is not None:
        frame[y : y + SIDE, x : x + SIDE] = TEXTURE
    return frame


def box(x: int, y: int = 80, class_id: int = 1) -> Box:
    return Box(class_id=class_id, score=0.9, box_px=(x, y, x + SIDE, y + SIDE))


def test_a_box_goes_where_its_pixels_go() -> None:
    tracker = BoxTracker()
    tracker.restart(scene(40), [box(40), replace(box(400), class_id=3)])
    for step in range(1, 21):
        found = tracker.advance(scene(40 + 7 * step, 80 + step))
    moving = next(b for b in found if b.class_id == 1)
    assert moving.box_px == pytest.approx((180, 100, 240, 160), abs=3)
    assert moving.score == 0.9
    still = next(b for b in found if b.class_id == 3)
    assert still.box_px == pytest.approx((400, 80, 460, 140), abs=1)


def test_a_box_whose_pixels_are_gone_is_lost_and_stays_lost() -> None:
    tracker = BoxTracker(TrackConfig(survivors=0.5))
    tracker.restart(scene(40), [box(40)])
    noise = np.random.default_rng(5).integers(0, 255, GROUND.shape).astype(np.uint8)
    assert tracker.advance(noise) == ()
    assert tracker.advance(scene(40)) == ()


def test_a_box_that_leaves_the_picture_is_lost() -> None:
    wide = np.concatenate([scene(560), GROUND[:, :200]], axis=1)
    tracker = BoxTracker()
    tracker.restart(np.ascontiguousarray(wide[:, 200:620]), [box(360)])
    for x in range(200, 0, -10):  # the camera turns: what was in the middle slides out to the right
        left = tracker.advance(np.ascontiguousarray(wide[:, x : x + 420]))
    assert left == ()


def test_another_picture_size_is_another_scene() -> None:
    tracker = BoxTracker()
    tracker.restart(scene(40), [box(40)])
    assert tracker.advance(scene(40)[:120]) == ()
    assert BoxTracker().advance(scene(40)) == ()


def test_settings_are_checked() -> None:
    for wrong in ({"points": 1}, {"inner": 0.0}, {"survivors": 1.5}, {"max_age_ms": 0}):
        with pytest.raises(ConfigError):
            TrackConfig(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the age in reports


def report(index: int, outcome: Outcome, image: Frame | None, answer: Answer | None = None) -> FrameReport:
    frame = CapturedFrame(
        index=index, image=image, captured_ns=index * 100 * NS_PER_MS, captured_unix_ns=0, width_px=640, height_px=240
    )
    return FrameReport(frame=frame, model="m", bundle_sha256="0", outcome=outcome, answer=answer)


def test_frames_without_an_answer_carry_the_last_boxes_with_their_age() -> None:
    follower = Follower()
    assert follower.follow(report(0, Outcome.DROPPED, scene(40))).answer is None, "nothing is known yet"
    fresh = follower.follow(report(1, Outcome.RESULT, scene(47), Detection(boxes=(box(47),))))
    lines = [to_json(fresh, {1: "person"})]
    for index, outcome in enumerate((Outcome.FILTERED, Outcome.DROPPED, Outcome.EXPIRED, Outcome.UNCHANGED), 2):
        image = None if outcome is Outcome.DROPPED else scene(40 + 7 * index)
        carried = follower.follow(report(index, outcome, image))
        assert carried.outcome is outcome
        lines.append(to_json(carried, {1: "person"}))
    assert [d["age_frames"] for line in lines for d in line["detections"]] == [0, 1, 2, 3, 4]
    assert [d["age_ms"] for line in lines for d in line["detections"]] == [0, 100, 200, 300, 400]
    assert [round(line["detections"][0]["box_px"][0]) for line in lines] == pytest.approx([47, 54, 54, 68, 75], abs=2)
    assert follower.ms_p50 is not None


def test_boxes_that_are_too_old_are_not_shown() -> None:
    follower = Follower(TrackConfig(max_age_ms=250))
    follower.follow(report(0, Outcome.LOCAL, scene(40), Detection(boxes=(box(40),))))
    assert follower.follow(report(2, Outcome.DROPPED, scene(40))).age is not None
    assert follower.follow(report(3, Outcome.DROPPED, scene(40))).age is None
    assert follower.follow(report(4, Outcome.DROPPED, scene(40))).answer is None


def test_a_classifiers_answers_are_left_alone() -> None:
    follower = Follower()
    seen = report(0, Outcome.RESULT, scene(40), Classification(top=(ClassScore(class_id=1, score=1.0),)))
    assert follower.follow(seen) is seen
    dropped = report(1, Outcome.DROPPED, scene(40))
    assert follower.follow(dropped) is dropped


def test_reports_are_followed_in_the_order_of_capture_and_drawn() -> None:
    taken: list[FrameReport] = []

    class Sink:
        def take(self, report: FrameReport) -> None:
            taken.append(report)

        def close(self) -> None:
            pass

    order = InOrder([Sink()], follow=Follower().follow)
    order.take(report(1, Outcome.UNCHANGED, scene(47)))
    assert not taken, "its boxes come from a frame whose answer is still awaited"
    order.take(report(0, Outcome.RESULT, scene(40), Detection(boxes=(box(40),))))
    assert [r.age.frames for r in taken if r.age] == [0, 1]
    old, new = (annotate(scene(47), r, {1: "person"}) for r in (taken[1], replace(taken[1], age=None)))
    assert (old != new).any(), "the age is written beside the box"


def test_without_tracking_no_age_is_told() -> None:
    line = to_json(report(0, Outcome.RESULT, None, Detection(boxes=(box(40),))), {})
    assert "age_ms" not in line["detections"][0]
