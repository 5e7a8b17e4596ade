"""The estimator learns a known link, forgets an outage, and survives whatever it is fed."""

from __future__ import annotations

import random
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.control import ControlConfig, Estimator
from edge_client.control.options import DEVICE_NOISE

MS = 1_000_000


def drive(
    estimator: Estimator, *, bps: float, rtt_ms: float, n: int, n_bytes: int = 4000, start_ns: int = 0, noise_ms: float = 0.0
) -> int:
    """Frames every 100 ms over a link of known capacity; returns the time after the last."""
    rng = random.Random(1)
    now = start_ns
    for i in range(n):
        size = n_bytes + rng.randrange(-n_bytes // 4, n_bytes // 4)
        frame = now // (100 * MS)
        estimator.on_sent(frame, size, now)
        took = int(rtt_ms * MS + 8e9 * size / bps + rng.random() * noise_ms * MS)
        estimator.on_ack(frame, now + took + 5 * MS, 5 * MS)
        if i % 5 == 0:
            estimator.on_pong(int(rtt_ms * MS), now + took)
        now += 100 * MS
    return now


def test_a_steady_link_is_learnt() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    drive(estimator, bps=2e6, rtt_ms=40, n=30)
    assert abs(estimator.delivery_bps / 2e6 - 1) < 0.1
    assert abs(estimator.base_rtt_ns / MS - 40) < 1
    assert estimator.server_ns == 5 * MS
    assert estimator.in_flight == 0


def test_a_slower_link_is_noticed_within_a_second() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=8e6, rtt_ms=40, n=30)
    drive(estimator, bps=1e6, rtt_ms=40, n=10, start_ns=now)
    assert estimator.delivery_bps < 1.3e6


def test_one_repaired_packet_is_not_a_slow_link_but_does_lower_the_probability() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=4e6, rtt_ms=40, n=40)
    before = estimator.delivery_bps
    sure = estimator.p_within(20 * MS, 10 * MS, 3)
    estimator.on_sent(9999, 4000, now)
    estimator.on_ack(9999, now + 300 * MS, 5 * MS)
    assert estimator.delivery_bps > 0.9 * before
    assert estimator.p_within(20 * MS, 10 * MS, 3) < sure - 0.01


@settings(max_examples=50, deadline=None)
@given(st.floats(-2e8, 6e8), st.floats(0, 6e7), st.floats(4e6, 4e7), st.integers(1, 40))
def test_the_devices_noise_spreads_the_probability(slack_ns: float, spread_ns: float, scale_ns: float, packets: int) -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=4e6, rtt_ms=40, n=60, noise_ms=30)
    for i in range(8):
        estimator.on_sent(9000 + i, 4000, now)
        now += (300 + 40 * i) * MS
        estimator.on_ack(9000 + i, now, 5 * MS)
    each = [estimator.p_within(slack_ns - at * spread_ns, scale_ns, packets) for at in DEVICE_NOISE]
    p = estimator.lateness.p_after_device(slack_ns, spread_ns, scale_ns, packets)
    assert p == pytest.approx(sum(each) / len(each), abs=1e-12)


def test_a_frame_that_a_later_one_passed_by_holds_nothing_up() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=4e6, rtt_ms=40, n=40)
    estimator.on_sent(7000, 4000, now)
    estimator.on_sent(7001, 4000, now + 30 * MS)
    late = now + 400 * MS
    assert estimator.overdue_ns(late) > 300 * MS
    estimator.on_ack(7001, now + 85 * MS, 5 * MS)
    assert estimator.in_flight == 0
    assert estimator.overdue_ns(late) == 0
    assert estimator.backlog_bytes == 0
    assert estimator.p_still(7000, now + 90 * MS, late) == 0, "over datagrams it is lost"


def test_frames_that_never_come_lower_what_is_believed() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=4e6, rtt_ms=40, n=60)
    before = estimator.p_within(100 * MS, 10 * MS, 3)
    for i in range(10):
        estimator.on_sent(8000 + i, 4000, now + i * 100 * MS)
        estimator.on_lost(8000 + i, now + i * 100 * MS + 300 * MS)
    assert estimator.p_within(100 * MS, 10 * MS, 3) < before - 0.1


def test_each_transport_has_its_own_record_and_what_is_on_the_old_one_holds_nothing_up() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=4e6, rtt_ms=40, n=60)
    sure = estimator.p_within(20 * MS, 10 * MS, 3)
    for i in range(20):
        estimator.on_sent(8000 + i, 4000, now + i * 100 * MS)
        estimator.on_lost(8000 + i, now + i * 100 * MS + 90 * MS)
    doubtful = estimator.p_within(20 * MS, 10 * MS, 3)
    assert doubtful < sure - 0.1
    estimator.on_sent(9000, 4000, now + 3000 * MS)
    estimator.set_reliable(False)
    assert estimator.in_flight == 0
    assert estimator.p_within(20 * MS, 10 * MS, 3) > doubtful
    estimator.set_reliable(True)
    assert estimator.p_within(20 * MS, 10 * MS, 3) == doubtful


def test_a_stalled_link_delays_what_is_predicted() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=4e6, rtt_ms=40, n=20)
    estimator.on_sent(5000, 4000, now)
    soon, late = estimator.drained_ns(now + 10 * MS), estimator.drained_ns(now + 400 * MS)
    assert late > soon + 330 * MS
    assert estimator.overdue_ns(now + 400 * MS) > 300 * MS
    assert estimator.p_still(5000, now + 400 * MS, now + 420 * MS) < 0.5


def test_a_disconnect_empties_the_window_and_keeps_what_was_learnt() -> None:
    estimator = Estimator()
    estimator.on_connect(0)
    now = drive(estimator, bps=2e6, rtt_ms=40, n=20)
    estimator.on_sent(7000, 4000, now)
    learnt = estimator.delivery_bps
    estimator.on_disconnect(now)
    assert (estimator.in_flight, estimator.backlog_bytes, estimator.connected) == (0, 0, False)
    assert estimator.delivery_bps == learnt


def test_pings_are_due_when_it_is_quiet_and_not_more_often() -> None:
    estimator = Estimator(ControlConfig(ping_interval_ns=250 * MS))
    assert not estimator.ping_due(10**9), "no session, no ping"
    estimator.on_connect(10**9)
    assert not estimator.ping_due(10**9 + 100 * MS)
    assert estimator.ping_due(10**9 + 300 * MS)
    assert not estimator.ping_due(10**9 + 310 * MS)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["sent", "ack", "lost", "refused", "pong", "down", "up", "grant", "expire"]),
        st.integers(0, 12),
        st.integers(-(10**10), 10**11),
        st.integers(-(10**9), 10**10),
        st.integers(0, 10**7),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_nothing_fed_to_it_makes_a_number_that_is_not_one(events: list[tuple[str, int, int, int, int]]) -> None:
    """Acknowledgements doubled, reordered, of unknown frames; clocks that jump; nonsense durations."""
    e = Estimator()
    e.on_connect(0)
    now = 0
    for kind, frame, step, span, size in events:
        now = max(0, now + step)
        match kind:
            case "sent":
                e.on_sent(frame, size, now)
            case "ack":
                e.on_ack(frame, now, span)
            case "lost":
                e.on_lost(frame, now)
            case "refused":
                e.on_refused(frame, now)
            case "pong":
                e.on_pong(span, now)
            case "down":
                e.on_disconnect(now)
            case "up":
                e.on_connect(now)
            case "grant":
                e.on_grant(now, max_in_flight=frame, queue_ns=span, tail_ns=span)
            case _:
                e.expire(now)
        numbers = [
            e.delivery_bps, e.base_rtt_ns, e.server_ns, e.service_ns(size), e.drained_ns(now), e.overdue_ns(now),
            e.backlog_bytes, e.in_flight, e.room_to_try_bytes, e.rtt_ns(0.95),
        ]  # fmt: skip
        assert all(isfinite(x) and x >= 0 for x in numbers), (kind, numbers)
        for p in (e.p_within(span, 1e7, 1 + frame), e.p_still(frame, now, now + span)):
            assert isfinite(p)
            assert 0 <= p <= 1
