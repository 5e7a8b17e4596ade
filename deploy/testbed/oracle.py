"""The oracle: what a controller could deliver at most on a scenario with one camera if it knew the future.

It knows the capacity trace from end to end, has no noise in its times, starts at full speed, and chooses by dynamic
programming over (device free, link free). Of loss it knows the probability, not the coins, and it has the transport
everybody has, at its best: a packet lost is repaired in a round trip and a quarter, the last one of a frame when
the tail loss probe, the time-out or the next frame's acknowledgement reveals it; until then the connection delivers
nothing (in order is TCP's promise), and the capacity is at most what CUBIC sustains at that loss and round trip on a
link without any limit (measured with the same model). It may fall back on the local model for what does not arrive.
Without loss this is an upper bound; with loss the expected exposure to repairs is carried along each path, so it is the
value of a good clairvoyant policy rather than a proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from deploy.testbed.camera import OVERHEAD_BYTES
from deploy.testbed.link import Link, LinkConfig, LossModel
from deploy.testbed.report import Summary
from deploy.testbed.scenario import Scenario
from deploy.testbed.tcp import HEADER_BYTES, MSS_BYTES, TcpFlow
from deploy.testbed.trace import NEVER_NS, Trace, constant
from deploy.testbed.workload import Workload
from splitters.offload import pareto_offloads

_BEAM = 10
_REPAIRS = 4
# (device free, link free, score, on time, bytes, packets exposed to loss lately, last sent), times in ns.
_State = tuple[float, float, float, float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    device_ns: float
    bits: float
    payload_bytes: float
    packets: int
    accuracy: float
    server_ns: float


class _Problem:
    """One scenario's numbers, ready for the recursion."""

    def __init__(self, scenario: Scenario, workload: Workload) -> None:
        w = workload.slowed(scenario.device_slowdown)
        self.loss, self.result_loss = scenario.uplink.loss_percent / 100, scenario.downlink.loss_percent / 100
        rtt_ns = int((scenario.uplink.delay_ms + scenario.downlink.delay_ms) * 1e6)
        self.uplink: Trace = scenario.uplink.capacity(scenario.duration_s, scenario.folder)
        if self.loss > 0:
            self.uplink = self.uplink.limited(sustained_bps(self.loss, rtt_ns))
        down = scenario.downlink.capacity(scenario.duration_s, scenario.folder)
        self.up_ns, self.down_ns = scenario.uplink.delay_ms * 1e6, scenario.downlink.delay_ms * 1e6
        result_ns = 8e9 * (w.result_bytes + HEADER_BYTES) / max(down.mean_bps(), 1.0)
        self.back_ns = self.down_ns + result_ns
        self.rtt_ns = self.up_ns + self.down_ns
        self.interval_ns = 1e9 / scenario.fps
        self.deadline_ns = scenario.deadline_ms * 1e6
        self.local_ns = w.local.ms.p50 * 1e6 if w.local else float(NEVER_NS)
        self.local_accuracy = w.local.accuracy if w.local else 0.0
        t = w.server
        rows = [(p.head_ms.p50, p.payload_bytes.p50, p.accuracy, t.tail_ms.p50) for p in w.points if p.pareto]
        rows += [(o.encode_ms.p50, o.payload_bytes.p50, o.accuracy, t.whole_ms.p50) for o in pareto_offloads(w.offloads)]
        self.choices = [
            _Choice(
                device_ns=ms * 1e6,
                bits=8 * (size + OVERHEAD_BYTES + HEADER_BYTES * _packets(size)),
                payload_bytes=size,
                packets=_packets(size),
                accuracy=accuracy,
                server_ns=(t.decode_ms + server_ms) * 1e6,
            )
            for ms, size, accuracy, server_ms in rows
        ]

    def repair_ns(self, packets: int) -> float:
        """From when a frame would have been whole to when it is, one packet of it having been lost."""
        probe = 2 * self.rtt_ns + (200e6 if packets == 1 else 2e6)
        tail = min(probe, self.rtt_ns + 200e6, self.interval_ns + 1.25 * self.rtt_ns)
        return ((packets - 1) * 1.25 * self.rtt_ns + tail) / packets

    def p_within(self, spare_ns: float, packets: float, repair_ns: float) -> float:
        """P(whole and answered with at most as many repairs as the spare time allows)."""
        if spare_ns < 0:
            return 0.0
        if self.loss == 0.0 and self.result_loss == 0.0:
            return 1.0
        repairs = min(_REPAIRS, int(spare_ns / repair_ns))
        return float((1 - self.loss ** (repairs + 1)) ** packets * (1 - self.result_loss ** (repairs + 1)))

    def exposed(self, state: _State, at_ns: float) -> float:
        """Packets whose loss would still hold back a frame that leaves now."""
        age_ns = max(0.0, at_ns - state[6])
        return state[5] * max(0.0, 1 - age_ns / (1.25 * self.rtt_ns)) if self.rtt_ns > 0 else 0.0

    def extend(self, state: _State, captured_ns: float, out: Callable[[_State], None]) -> None:
        """Everything that can be done with one frame."""
        device, link, score, on_time, sent, exposure, last = state
        start = max(captured_ns, device)
        deadline = captured_ns + self.deadline_ns
        out(state)
        if start + self.local_ns <= deadline:
            out((start + self.local_ns, link, score + self.local_accuracy, on_time + 1, sent, exposure, last))
        for c in self.choices:
            ready = start + c.device_ns
            if ready >= deadline:
                continue
            free = self.uplink.finish_ns(max(ready, link), c.bits)
            spare = deadline - (free + self.up_ns + c.server_ns + self.back_ns)
            held = self.exposed(state, ready) if self.loss else 0.0
            # The wait behind an earlier loss is over half a repair on the mean; what fits into the spare time is no harm.
            waits = held * max(0.0, 1 - spare / (1.25 * self.rtt_ns)) if held else 0.0
            repair = self.repair_ns(c.packets)
            p = self.p_within(spare, c.packets + waits, repair)
            if p <= 0.0:
                continue
            after = (sent + c.payload_bytes, c.packets + held, ready)
            out((ready, free, score + p * c.accuracy, on_time + p, *after))
            if p < 1.0 and ready + self.local_ns <= deadline:
                early = self.p_within(spare - self.local_ns, c.packets + waits, repair)  # answered before the fallback must start
                gain = p * c.accuracy + (1 - p) * self.local_accuracy
                out((ready + (1 - early) * self.local_ns, free, score + gain, on_time + 1, *after))


@lru_cache(maxsize=64)
def sustained_bps(loss: float, rtt_ns: int) -> float:
    """What CUBIC carries in the long run at this loss and round trip where the link itself sets no limit."""
    link = Link(LinkConfig(trace=constant(200e6), delay_ns=rtt_ns // 2, loss=LossModel(loss=loss)), "sustained")
    flow = TcpFlow(link, reverse_delay_ns=rtt_ns // 2, ack_loss=loss, seed="sustained")
    arrived = [0]
    chunk = 20 * MSS_BYTES

    def deliver(_: int) -> None:
        arrived[0] += chunk

    now, end = 0, 120_000_000_000
    while now < end:
        while flow.unsent_bytes < 4 * chunk:
            flow.write(chunk, now, deliver)
        now = max(flow.wake_ns, now)
        flow.advance(now)
    return arrived[0] * 8e9 / end


def _packets(size: float) -> int:
    return max(1, -(-int(size + OVERHEAD_BYTES) // MSS_BYTES))


def oracle(scenario: Scenario, workload: Workload) -> Summary:
    """The bound, in expectation."""
    problem = _Problem(scenario, workload)
    interval_ns = 1e9 / scenario.fps
    n = int(-(-scenario.duration_s * 1e9 // interval_ns))
    states: list[_State] = [(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
    for k in range(n):
        now, following = k * interval_ns, (k + 1) * interval_ns
        found: dict[tuple[int, int], _State] = {}

        def keep(s: _State, following: float = following, found: dict[tuple[int, int], _State] = found) -> None:
            # Free before the next frame comes is as good as free now; states within 2 ms count as the same.
            key = (max(0, int((s[0] - following) / 2e6)), max(0, int((s[1] - following) / 2e6)))
            if key not in found or found[key][2] < s[2]:
                found[key] = s

        for state in states:
            problem.extend(state, now, keep)
        states = _prune(list(found.values()), following)
    best = max(states, key=lambda s: s[2])
    _, _, score, on_time, sent, _, _ = best
    return Summary(
        captured=n,
        on_time=on_time / n,
        accuracy=score / max(on_time, 1e-9),
        score=score / n,
        bytes_mean=sent / n,
        latency_ms_p50=0.0,
        latency_ms_p95=0.0,
        outcomes={"bound": n},
    )


def _prune(states: list[_State], following_ns: float) -> list[_State]:
    """The best states that no other matches in score while its device and link are free no later."""
    states.sort(key=lambda s: -s[2])
    kept: list[_State] = []
    for s in states:
        device, link = max(s[0], following_ns), max(s[1], following_ns)
        if all(device < max(k[0], following_ns) or link < max(k[1], following_ns) for k in kept):
            kept.append(s)
            if len(kept) == _BEAM:
                break
    return kept
