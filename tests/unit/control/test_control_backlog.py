"""What a busy device costs the frames to come: against a process solved by other means, and by the edges of the model."""

from __future__ import annotations

import random

import pytest

from edge_client.control.backlog import CELLS, Backlog, Row
from edge_client.control.options import DEVICE_NOISE

MS = 1e6
INTERVAL = 100 * MS


def settled(rows: list[Row], unanswered: float = 0.0) -> Backlog:
    backlog = Backlog(INTERVAL)
    for _ in range(400):
        backlog.sweep(rows, unanswered)
    return backlog


def until(deadline_ms: float, ms: float, accuracy: float) -> Row:
    """A choice without spread that is worth its accuracy if it ends by the deadline."""
    lates = [cell * INTERVAL / CELLS for cell in range(CELLS + 1)]
    return ms * MS, 0.0, [accuracy if late + ms * MS <= deadline_ms * MS else 0.0 for late in lates]


def test_a_device_that_is_free_in_time_costs_nothing() -> None:
    backlog = settled([until(200, 40, 0.7)])
    assert backlog.loss(-1.0) == 0.0
    assert backlog.expected(-30 * MS, 20 * MS) == 0.0


def test_a_lateness_that_every_frame_can_bear_costs_nothing_and_one_that_none_can_costs_a_frame() -> None:
    backlog = settled([until(200, 40, 0.7)])
    assert backlog.loss(90 * MS) == pytest.approx(0.0, abs=1e-6), "40 ms later it still ends by 200, and catches up"
    assert backlog.loss(INTERVAL) == pytest.approx(0.7, abs=1e-3), "the next frame is superseded"
    assert backlog.loss(3 * INTERVAL) == pytest.approx(2.1, abs=3e-3)
    tight = settled([until(100, 70, 0.7)])
    assert tight.loss(50 * MS) == pytest.approx(0.7, abs=1e-3), "120 ms is too late, and the frame after is fresh again"
    assert tight.loss(25 * MS) == pytest.approx(0.0, abs=1e-3)


def test_the_value_is_that_of_the_best_policy_found_by_playing_it() -> None:
    """A local model of 93 ms (p95 111) and frames 100 ms apart that are worth nothing after 120 ms: when to leave one out?"""
    mid, spread, deadline = 93 * MS, 18 * MS, 120 * MS
    times = [mid + z * spread for z in DEVICE_NOISE]
    rewards = [sum(cell * INTERVAL / CELLS + t <= deadline for t in times) / len(times) for cell in range(CELLS + 1)]

    def played(start_up_to_ns: float, frames: int = 40_000) -> float:
        rng, free, answered = random.Random(1), 0.0, 0
        for k in range(frames):
            captured = k * INTERVAL
            if free > captured + start_up_to_ns:
                continue
            begins = max(captured, free)
            free = begins + rng.choice(times)
            answered += free <= captured + deadline
        return answered / frames

    best = max(played(cell * INTERVAL / CELLS) for cell in range(CELLS + 1))
    backlog = settled([(mid, spread, rewards)])
    assert backlog.lost == pytest.approx(best, abs=0.02), "the mean reward of the policy that iteration finds"


def test_a_light_choice_beside_a_heavy_one_makes_a_late_start_bearable() -> None:
    heavy, light = until(200, 95, 0.73), until(200, 5, 0.70)
    assert settled([heavy]).loss(95 * MS) >= settled([heavy, light]).loss(95 * MS)
    assert settled([heavy, light]).loss(95 * MS) <= 0.03 + 1e-3, "one frame takes the light one, and all is well again"


def test_an_unanswered_frame_may_cost_more_than_its_value() -> None:
    assert settled([until(200, 40, 0.7)], -0.5).loss(INTERVAL) == pytest.approx(1.2, abs=2e-3)
