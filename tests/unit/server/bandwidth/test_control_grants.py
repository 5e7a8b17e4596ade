"""Grants: what arrivals tell, fair and useful shares, early refusals."""

from __future__ import annotations

from itertools import combinations
from math import isfinite

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_server.backends.admission import Work, shed
from edge_server.bandwidth.allocation import concave_hull, share
from edge_server.bandwidth.arrivals import Arrivals
from edge_server.bandwidth.grants import BandwidthManager

MS = 1_000_000
POINTS = [(1000.0, 0.5), (2000.0, 0.6), (4000.0, 0.66), (8000.0, 0.7)]


def test_a_clock_offset_cancels() -> None:
    found = []
    for offset in (0, 10**15, -(10**15)):
        arrivals = Arrivals()
        now = 0
        for i in range(40):
            sent = i * 50 * MS
            now = max(sent + 20 * MS, now) + 30 * MS  # 30 ms of service, never a queue
            arrivals.add(3750, sent + offset, now)
        found.append((round(arrivals.queue_ns), round(arrivals.trend_ms_per_s, 6)))
    assert found[0] == found[1] == found[2]


def test_a_growing_queue_has_a_rising_trend_and_the_links_own_bitrate() -> None:
    arrivals = Arrivals()
    now = 0
    for i in range(40):
        sent = i * 50 * MS
        now = max(sent + 20 * MS, now) + 60 * MS  # 60 ms of service every 50 ms
        arrivals.add(7500, sent, now)
    assert arrivals.trend_ms_per_s > 100
    assert abs(arrivals.link.bps / 1e6 - 1) < 0.05


def test_shares_sum_to_the_capacity_and_equals_get_equals() -> None:
    hull = concave_hull([(80 * b, a) for b, a in POINTS])
    shares = share(1e6, {str(i): hull for i in range(7)})
    assert abs(sum(shares.values()) - 1e6) < 1
    assert max(shares.values()) - min(shares.values()) < 1


def test_the_steeper_utility_gets_more_above_the_floor() -> None:
    steep = concave_hull([(100e3, 0.4), (400e3, 0.8)])
    flat = concave_hull([(100e3, 0.4), (400e3, 0.42)])
    shares = share(500e3, {"steep": steep, "flat": flat}, floor=0.4)
    assert shares["steep"] >= 399e3
    assert shares["flat"] >= 99e3


utilities = st.lists(st.lists(st.tuples(st.floats(1e3, 1e7), st.floats(0.01, 1)), max_size=6), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(utilities, st.floats(0, 1e8), st.floats(0, 1))
def test_shares_are_never_negative_nor_more_than_there_is(
    curves: list[list[tuple[float, float]]], capacity: float, floor: float
) -> None:
    shares = share(capacity, {str(i): concave_hull(c) for i, c in enumerate(curves)}, floor=floor)
    assert all(isfinite(x) and x >= 0 for x in shares.values())
    assert sum(shares.values()) <= capacity * (1 + 1e-9) + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1e3, 1e6), st.floats(0.01, 1)), min_size=1, max_size=4), st.integers(2, 4), st.floats(1e4, 3e6))
def test_no_exchange_between_two_sessions_would_gain_anything(curve: list[tuple[float, float]], n: int, capacity: float) -> None:
    """The optimum of a sum of concave functions: moving a little bitrate from one session to another never helps."""
    hulls = {str(i): concave_hull([(b * (i + 1), a) for b, a in curve]) for i in range(n)}
    shares = share(capacity, hulls, floor=0.0)

    def value(name: str, bps: float) -> float:
        total = 0.0
        for s in hulls[name]:
            total += s.slope * min(max(bps, 0.0), s.width_bps)
            bps -= s.width_bps
        return total

    step = capacity * 0.01
    for a, b in combinations(shares, 2):
        for give, take in ((a, b), (b, a)):
            if shares[give] < step:
                continue
            now = value(give, shares[give]) + value(take, shares[take])
            moved = value(give, shares[give] - step) + value(take, shares[take] + step)
            assert moved <= now + 1e-6


def feed(manager: BandwidthManager, sizes: dict[str, int], *, bps: float, seconds: float) -> tuple[int, dict[str, int]]:
    """Every session sends a frame each 100 ms over one FIFO of ``bps``; returns the time and the newest grants."""
    granted: dict[str, int] = {}
    free = now = 0
    for turn in range(int(seconds * 10)):
        for i, (name, n_bytes) in enumerate(sizes.items()):
            now = turn * 100 * MS + i * MS
            free = max(free, now + 10 * MS) + int(8e9 * n_bytes / bps)
            manager.on_layer(name, n_bytes, now, free)
            grant = manager.grant(name, free)
            if grant is not None:
                granted[name] = grant.bitrate_bps
    return free, granted


def test_a_group_is_granted_its_bottleneck_and_no_more() -> None:
    manager = BandwidthManager()
    names = [str(i) for i in range(5)]
    for name in names:
        manager.open(name, "yard", fps=10, points=POINTS)
    _, granted = feed(manager, dict.fromkeys(names, 4000), bps=1.2e6, seconds=6)  # 1.6 Mbit/s are offered
    assert 0.7e6 < sum(granted.values()) <= 1.21e6
    assert max(granted.values()) - min(granted.values()) < 0.2 * max(granted.values())


def test_who_sends_more_than_granted_is_read_more_slowly() -> None:
    manager = BandwidthManager()
    for name in ("greedy", "modest"):
        manager.open(name, "yard", fps=10, points=POINTS)
    now, granted = feed(manager, {"greedy": 20_000, "modest": 2000}, bps=1e6, seconds=8)
    assert manager.pause_ns("greedy", now) > 0
    assert manager.pause_ns("modest", now) == 0
    assert granted["modest"] >= 160_000, "the greedy one takes nothing from what the modest one can use"


def test_unknown_and_closed_sessions_are_harmless() -> None:
    manager = BandwidthManager()
    manager.on_layer("ghost", 1000, 0, 1)
    assert manager.grant("ghost", 1) is None
    manager.close("ghost")
    manager.open("a")
    manager.close("a")
    assert manager.grant("a", 2) is None
    assert manager.pause_ns("a", 2) == 0


def test_shedding_refuses_the_fewest() -> None:
    queue = [Work(key=i, deadline_ns=d, cost_ns=10) for i, d in enumerate((10, 15, 20, 100))]
    run, refused = shed(queue, 0)
    assert len(refused) == 1
    assert [w.deadline_ns for w in run] == sorted(w.deadline_ns for w in run if w.deadline_ns)
    assert shed([Work(key=0, deadline_ns=None, cost_ns=10**12)], 0)[1] == []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), max_size=8))
def test_what_is_kept_is_on_time_and_nothing_less_would_have_to_go(rows: list[tuple[int, int]]) -> None:
    queue = [Work(key=i, deadline_ns=d, cost_ns=c) for i, (d, c) in enumerate(rows)]
    kept, refused = shed(queue, 0)
    assert len(kept) + len(refused) == len(queue)
    at = 0
    for work in kept:
        at += work.cost_ns
        assert work.deadline_ns is not None
        assert at <= work.deadline_ns

    def feasible(some: tuple[Work, ...]) -> bool:
        t = 0
        for w in sorted(some, key=lambda w: w.deadline_ns or 0):
            t += w.cost_ns
            if t > (w.deadline_ns or 0):
                return False
        return True

    assert not any(feasible(some) for some in combinations(queue, len(kept) + 1))


def steady(manager: BandwidthManager, sent_bytes: dict[str, int], said_bytes: float = 4000.0) -> None:
    """Half a minute of two cameras behind one link of 1 Mbit/s."""
    for i in range(300):
        for name, n_bytes in sent_bytes.items():
            manager.on_layer(name, n_bytes, i * 100 * MS, i * 100 * MS + 20 * MS + n_bytes * 8000)
            manager.on_payload(name, said_bytes, n_bytes)


def test_a_session_is_granted_what_its_payloads_really_cost() -> None:
    """Both could use 640 kbit/s by the table; one of them sends video, whose frames cost a tenth of stills."""
    manager = BandwidthManager()
    for name in ("stills", "video"):
        manager.open(name, "yard", fps=10, points=POINTS, model=name)
    steady(manager, {"stills": 4000, "video": 400})
    granted = {name: manager._target_bps(name, manager._sessions[name], 300 * 100 * MS) for name in ("stills", "video")}
    most = {name: sum(s.width_bps for s in manager._sessions[name].utility) for name in granted}
    assert 0.08 < most["video"] / most["stills"] < 0.13
    assert granted["stills"] > granted["video"]


def test_a_new_session_begins_with_what_the_others_of_its_model_learnt() -> None:
    manager = BandwidthManager()
    manager.open("a", "yard", fps=10, points=POINTS, model="m")
    steady(manager, {"a": 400})
    for name, model in (("b", "m"), ("c", "other")):
        manager.open(name, "yard", fps=10, points=POINTS, model=model)
    widths = {name: sum(s.width_bps for s in manager._sessions[name].utility) for name in "abc"}
    assert widths["b"] < 0.2 * widths["c"]
    manager.on_payload("c", 0.0, 400)
    manager.on_payload("nobody", 4000.0, 400)
    assert manager._sessions["c"].frames == 0
