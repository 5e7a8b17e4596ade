"""Traces, links and the TCP model against what can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.testbed.link.model import LOST, Link, LinkConfig, LossModel
from deploy.testbed.link.synthetic import KINDS, synthesise
from deploy.testbed.link.tcp import HEADER_BYTES, MSS_BYTES, TcpFlow
from deploy.testbed.link.trace import NEVER_NS, Trace, constant, load_trace
from protos.errors import ConfigError

MS, S = 1_000_000, 1_000_000_000


# ---------------------------------------------------------------- traces

steps = st.lists(st.tuples(st.integers(1, 3 * S), st.floats(0, 5e7)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(steps, st.integers(0, 40 * S), st.floats(1, 1e7))
def test_finish_is_the_inverse_of_bits_until(rows: list[tuple[int, float]], start: int, bits: float) -> None:
    times, at = [], 0
    for gap, rate in rows:
        times.append((at, rate))
        at += gap
    trace = Trace(times, at)
    done = trace.finish_ns(start, bits)
    if trace.mean_bps() <= 0:
        assert done >= NEVER_NS
        return
    assert done > start or bits / 1e9 < 1
    carried = trace.bits_until(done) - trace.bits_until(start)
    assert carried == pytest.approx(bits, rel=1e-6, abs=max(1.0, 2e-6 * trace.bits_until(done)))


def test_the_three_formats_are_told_apart(tmp_path: Path) -> None:
    columns = tmp_path / "a.log"
    columns.write_text("10.0\t1.5\n11.0\t3.0\n12.0\t0.5\n")
    trace = load_trace(columns)
    assert [trace.bps(t * S) / 1e6 for t in range(3)] == pytest.approx([1.5, 3.0, 0.5])
    assert trace.period_ns == 3 * S
    csv = tmp_path / "b.csv"
    csv.write_text("time_s,mbps\n0,2\n5,4\n")
    assert load_trace(csv).bps(6 * S) == pytest.approx(4e6)
    mahimahi = tmp_path / "c.up"
    mahimahi.write_text("\n".join(str(ms) for ms in range(1, 1001)) + "\n")
    assert load_trace(mahimahi).mean_bps() == pytest.approx(12e6)


def test_a_bad_trace_is_one_sentence(tmp_path: Path) -> None:
    for text in ("", "a b\nc d\n", "1 2\n3\n", "0 1\n0 2\n"):
        path = tmp_path / "bad.log"
        path.write_text(text)
        with pytest.raises(ConfigError, match="bad"):
            load_trace(path)


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_traces_are_seeded(kind: str) -> None:
    a, b, c = (synthesise(kind, seed).steps(60 * S) for seed in (1, 1, 2))
    assert a == b
    assert a != c


def test_a_tunnel_is_dark_for_ten_seconds() -> None:
    trace = synthesise("tunnel", 3)
    assert trace.bits_until(34 * S - 1) - trace.bits_until(24 * S) == 0
    assert trace.bps(23 * S) > 0


# ---------------------------------------------------------------- links


def test_serialisation_propagation_and_queue() -> None:
    link = Link(LinkConfig(trace=constant(8e6), delay_ns=10 * MS, queue_bytes=3000), 0)
    assert link.send(1000, 0) == 11 * MS
    assert link.send(1000, 0) == 12 * MS
    assert link.send(1000, 0) == 13 * MS
    assert link.send(1000, 0) == LOST, "three packets are in a queue of three"
    assert link.queued_bytes(0) == pytest.approx(3000)
    assert link.send(1000, 1 * MS) == 14 * MS


def test_an_outage_delays_and_does_not_lose() -> None:
    trace = constant(8e6).with_outages([(1 * S, 2 * S)], 10 * S)
    link = Link(LinkConfig(trace=trace, delay_ns=0), 0)
    assert link.send(1000, 1 * S) == 2 * S + 1 * MS


@pytest.mark.parametrize("burst", [1.0, 4.0])
def test_the_loss_is_what_was_asked_and_as_bursty(burst: float) -> None:
    link = Link(LinkConfig(trace=constant(1e12), loss=LossModel(loss=0.1, burst_packets=burst)), 7)
    lost = [link.send(100, i * 1000) == LOST for i in range(40_000)]
    assert sum(lost) / len(lost) == pytest.approx(0.1, rel=0.12)
    runs = sum(a and not b for a, b in zip(lost, [*lost[1:], False], strict=True))
    assert sum(lost) / runs == pytest.approx(burst if burst > 1 else 1 / 0.9, rel=0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20 * MS), st.integers(1, 1500)), min_size=1, max_size=60), st.integers(0, 10 * MS))
def test_packets_never_overtake(packets: list[tuple[int, int]], jitter: int) -> None:
    link = Link(LinkConfig(trace=constant(2e6), jitter_ns=jitter, loss=LossModel(loss=0.2)), 3)
    now, last = 0, 0
    for gap, size in packets:
        now += gap
        arrival = link.send(size, now)
        if arrival != LOST:
            assert arrival >= max(last, now)
            last = arrival


# ---------------------------------------------------------------- TCP


def bulk(mbps: float, rtt_ms: float, loss: float, seconds: int = 20, seed: int = 1) -> tuple[float, TcpFlow, Link]:
    """Mbit/s of a flow that always has something to send."""
    link = Link(LinkConfig(trace=constant(mbps * 1e6), delay_ns=int(rtt_ms * MS / 2), loss=LossModel(loss=loss)), seed)
    flow = TcpFlow(link, reverse_delay_ns=int(rtt_ms * MS / 2))
    arrived, now = [0], 0
    while now < seconds * S:
        while flow.unsent_bytes < 100_000:
            flow.write(14_480, now, lambda _at: arrived.__setitem__(0, arrived[0] + 14_480))
        now = max(flow.wake_ns, now)
        flow.advance(now)
    return arrived[0] * 8 / seconds / 1e6, flow, link


def test_a_clean_link_is_filled() -> None:
    for mbps, rtt in ((2, 20), (10, 80)):
        assert bulk(mbps, rtt, 0.0)[0] > 0.85 * mbps * MSS_BYTES / (MSS_BYTES + HEADER_BYTES)


def test_loss_costs_as_the_square_root_says() -> None:
    """Within a factor of two of Mathis et al. (1997) with CUBIC's constant; the relay compares with a real kernel."""
    for rtt, loss in ((80, 0.02), (80, 0.05), (200, 0.02)):
        expected = 1.1 * MSS_BYTES * 8 / (rtt * 1e-3 * loss**0.5) / 1e6
        assert 0.5 < bulk(50, rtt, loss, seconds=40)[0] / expected < 2


def test_a_small_message_over_a_clean_link_takes_one_way_and_its_bytes() -> None:
    link = Link(LinkConfig(trace=constant(8e6), delay_ns=20 * MS), 0)
    flow = TcpFlow(link, reverse_delay_ns=20 * MS)
    found: list[int] = []
    flow.write(3000, 0, found.append)
    assert found == [20 * MS + (3000 + 3 * HEADER_BYTES) * 1000]
    assert flow.wake_ns == NEVER_NS, "an undisturbed frame needs no event"


def test_a_lost_tail_is_repaired_by_a_probe_and_holds_back_what_follows() -> None:
    class Lossy(Link):
        sent = 0

        def send(self, n_bytes: int, now_ns: int) -> int:
            Lossy.sent += 1
            return LOST if Lossy.sent == 12 else super().send(n_bytes, now_ns)

    link = Lossy(LinkConfig(trace=constant(80e6), delay_ns=20 * MS), 0)
    flow = TcpFlow(link, reverse_delay_ns=20 * MS)
    found: dict[str, int] = {}
    for i in range(11):
        flow.write(1000, i * 100 * MS, lambda _at: None)
    flow.write(1000, 1100 * MS, lambda at: found.__setitem__("lost", at))
    flow.write(1000, 1105 * MS, lambda at: found.__setitem__("behind", at))
    while flow.wake_ns < NEVER_NS:
        flow.advance(flow.wake_ns)
    assert found["behind"] >= found["lost"], "in order"
    assert 1150 * MS < found["lost"] < 1300 * MS, "found out by the next frame's acknowledgement, repaired a round trip later"
    assert flow.timeouts == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300 * MS), st.integers(1, 40_000)), min_size=1, max_size=25),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.integers(0, 9),
)
def test_every_message_arrives_once_in_order_and_not_before_it_could(
    messages: list[tuple[int, int]], loss: float, seed: int
) -> None:
    link = Link(LinkConfig(trace=constant(3e6), delay_ns=30 * MS, loss=LossModel(loss=loss)), seed)
    flow = TcpFlow(link, reverse_delay_ns=30 * MS, ack_loss=loss, seed=seed)
    arrived: list[tuple[int, int]] = []
    now = 0
    for i, (gap, size) in enumerate(messages):
        until = now + gap
        while flow.wake_ns <= until:
            flow.advance(flow.wake_ns)
        now = until
        flow.write(size, now, lambda at, i=i, sent=now, size=size: arrived.append((i, at - sent - int(8e9 * size / 3e6))))  # type: ignore[misc]
    for _ in range(100_000):
        if flow.wake_ns >= NEVER_NS:
            break
        flow.advance(flow.wake_ns)
    flow.advance(now + 10_000 * S)
    assert [i for i, _ in arrived] == list(range(len(messages)))
    assert all(late >= 30 * MS for _, late in arrived)
    assert flow.unacked_bytes == 0
