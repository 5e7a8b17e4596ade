"""The oracle: what no controller can beat on a scenario with one camera, in expectation.

It knows the capacity trace from end to end and the distribution of everything else: device and server times, and loss. It
chooses by dynamic programming over (device free, link free), with every simplification in its favour:

* a frame suffers from its own lost packets only, never from waiting behind another frame's (in order is TCP's promise);
* a lost packet is there again one round trip after it would have arrived; the last one of a frame, which nothing behind it
  reveals, after the shortest of the tail loss probe, the time-out and the next frame's acknowledgement;
* no congestion window: the whole capacity is the camera's from the first byte on;
* over datagrams nothing is sent twice: a frame arrives if no more packets are lost than it has parity, of which it may have none or
  as much as reaches the client's two goals; losses may come in bursts; a result is never lost. ``auto`` has the better of the two;
* device and link time are used up at their medians, and a fallback costs its expected share, at any moment.

States that are too many are merged, never dropped, so the bound holds whatever the beam's width, and a wider one only tightens it.
It bounds every policy in expectation, with loss and without; one run's luck may exceed it by a fraction of a point. It is no policy
itself, and on lossy links none can come so far: there is no congestion window here and no head-of-line blocking. Shape legend:
S states, C choices, J points of a time's distribution.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace
from math import log

import numpy as np
from numpy.typing import NDArray

from deploy.testbed.link.tcp import HEADER_BYTES, MSS_BYTES
from deploy.testbed.scenario import Scenario
from deploy.testbed.simulate.camera import OVERHEAD_BYTES
from deploy.testbed.simulate.report import Summary
from deploy.testbed.workload import Workload
from protos.datagrams.loss import GOAL, PIECE_BYTES, Redundancy
from protos.datagrams.pieces import pieces_of
from splitters.bundle.offload import pareto_offloads
from splitters.bundle.operating_point import Quantiles

Floats = NDArray[np.float64]

_BEAM, _CELL_NS = 32, 1e6
_REPAIRS = 4
_PARITY_GOALS = (0.95, GOAL)
_HOPELESS = 1e-3  # chances below this are none
_NEVER_NS = 1e18  # 30 years: beyond every run, and finite, so that differences of such times are numbers
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
        """When ``bits`` that start at ``start_ns`` have been delivered; ``_NEVER_NS`` if not before the trace ends."""
        target = np.interp(start_ns, self._times, self._bits) + bits
        done = np.interp(target, self._bits, self._times)
        return np.where(target > self._bits[-1], _NEVER_NS, np.maximum(done, start_ns))


def _sigma_ns(q: Quantiles) -> float:
    return max(0.0, q.p95 - q.p50) * 1e6 / 1.645


def _normal(x: Floats) -> Floats:
    """The normal distribution function, to 2e-4."""
    x = np.clip(x, -8.0, 8.0)
    return np.asarray(1.0 / (1.0 + np.exp(-1.5976 * x - 0.07056 * x**3)), np.float64)


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
        rows = [(p.head_ms, p.payload_bytes, p.accuracy, t.tail_ms) for p in w.points if p.pareto]
        rows += [(o.encode_ms, o.payload_bytes, o.accuracy, t.whole_ms) for o in pareto_offloads(w.offloads)]
        self.payload_bytes = np.array([float(size.p50) for _, size, _, _ in rows])
        self.payload_sigma = np.array([log(max(1.0, size.p95 / max(size.p50, 1.0))) / 1.645 for _, size, _, _ in rows])
        packets = np.maximum(1, np.ceil((self.payload_bytes + OVERHEAD_BYTES) / MSS_BYTES))
        self.device_ns = np.array([ms.p50 * 1e6 for ms, _, _, _ in rows])
        self.bits = 8 * (self.payload_bytes + OVERHEAD_BYTES + HEADER_BYTES * packets)
        self.accuracy = np.array([a for _, _, a, _ in rows])
        self.after_ns = np.array([(t.decode_ms + s.p50) * 1e6 for _, _, _, s in rows]) + self.rtt_ns + result_ns
        self.sigma_ns = np.array([np.hypot(_sigma_ns(ms), _sigma_ns(s)) for ms, _, _, s in rows])
        self.arrive: Floats | None = None
        if scenario.transport == "quic":
            self._parity(up.loss_percent / 100, up.burst_packets)
        else:
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

    def _parity(self, loss: float, run: float) -> None:
        """Every choice with several amounts of parity, each a choice of its own."""
        sizes = self.payload_bytes + OVERHEAD_BYTES
        index, bits, arrive, lossy = [], [], [], Redundancy(loss, run)
        for i, n_bytes in enumerate(sizes):
            count = pieces_of(int(n_bytes))
            for extra in sorted({0, *(lossy.parity(count, 1.0, goal=goal) for goal in _PARITY_GOALS)} if loss else {0}):
                index.append(i)
                bits.append(8 * (n_bytes / count + PIECE_BYTES) * (count + extra))
                arrive.append(lossy.chance(count, extra) if loss else 1.0)
        for name in ("payload_bytes", "payload_sigma", "device_ns", "accuracy", "after_ns", "sigma_ns"):
            setattr(self, name, getattr(self, name)[index])
        self.bits, self.arrive = np.array(bits), np.array(arrive)

    def p_within(self, spare_ns: Floats, service_ns: Floats) -> Floats:
        """P(answered within the time to spare over the median, undisturbed one), the link's part given: (S, C) to (S, C)."""
        sigma_ns = np.maximum(np.hypot(self.sigma_ns, self.payload_sigma * service_ns), 1.0)
        if self.arrive is not None:
            return _normal(spare_ns / sigma_ns) * self.arrive
        if self.lossless:
            return _normal(spare_ns / sigma_ns)
        spare_ns = spare_ns - np.array(_SIGMAS)[:, None, None] * sigma_ns  # (J, S, C)
        rtt_ns = max(self.rtt_ns, 1.0)
        inner = np.clip(spare_ns // rtt_ns, 0, _REPAIRS).astype(np.intp)
        outer = np.clip(spare_ns // np.maximum(self.last_ns, 1.0), 0, _REPAIRS).astype(np.intp)
        columns = np.arange(self.bits.size)[None, None, :]
        p = self.body[inner, columns] * self.last[outer] * self.result[inner]
        return np.asarray(np.where(spare_ns >= 0, p, 0.0).mean(axis=0), np.float64)

    def p_local(self, spare_ns: Floats) -> Floats:
        """P(the local model ends in time)."""
        return _normal(spare_ns / max(self.local_sigma_ns, 1.0))

    def extend(self, states: Floats, captured_ns: float) -> Floats:
        """Everything that can be done with one frame: (S, 5) rows of device free, link free, score, on time, bytes."""
        device, link, score, on_time, sent = states.T
        start, deadline = np.maximum(captured_ns, device), captured_ns + self.deadline_ns
        found = [states]
        p = self.p_local(deadline - start - self.local_ns) if np.isfinite(self.local_ns) else np.zeros(len(states))
        some = p > _HOPELESS
        if some.any():
            found.append(np.stack([start + self.local_ns, link, score + p * self.local_accuracy, on_time + p, sent], axis=1)[some])
        ready = start[:, None] + self.device_ns
        begins = np.maximum(ready, link[:, None])
        free = self.capacity.finish_ns(begins, self.bits)
        service = np.where(free < _NEVER_NS, free - begins, 0.0)
        spare = deadline - (free + self.after_ns)
        p = self.p_within(spare, service)
        some = p > _HOPELESS
        columns = [np.broadcast_to(column[:, None], p.shape) for column in (score, on_time, sent)]
        value, answered, total = columns[0] + p * self.accuracy, columns[1] + p, columns[2] + self.payload_bytes
        found.append(np.stack([ready, free, value, answered, total], axis=-1)[some])
        hedged = some & (p < 1 - _HOPELESS) & (ready + self.local_ns <= deadline)
        if hedged.any():
            early = self.p_within(spare - self.local_ns, service)  # answered before the fallback must start
            value, answered = value + (1 - p) * self.local_accuracy, columns[1] + 1.0
            found.append(np.stack([ready + (1 - early) * self.local_ns, free, value, answered, total], axis=-1)[hedged])
        return np.concatenate(found)


def oracle(scenario: Scenario, workload: Workload) -> Summary:
    """The bound, in expectation."""
    if scenario.transport == "auto":
        return max((oracle(replace(scenario, transport=t), workload) for t in ("grpc", "quic")), key=lambda s: s.score)
    problem = _Problem(scenario, workload)
    n = int(-(-scenario.duration_s * 1e9 // problem.interval_ns))
    most = max(float(problem.accuracy.max(initial=0.0)), problem.local_accuracy)
    states, cell_ns = np.zeros((1, 5)), _CELL_NS
    for k in range(n):
        states = problem.extend(states, k * problem.interval_ns)
        states, cell_ns = _prune(states, (k + 1) * problem.interval_ns, problem.interval_ns, most, cell_ns)
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


def _prune(states: Floats, following_ns: float, interval_ns: float, most: float, cell_ns: float) -> tuple[Floats, float]:
    """Few states that are together at least as good as all: (S, 5) to (at most ``_BEAM``, 5). Gives nothing away, may add.

    Free before the next frame comes is as good as free now. A state that is ``most`` (the best accuracy there is) a frame behind
    another one, for every frame that the other would have to leave out until all of it is free, cannot come back. What is
    left is merged in cells of time, each having the best score and the earliest times of its members; the cells grow, from
    ``cell_ns``, until they are few enough. Also returns where the next call should begin with that.
    """
    free = np.maximum(states[:, :2] - following_ns, 0.0)
    hopeless = np.max(states[:, 2] - most * np.ceil(free.max(axis=1) / interval_ns))
    keep = states[:, 2] >= hopeless
    states, free = states[keep], free[keep]
    while True:
        merged, times = _merge(states, free, cell_ns)
        kept = _frontier(times)
        if len(kept) <= _BEAM:
            break
        cell_ns *= 1.4
    found = merged[kept]
    found[:, :2] = times[kept] + following_ns
    return found, max(_CELL_NS, cell_ns / 1.5)


def _merge(states: Floats, free: Floats, cell_ns: float) -> tuple[Floats, Floats]:
    """One state for each cell, the best score first: (S, 5) and its excess times (S, 2) to the same with fewer rows."""
    cells = (free // cell_ns).astype(np.int64)
    cells = cells[:, 0] * (1 << 32) + cells[:, 1]
    order = np.lexsort((-states[:, 2], cells))
    cells, states, free = cells[order], states[order], free[order]
    first = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]]))
    times = np.minimum.reduceat(free, first, axis=0)
    merged = states[first]
    order = np.argsort(-merged[:, 2], kind="stable")
    return merged[order], times[order]


def _frontier(times: Floats) -> list[int]:
    """Rows no earlier row matches in both times: of (S, 2), sorted by score."""
    kept: list[int] = []
    links: list[float] = []  # of those kept: later and later free links with earlier and earlier free devices
    devices: list[float] = []
    for i, (device, link) in enumerate(times.tolist()):
        at = bisect_right(links, link)
        if at and devices[at - 1] <= device:
            continue
        at = end = bisect_left(links, link)
        while end < len(links) and devices[end] >= device:
            end += 1
        links[at:end], devices[at:end] = [link], [device]
        kept.append(i)
        if device == link == 0.0:
            break
    return kept
