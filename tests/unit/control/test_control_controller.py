"""Decisions: sure before accurate, accurate before cheap, local when offline, never beyond a grant."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.control import (
    ControlConfig,
    Controller,
    GrantBudget,
    Local,
    LocalOption,
    Offload,
    OffloadOption,
    Skip,
    Split,
)
from protos.errors import ConfigError
from splitters.bundle.operating_point import OperatingPoint, Quantiles

MS = 1_000_000


def q(value: float, high: float = 0.0) -> Quantiles:
    return Quantiles(p50=value, p95=high or value * 1.1)


POINTS = [
    OperatingPoint(id=i, channels=8 * (i + 1), bits=4, payload_bytes=q(900 * 2**i), accuracy=0.6 + 0.04 * i, head_ms=q(4 + i))
    for i in range(4)
]
LOCAL = LocalOption(accuracy=0.5, ms=q(20))


def controller(local: LocalOption | None = LOCAL, **config: object) -> Controller:
    made = Controller(ControlConfig(**{"fps": 10.0, **config}), POINTS, local=local)  # type: ignore[arg-type]
    made.estimator.on_connect(0)
    return made


def run(c: Controller, *, bps: float, rtt_ms: float, frames: int, deadline_ms: float, start: int = 0) -> list[object]:
    """A noiseless link of known capacity; returns the decisions."""
    out: list[object] = []
    size = {p.id: int(p.payload_bytes.p50) for p in POINTS}
    for i in range(start, start + frames):
        now = i * 100 * MS
        d = c.decide(i, now, now + int(deadline_ms * MS))
        out.append(d)
        if isinstance(d, Split):
            sent = now + int(POINTS[d.point_id].head_ms.p50 * MS)
            if c.may_send(i, size[d.point_id], sent, now + int(deadline_ms * MS)):
                c.on_sent(i, size[d.point_id], sent)
                back = sent + int(rtt_ms * MS + 8e9 * size[d.point_id] / bps) + 5 * MS
                c.estimator.on_ack(i, back, 5 * MS)
                c.estimator.on_pong(int(rtt_ms * MS), back)
    return out


def test_over_datagrams_parity_is_part_of_the_price() -> None:
    chosen, bounds = [], []
    for lost in ((0.0, 1.0), (0.3, 3.0)):
        c = controller()
        c.on_transport(reliable=False, lost=(0.0, 1.0))
        run(c, bps=0.7e6, rtt_ms=20, frames=40, deadline_ms=200)
        c.on_transport(reliable=False, lost=lost)
        chosen.append(c.decide(40, 4000 * MS, 4200 * MS))
        bounds.append(c.frame_bytes())
    assert chosen[0].point_id == 3  # type: ignore[union-attr]
    assert isinstance(chosen[1], Split)
    assert chosen[1].point_id < 3
    assert 0 < max(bounds) < inf
    c.on_transport(reliable=True)
    assert c.frame_bytes() == inf


def test_frames_lost_as_often_as_the_path_explains_say_nothing_and_more_do() -> None:
    def hope(lost: tuple[float, float], every: int) -> float:
        c = controller()
        c.on_transport(reliable=False, lost=lost)
        for i in range(200):
            c.on_sent(i, 900, i * 100 * MS)
            if i % every:
                c.on_ack(i, i * 100 * MS + 40 * MS, 5 * MS)
            else:
                c.on_lost(i, i * 100 * MS + 90 * MS)
        return c.estimator.p_within(50 * MS, 10 * MS, 1)

    assert hope((0.005, 1.0), 200) == pytest.approx(hope((0.005, 1.0), 100), abs=0.02)
    assert hope((0.005, 1.0), 4) < hope((0.005, 1.0), 200) - 0.1


def test_a_wide_link_gets_the_most_accurate_point() -> None:
    assert run(controller(), bps=50e6, rtt_ms=20, frames=40, deadline_ms=200)[-1].point_id == 3  # type: ignore[attr-defined]


def test_a_narrow_link_gets_a_point_that_fits_between_frames() -> None:
    decisions = run(controller(), bps=0.2e6, rtt_ms=20, frames=60, deadline_ms=200)
    last = [d for d in decisions[-20:] if isinstance(d, Split)]
    assert last
    assert all(d.point_id <= 1 for d in last), "3.6 kB would take 144 ms of every 100 ms"


def test_a_round_trip_beyond_the_deadline_means_local() -> None:
    assert isinstance(run(controller(), bps=50e6, rtt_ms=250, frames=40, deadline_ms=200)[-1], Local)


def test_offline_is_local_or_a_skip_that_says_so() -> None:
    c = controller()
    c.estimator.on_disconnect(10)
    assert isinstance(c.decide(0, 20, 200 * MS), Local)
    without = controller(local=None)
    without.estimator.on_disconnect(10)
    assert without.decide(0, 20, 200 * MS) == Skip(reason="offline")


def test_a_frame_past_its_deadline_is_skipped() -> None:
    assert controller().decide(0, 300 * MS, 200 * MS) == Skip(reason="late")


def test_a_stall_turns_to_local_within_a_deadline() -> None:
    c = controller()
    run(c, bps=10e6, rtt_ms=20, frames=30, deadline_ms=200)
    silent = []
    for i in range(30, 36):  # nothing comes back any more
        now = i * 100 * MS
        d = c.decide(i, now, now + 200 * MS)
        silent.append(d)
        if isinstance(d, Split) and c.may_send(i, 900, now + 5 * MS, now + 200 * MS):
            c.on_sent(i, 900, now + 5 * MS)
    assert isinstance(silent[2], Local)
    assert isinstance(silent[-1], Local)
    assert c.estimator.in_flight <= c.window.frames


def test_a_split_comes_with_a_fallback_that_ends_in_time() -> None:
    c = controller()
    d = run(c, bps=10e6, rtt_ms=20, frames=30, deadline_ms=200)[-1]
    assert isinstance(d, Split)
    assert d.fallback_ns is not None
    assert d.fallback_ns + int(LOCAL.ms.p95 * MS) <= 29 * 100 * MS + 200 * MS


def test_the_fallback_is_wanted_when_the_answer_is_overdue_and_not_when_it_is_imminent() -> None:
    c = controller()
    run(c, bps=10e6, rtt_ms=20, frames=40, deadline_ms=200)
    now = 50 * 100 * MS
    c.on_sent(50, 900, now)
    assert not c.wants_fallback(50, now + 10 * MS, now + 200 * MS)
    assert c.wants_fallback(50, now + 150 * MS, now + 200 * MS)
    assert not c.wants_fallback(50, now + 195 * MS, now + 200 * MS), "too late for the local model"


def test_hysteresis_keeps_the_last_choice_among_equals() -> None:
    twins = [
        OperatingPoint(id=i, channels=8 + i, bits=4, payload_bytes=q(1000 + i), accuracy=0.6 + 0.001 * i, head_ms=q(5))
        for i in (0, 1)
    ]
    c = Controller(ControlConfig(switch_margin=0.01), twins)
    c.estimator.on_connect(0)
    chosen = {c.decide(i, i * 100 * MS, i * 100 * MS + 400 * MS) for i in range(20)}
    assert len(chosen) == 1


def test_offload_is_chosen_where_the_head_is_too_slow() -> None:
    slow = [OperatingPoint(id=0, channels=8, bits=4, payload_bytes=q(900), accuracy=0.7, head_ms=q(300))]
    jpeg = OffloadOption(format="jpeg", quality=60, size_px=192, payload_bytes=q(6000), accuracy=0.6, encode_ms=q(5))
    c = Controller(ControlConfig(initial_bps=20e6), slow, offloads=[jpeg])
    c.estimator.on_connect(0)
    d = c.decide(0, 0, 200 * MS)
    assert isinstance(d, Offload)
    assert (d.format, d.quality, d.size_px) == ("jpeg", 60, 192)


@pytest.mark.parametrize(
    ("accuracy", "size", "wins"), [(0.9, 500, True), (0.9, 20_000, False), (0.55, 500, False)], ids=["better", "dearer", "worse"]
)
def test_video_is_chosen_where_its_measured_bytes_and_accuracy_are_better(accuracy: float, size: int, wins: bool) -> None:
    h264 = OffloadOption(format="h264", quality=32, payload_bytes=q(size), accuracy=accuracy, encode_ms=q(4), key_bytes=q(6 * size))
    c = Controller(ControlConfig(fps=10.0), POINTS, local=LOCAL, offloads=[h264])
    c.estimator.on_connect(0)
    sizes = {p.id: int(p.payload_bytes.p50) for p in POINTS}
    chosen: list[object] = []
    for i in range(120):
        now = i * 100 * MS
        decision = c.decide(i, now, now + 300 * MS)
        chosen.append(decision)
        if isinstance(decision, Split | Offload):
            sent = size if isinstance(decision, Offload) else sizes[decision.point_id]
            if c.may_send(i, sent, now + 8 * MS, now + 300 * MS):
                c.on_sent(i, sent, now + 8 * MS)
                c.estimator.on_ack(i, now + 8 * MS + int(80 * MS + 8e9 * sent / 0.5e6), 4 * MS)
                c.estimator.on_pong(80 * MS, now + 90 * MS)
    last = chosen[-40:]
    videos, splits = (sum(isinstance(d, kind) for d in last) for kind in (Offload, Split))
    assert (videos if wins else splits) >= 36, last[-5:]  # it may try again what it has not heard of for a while


def test_a_model_whose_frames_are_all_large_is_tried_and_kept() -> None:
    large = OperatingPoint(id=0, channels=8, bits=8, payload_bytes=q(60_000), accuracy=0.7, head_ms=q(4))
    c = Controller(ControlConfig(fps=10.0), [large], local=LOCAL)
    c.estimator.on_connect(0)
    splits = 0
    for i in range(600):
        now = i * 100 * MS
        if isinstance(c.decide(i, now, now + 200 * MS), Split):
            splits += i >= 400
            assert c.may_send(i, 60_000, now + 4 * MS, now + 200 * MS)
            c.on_sent(i, 60_000, now + 4 * MS)
            c.estimator.on_ack(i, now + 50 * MS, 5 * MS)
    assert splits >= 190, "20 Mbit/s are there, and nothing smaller can find out"


def test_a_server_without_a_whole_model_is_offered_no_images_again() -> None:
    jpeg = OffloadOption(format="jpeg", quality=60, payload_bytes=q(3000), accuracy=0.9, encode_ms=q(2))
    c = Controller(ControlConfig(initial_bps=20e6), POINTS, offloads=[jpeg])
    c.estimator.on_connect(0)
    assert isinstance(c.decide(0, 0, 200 * MS), Offload)
    assert c.withdraw_offloads()
    assert not c.withdraw_offloads(), "they are gone already"
    assert isinstance(c.decide(1, 100 * MS, 300 * MS), Split)


def test_an_offload_is_found_again_by_its_name() -> None:
    for choice in (Offload(format="jpeg", quality=60), Offload(format="webp", quality=5, size_px=192)):
        assert Offload.named(choice.name) == choice


def lossy(c: Controller, *, every: int, frames: int, deadline_ms: float) -> list[object]:
    """A wide link of 80 ms that loses one frame in ``every``: its answer, and the next one's, are 150 ms late."""
    out: list[object] = []
    late = {k + d for k in range(every, frames, every) for d in (0, 1)}
    for i in range(frames):
        now = int(i * 1e9 / c.config.fps)
        d = c.decide(i, now, now + int(deadline_ms * MS))
        out.append(d)
        if isinstance(d, Split) and c.may_send(i, 900, now + 5 * MS, now + int(deadline_ms * MS)):
            c.on_sent(i, 900, now + 5 * MS)
            c.estimator.on_ack(i, now + (240 if i in late else 90) * MS, 4 * MS)
    return out


def test_a_loss_rate_is_remembered_longer_than_a_fade() -> None:
    c = controller(fps=10.0)
    lossy(c, every=8, frames=100, deadline_ms=200)
    at = 10_000 * MS
    c.estimator.expire(at)
    before = c.estimator.p_within(100 * MS, 10 * MS, 6)
    c.estimator.expire(at + 15_000 * MS)
    assert c.estimator.p_within(100 * MS, 10 * MS, 6) < before + 0.05
    c.estimator.expire(at + 600_000 * MS)
    assert c.estimator.p_within(100 * MS, 10 * MS, 6) > before + 0.05


def test_where_the_link_fails_often_every_frame_has_the_local_model_behind_it() -> None:
    slow = LocalOption(accuracy=0.59, ms=Quantiles(p50=92.0, p95=96.0))
    for d in lossy(controller(slow, fps=10.0), every=4, frames=120, deadline_ms=200)[60:]:
        assert isinstance(d, Local) or (isinstance(d, Split) and d.fallback_ns is not None)


def test_a_choice_longer_than_an_interval_pays_for_the_frames_it_displaces() -> None:
    points = [
        OperatingPoint(id=0, channels=8, bits=4, payload_bytes=q(500), accuracy=0.60, head_ms=q(80, 80)),
        OperatingPoint(id=1, channels=9, bits=4, payload_bytes=q(500), accuracy=0.66, head_ms=q(190, 190)),
    ]
    c = Controller(ControlConfig(fps=10.0, initial_bps=20e6), points)
    c.estimator.on_connect(0)
    c.decide(0, 0, 400 * MS)
    late = c.decide(1, 190 * MS, 500 * MS)  # 90 ms after its capture: the long choice would let a frame be superseded
    assert isinstance(late, Split)
    assert late.point_id == 0


def crowded(local_ms: float, *, deadline_ms: float, frames: int = 40) -> list[object]:
    """A device whose local model takes that long, and a link over which a better answer comes after 175 ms, or too late."""
    point = OperatingPoint(id=0, channels=8, bits=4, payload_bytes=q(500), accuracy=0.72, head_ms=q(4))
    c = Controller(ControlConfig(fps=10.0), [point], local=LocalOption(accuracy=0.66, ms=q(local_ms)))
    c.estimator.on_connect(0)
    found: list[object] = []
    for i in range(frames):
        now = i * 100 * MS
        found.append(d := c.decide(i, now, now + int(deadline_ms * MS)))
        if isinstance(d, Split) and c.may_send(i, 500, now + 4 * MS, now + int(deadline_ms * MS)):
            c.on_sent(i, 500, now + 4 * MS)
            late = 60 if i % 6 == 5 else 0  # one in six comes too late
            c.on_ack(i, now + (175 + late) * MS, 5 * MS)
            c.on_pong(164 * MS, now + (175 + late) * MS)
    return found


def test_on_a_device_that_a_fallback_fills_it_starts_at_once_and_its_answer_waits_for_the_servers() -> None:
    last = [d for d in crowded(95, deadline_ms=200, frames=120)[-12:] if isinstance(d, Split)]
    assert last
    for d in last:
        assert d.fallback_ns is not None
        assert d.hold
    starts = [(d.fallback_ns or 0) % (100 * MS) for d in last]
    assert max(starts) < 10 * MS, "95 ms of local model beside 4 ms of head: later it would hold up the next frame"


def test_a_fallback_that_fits_between_the_frames_waits_until_it_must_start() -> None:
    last = [d for d in crowded(20, deadline_ms=200)[-12:] if isinstance(d, Split)]
    assert last
    assert all(d.fallback_ns is not None and d.hold for d in last)
    assert all((d.fallback_ns or 0) % (100 * MS) > 50 * MS for d in last), "as late as it can"


def test_on_a_lossy_link_the_window_covers_a_repair() -> None:
    clean, holed = controller(fps=30.0), controller(fps=30.0)
    run(clean, bps=10e6, rtt_ms=80, frames=60, deadline_ms=400)
    lossy(holed, every=6, frames=120, deadline_ms=400)
    assert holed.window.frames > clean.window.frames


def test_the_device_time_measured_here_replaces_the_tables() -> None:
    c = controller(local=None)
    run(c, bps=50e6, rtt_ms=20, frames=20, deadline_ms=100)
    for i in range(10):
        c.on_device(Split(point_id=3), 95 * MS, i)
    assert run(c, bps=50e6, rtt_ms=20, frames=5, deadline_ms=100, start=40)[-1].point_id < 3  # type: ignore[attr-defined]


def test_a_refining_layer_goes_only_while_it_would_arrive() -> None:
    c = controller()
    run(c, bps=0.5e6, rtt_ms=20, frames=30, deadline_ms=200)
    now = 40 * 100 * MS
    assert c.may_send(40, 1000, now, now + 200 * MS, layer=1)
    assert not c.may_send(40, 1000, now, now + 30 * MS, layer=1)


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing to choose"):
        Controller(ControlConfig(), [])


@pytest.mark.parametrize("bps", [0.1e6, 0.5e6, 2e6, 50e6])
@pytest.mark.parametrize(("fps", "deadline_ms"), [(10.0, 60), (10.0, 200), (30.0, 200), (60.0, 100)])
def test_what_is_not_looked_at_would_not_have_been_chosen(bps: float, fps: float, deadline_ms: float) -> None:
    """A decision that is to be explained scores every option."""
    decisions, explained = (
        run(controller(fps=fps, explain=explain), bps=bps, rtt_ms=30, frames=60, deadline_ms=deadline_ms)
        for explain in (False, True)
    )
    assert decisions == explained


def test_explain_names_inputs_candidates_and_choice_and_is_json() -> None:
    d = run(controller(explain=True), bps=10e6, rtt_ms=20, frames=10, deadline_ms=200)[-1]
    record = d.explain  # type: ignore[attr-defined]
    assert record.choice == d.name  # type: ignore[attr-defined]
    assert {c.name for c in record.candidates} >= {"local", "split 0", "split 3"}
    json.dumps(asdict(record))


def test_a_decision_is_quick() -> None:
    """The bench has the real bound; this only catches a decision become ten times slower."""
    c = controller()
    run(c, bps=10e6, rtt_ms=20, frames=80, deadline_ms=200)
    times = []
    for i in range(300):
        now = (100 + i) * 100 * MS
        begin = time.perf_counter_ns()
        c.decide(i, now, now + 200 * MS)
        times.append(time.perf_counter_ns() - begin)
    assert statistics.median(times) < 500_000


STEPS = st.lists(
    st.tuples(st.integers(0, 5 * 10**8), st.integers(1, 6000), st.one_of(st.none(), st.integers(1, 5_000_000))),
    min_size=1,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(10**8, 2 * 10**9))
def test_no_window_ever_carries_more_than_the_grant(steps: list[tuple[int, int, int | None]], burst_ns: int) -> None:
    """Over every window between two sends: bytes <= integral of the grant + one burst of the largest grant in it."""
    budget = GrantBudget(burst_ns=burst_ns)
    now, bps = 0, 1_000_000
    budget.set_bitrate(bps, now)
    sent: list[tuple[int, int]] = []
    grants = [(0, bps)]
    for gap, size, regrant in steps:
        now += gap
        if regrant:
            bps = regrant
            budget.set_bitrate(bps, now)
            grants.append((now, bps))
        if size <= budget.tokens_bytes(now):
            budget.spend(size, now)
            sent.append((now, size))
    for i, (begin, _) in enumerate(sent):
        total = 0
        for end, size in sent[i:]:
            total += size
            edges = [*(t for t, _ in grants), inf]
            allowed = sum(
                rate / 8 * max(0.0, min(end, until) - max(begin, at)) / 1e9
                for (at, rate), until in zip(grants, edges[1:], strict=True)
            )
            burst = (
                max(rate for (at, rate), until in zip(grants, edges[1:], strict=True) if until >= begin and at <= end)
                / 8
                * burst_ns
                / 1e9
            )
            assert total <= allowed + burst + 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-(10**9), 10**9), st.booleans(), st.integers(0, 10**9)), max_size=40), st.integers(16_000, 10**7)
)
def test_a_granted_controller_keeps_its_budget_whatever_it_hears(steps: list[tuple[int, bool, int]], bps: int) -> None:
    c = controller()
    c.on_grant(0, bitrate_bps=bps)
    now, total, newest = 0, 0, 0
    size = {p.id: int(p.payload_bytes.p95) for p in POINTS}
    for i, (step, answered, server_ns) in enumerate(steps):
        now = max(0, now + step)
        newest = max(newest, now)
        d = c.decide(i, now, now + 400 * MS)
        if isinstance(d, Split) and c.may_send(i, size[d.point_id], now, now + 400 * MS):
            assert d.limit_bytes is not None
            assert size[d.point_id] <= d.limit_bytes
            c.on_sent(i, size[d.point_id], now)
            total += size[d.point_id]
            if answered:
                c.estimator.on_ack(i, now + server_ns, server_ns)
    forward = sum(max(0, s) for s, _, _ in steps)  # a clock that jumps back and forth may earn each forward step
    assert total <= bps / 8 * forward / 1e9 + bps / 8 * 0.5 + 1
