"""The oracle: what no controller can beat on a scenario with one camera, in expectation.

It knows the capacity trace from end to end and the distribution of everything else: device and server times, and loss. It
chooses by dynamic programming over (device free, link free), with every simplification in its favour:

* a frame suffers from its own lost packets only, never from waiting behind another frame's (in order is TCP's promise);
* a lost packet is there again one round trip after it would have arrived; the last one of a frame, which nothing behind it
  reveals, after the shortest of the tail loss probe, the time-out and the next frame's acknowledgement;
* no congestion window: the whole capacity is the camera's from the first byte on;
* device time is used up at its median, and a fallback costs its expected share of it, at any moment.

So it bounds every policy, with loss and without, up to the beam's width and the luck of one run; it is no policy itself, and on
lossy links none can come quite so far. Shape legend: S states, C choices, J points of a time's distribution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deploy.testbed.camera import OVERHEAD_BYTES
from deploy.testbed.report import Summary
from deploy.testbed.scenario import Scenario
from deploy.testbed.tcp import HEADER_BYTES, MSS_BYTES
from deploy.testbed.workload import Workload
from splitters.offload import pareto_offloads
from splitters.operating_point import Quantiles

Floats = NDArray[np.float64]

_BEAM, _LOOKED_AT = 12, 160
_REPAIRS = 4
_SAME_NS = 1e6  # states that differ by less count as the same
_SIGMAS = (-1.2816, -0.5244, 0.0, 0.5244, 1.2816)  # five equally likely points of a normal distribution
_TLP_NS, _LONE_TLP_NS, _RTO_NS = 2e6, 200e6, 200e6


class _Capacity:
    """A trace as its integral, ready for arrays of times."""

    def __init__(self, steps: list[tuple[int, float]], end_ns: float) -> None:
        edges = np.array([t for t, _ in steps] + [end_ns], np.float64)
        rates = np.array([r for _, r in steps], np.float64) * 1e-9
        self._times = edges
        # A trickle where there is nothing makes the integral invertible.
        self._bits = np.concatenate([[0.0], np.cumsum(np.maximum(rates, 1e-9) * np.diff(edges))])

    def finish_ns(self, start_ns: Floats, bits: Floats) -> Floats:
        """When so many bits are through that begin at ``start_ns``."""
        target = np.interp(start_ns, self._times, self._bits) + bits
        done = np.interp(target, self._bits, self._times)
        return np.where(target > self._bits[-1], np.inf, np.maximum(done, start_ns))


def _sigma_ns(q: Quantiles) -> float:
    return max(0.0, q.p95 - q.p50) * 1e6 / 1.645


class _Problem:
    """One scenario's numbers, ready for the recursion."""

    def __init__(self, scenario: Scenario, workload: Workload) -> None:
        w = workload.slowed(scenario.device_slowdown)
        up, down = scenario.uplink, scenario.downlink
        self.interval_ns, self.deadline_ns = 1e9 / scenario.fps, scenario.deadline_ms * 1e6
        horizon_ns = int(scenario.duration_s * 1e9 + self.deadline_ns + 1e9)
        self.capacity = _Capacity(up.capacity(scenario.duration_s, scenario.folder).steps(horizon_ns), horizon_ns)
        mean_bps = down.capacity(scenario.duration_s, scenario.folder).mean_bps()
        self.rtt_ns = (up.delay_ms + down.delay_ms) * 1e6
        result_ns = 8e9 * (w.result_bytes + HEADER_BYTES) / max(mean_bps, 1.0)
        self.local_ns = w.local.ms.p50 * 1e6 if w.local else np.inf
        self.local_accuracy = w.local.accuracy if w.local else 0.0
        self.local_sigma_ns = _sigma_ns(w.local.ms) if w.local else 0.0
        t = w.server
        rows = [(p.head_ms, p.payload_bytes.p50, p.accuracy, t.tail_ms) for p in w.points if p.pareto]
        rows += [(o.encode_ms, o.payload_bytes.p50, o.accuracy, t.whole_ms) for o in pareto_offloads(w.offloads)]
        self.payload_bytes = np.array([size for _, size, _, _ in rows])
        packets = np.maximum(1, np.ceil((self.payload_bytes + OVERHEAD_BYTES) / MSS_BYTES))
        self.device_ns = np.array([ms.p50 * 1e6 for ms, _, _, _ in rows])
        self.bits = 8 * (self.payload_bytes + OVERHEAD_BYTES + HEADER_BYTES * packets)
        self.accuracy = np.array([a for _, _, a, _ in rows])
        self.after_ns = np.array([(t.decode_ms + s.p50) * 1e6 for _, _, _, s in rows]) + self.rtt_ns + result_ns
        sigma_ns = np.array([np.hypot(_sigma_ns(ms), _sigma_ns(s)) for ms, _, _, s in rows])
        self.noise_ns = np.array(_SIGMAS)[:, None, None] * sigma_ns  # (J, 1, C)
        self._losses(up.loss_percent / 100, down.loss_percent / 100, packets)

    def _losses(self, up: float, down: float, packets: Floats) -> None:
        """Chances of having arrived after 0, 1, … repairs, and what a repair takes."""
        repairs = np.arange(_REPAIRS + 1)
        self.lossless = up == 0 and down == 0
        self.body = (1 - up ** (repairs[:, None] + 1)) ** (packets - 1)  # (repairs, C): all but the last packet
        self.last, self.result = 1 - up ** (repairs + 1), 1 - down ** (repairs + 1)
        probe_ns = 2 * self.rtt_ns + np.where(packets == 1, _LONE_TLP_NS, _TLP_NS)
        next_ns = self.rtt_ns + min(float(self.device_ns.min()), self.interval_ns)
        self.last_ns = np.minimum(np.minimum(probe_ns, self.rtt_ns + _RTO_NS), next_ns)  # (C,)

    def p_within(self, spare_ns: Floats) -> Floats:
        """P(answered within the time to spare over the median, undisturbed one): (S, C) to (S, C)."""
        spare_ns = spare_ns - self.noise_ns  # (J, S, C)
        if self.lossless:
            return np.asarray((spare_ns >= 0).mean(axis=0), np.float64)
        rtt_ns = max(self.rtt_ns, 1.0)
        inner = np.clip(spare_ns // rtt_ns, 0, _REPAIRS).astype(np.intp)
        outer = np.clip(spare_ns // np.maximum(self.last_ns, 1.0), 0, _REPAIRS).astype(np.intp)
        columns = np.arange(self.bits.size)[None, None, :]
        p = self.body[inner, columns] * self.last[outer] * self.result[inner]
        return np.asarray(np.where(spare_ns >= 0, p, 0.0).mean(axis=0), np.float64)

    def p_local(self, spare_ns: Floats) -> Floats:
        """P(the local model ends in time)."""
        offsets = np.array(_SIGMAS)[:, None] * self.local_sigma_ns
        return np.asarray((spare_ns[None] >= offsets).mean(axis=0), np.float64)

    def extend(self, states: Floats, captured_ns: float) -> Floats:
        """Everything that can be done with one frame: (S, 5) rows of device free, link free, score, on time, bytes."""
        device, link, score, on_time, sent = states.T
        start, deadline = np.maximum(captured_ns, device), captured_ns + self.deadline_ns
        found = [states]
        p = self.p_local(deadline - start - self.local_ns) if np.isfinite(self.local_ns) else np.zeros(len(states))
        some = p > 0
        if some.any():
            found.append(np.stack([start + self.local_ns, link, score + p * self.local_accuracy, on_time + p, sent], axis=1)[some])
        ready = start[:, None] + self.device_ns
        free = self.capacity.finish_ns(np.maximum(ready, link[:, None]), self.bits)
        spare = deadline - (free + self.after_ns)
        p = self.p_within(spare)
        some = p > 0
        columns = [np.broadcast_to(column[:, None], p.shape) for column in (score, on_time, sent)]
        value, answered, total = columns[0] + p * self.accuracy, columns[1] + p, columns[2] + self.payload_bytes
        found.append(np.stack([ready, free, value, answered, total], axis=-1)[some])
        hedged = some & (p < 1) & (ready + self.local_ns <= deadline)
        if hedged.any():
            early = self.p_within(spare - self.local_ns)  # answered before the fallback must start
            value, answered = value + (1 - p) * self.local_accuracy, columns[1] + 1.0
            found.append(np.stack([ready + (1 - early) * self.local_ns, free, value, answered, total], axis=-1)[hedged])
        return np.concatenate(found)


def oracle(scenario: Scenario, workload: Workload) -> Summary:
    """The bound, in expectation."""
    problem = _Problem(scenario, workload)
    n = int(-(-scenario.duration_s * 1e9 // problem.interval_ns))
    states = np.zeros((1, 5))
    for k in range(n):
        states = _prune(problem.extend(states, k * problem.interval_ns), (k + 1) * problem.interval_ns)
    _, _, score, on_time, sent = (float(x) for x in states[np.argmax(states[:, 2])])
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


def _prune(states: Floats, following_ns: float) -> Floats:
    """The best states that no other matches in score while its device and link are free no later.

    Free before the next frame comes is as good as free now.
    """
    if len(states) > _LOOKED_AT:
        states = states[np.argpartition(-states[:, 2], _LOOKED_AT)[:_LOOKED_AT]]
    order = np.argsort(-states[:, 2], kind="stable")
    steps = np.maximum(states[order, :2] - following_ns, 0.0) // _SAME_NS
    kept: list[tuple[int, float, float]] = []
    for i, (device, link) in enumerate(steps.tolist()):
        if all(device < d or link < f for _, d, f in kept):
            kept.append((i, device, link))
            if len(kept) == _BEAM or (device == 0 and link == 0):
                break
    return states[order[[i for i, _, _ in kept]]]
