"""The oracle: an upper bound on what any controller could deliver on a scenario with one camera.

It knows the capacity trace from end to end, has no noise in its times, sends at the trace's full capacity from the
first byte (no slow start, no congestion window), and chooses by dynamic programming over (device free, link free).
Of loss it knows the probability, not the coins: a frame of n packets is whole at once with probability (1-p)^n, after
one repair, a round trip and a quarter later, with (1-p^2)^n, and so on; a lost packet delays no other frame. It may
fall back on the local model for what does not arrive. Real transports are worse in every respect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deploy.testbed.camera import OVERHEAD_BYTES
from deploy.testbed.report import Summary
from deploy.testbed.scenario import Scenario
from deploy.testbed.tcp import HEADER_BYTES, MSS_BYTES
from deploy.testbed.trace import NEVER_NS, Trace
from deploy.testbed.workload import Workload, pareto_offloads

_BEAM = 10
_REPAIRS = 4
# (device free, link free, score, on time, bytes), times in ns.
_State = tuple[float, float, float, float, float]


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
        self.uplink: Trace = scenario.uplink.capacity(scenario.duration_s, scenario.folder)
        down = scenario.downlink.capacity(scenario.duration_s, scenario.folder)
        self.up_ns, self.down_ns = scenario.uplink.delay_ms * 1e6, scenario.downlink.delay_ms * 1e6
        result_ns = 8e9 * (w.result_bytes + HEADER_BYTES) / max(down.mean_bps(), 1.0)
        self.back_ns = self.down_ns + result_ns
        self.loss, self.result_loss = scenario.uplink.loss_percent / 100, scenario.downlink.loss_percent / 100
        self.repair_ns = 1.25 * (self.up_ns + self.down_ns)
        self.deadline_ns = scenario.deadline_ms * 1e6
        self.local_ns = w.local.ms.p50 * 1e6 if w.local else float(NEVER_NS)
        self.local_accuracy = w.local.accuracy if w.local else 0.0
        t = w.server
        rows = [(p.head_ms.p50, p.payload_bytes.p50, p.accuracy, t.tail_ms.p50) for p in w.points if p.pareto]
        rows += [(o.encode_ms.p50, o.payload_bytes.p50, o.accuracy, t.whole_ms.p50) for o in pareto_offloads(w.offloads)]
        self.choices = [
            _Choice(
                device_ns=ms * 1e6,
                bits=8 * (size + OVERHEAD_BYTES + HEADER_BYTES * _packets(size)) / (1 - self.loss),
                payload_bytes=size,
                packets=_packets(size),
                accuracy=accuracy,
                server_ns=(t.decode_ms + server_ms) * 1e6,
            )
            for ms, size, accuracy, server_ms in rows
        ]

    def p_within(self, spare_ns: float, packets: int) -> float:
        """P(whole and answered with at most as many repairs as the spare time allows)."""
        if spare_ns < 0:
            return 0.0
        if self.loss == 0.0 and self.result_loss == 0.0:
            return 1.0
        repairs = min(_REPAIRS, int(spare_ns / self.repair_ns)) if self.repair_ns > 0 else _REPAIRS
        return float((1 - self.loss ** (repairs + 1)) ** packets * (1 - self.result_loss ** (repairs + 1)))

    def extend(self, state: _State, captured_ns: float, out: Callable[[_State], None]) -> None:
        """Everything that can be done with one frame."""
        device, link, score, on_time, sent = state
        start = max(captured_ns, device)
        deadline = captured_ns + self.deadline_ns
        out(state)
        if start + self.local_ns <= deadline:
            out((start + self.local_ns, link, score + self.local_accuracy, on_time + 1, sent))
        for c in self.choices:
            ready = start + c.device_ns
            if ready >= deadline:
                continue
            free = self.uplink.finish_ns(max(ready, link), c.bits)
            spare = deadline - (free + self.up_ns + c.server_ns + self.back_ns)
            p = self.p_within(spare, c.packets)
            if p <= 0.0:
                continue
            out((ready, free, score + p * c.accuracy, on_time + p, sent + c.payload_bytes))
            if p < 1.0 and ready + self.local_ns <= deadline:
                q = self.p_within(spare - self.local_ns, c.packets)  # answered before the fallback must start
                gain = q * c.accuracy + (1 - q) * self.local_accuracy
                out((ready + (1 - q) * self.local_ns, free, score + gain, on_time + 1, sent + c.payload_bytes))


def _packets(size: float) -> int:
    return max(1, -(-int(size + OVERHEAD_BYTES) // MSS_BYTES))


def oracle(scenario: Scenario, workload: Workload) -> Summary:
    """The bound, in expectation."""
    problem = _Problem(scenario, workload)
    interval_ns = 1e9 / scenario.fps
    n = int(-(-scenario.duration_s * 1e9 // interval_ns))
    states: list[_State] = [(0.0, 0.0, 0.0, 0.0, 0.0)]
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
    _, _, score, on_time, sent = best
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
