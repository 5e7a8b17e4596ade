"""Times measured on a busy machine are the device's own."""

from __future__ import annotations

import pytest

from edge_client.device.choices import undisturbed


def test_turns_that_other_work_disturbed_do_not_count() -> None:
    quiet = undisturbed([10.0, 10.2, 10.1, 10.3, 10.1, 10.2, 10.4])
    busy = undisturbed([30.0, 10.2, 28.0, 10.3, 31.0, 10.2, 33.0])
    assert busy.p50 == pytest.approx(quiet.p50, rel=0.05)
    assert busy.p95 <= 2 * busy.p50


def test_what_varies_by_itself_has_a_spread() -> None:
    assert undisturbed([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]).p95 == pytest.approx(16.0)


def test_one_turn_is_enough() -> None:
    only = undisturbed([7.0])
    assert (only.p50, only.p95) == (7.0, 7.0)
