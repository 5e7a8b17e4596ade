"""What a choice is worth: P(on time), expected accuracy, and what it takes from the frames to come (see ``backlog``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import erf, inf

from edge_client.control.backlog import CELLS, Backlog, Row
from edge_client.control.estimating.estimator import Estimator
from edge_client.control.options import DEVICE_NOISE, Option
from protos.datagrams.loss import Redundancy

# The local model makes it so often at most, if it starts now, or later: other work on the device may then stand in its way.
_SURE_NOW, LOCAL_SURE = 0.998, 0.98
# The device works for a fallback only where that is worth so much of the local model's accuracy. One that was to start at once and
# is found to be worth less then has no second chance, so it must promise more.
LEAST_GAIN = 0.02
# A fallback that should begin before a frame's head does begins so much before the frame is captured.
_LEAD_NS = 2e6
# Of a normal distribution, in units of (p95 - median): where 0.998 are reached; and the root of two deviations.
_SURE_AT, _ROOT_2 = 1.75, 0.8597
# The latest start of the local model leaves it so much time beyond its median, in the same units.
_CAREFUL = 1.5
# On the mean each frame may have this share of an interval of link time; what a frame takes beyond is borrowed from
# the next ones, and no more than so much may be borrowed.
_LINK_SHARE, _BORROWED = 0.95, 0.45


@dataclass(slots=True)
class Score:
    """One option's, for one frame.

    Attributes:
        expected_ns: decision to answer, median.
        p: P(answer from the server before the deadline).
        p_all: the same with the fallback.
        value: expected accuracy of this frame.
        later: what the frames to come lose by this choice.
        net: value, less ``later`` and what P(on time) below the target costs.
        fallback_ns: when the local model should start; None: no use.
        refused: why it cannot be chosen; empty: it can.
    """

    option: Option
    expected_ns: float = 0.0
    p: float = 0.0
    p_all: float = 0.0
    value: float = 0.0
    later: float = 0.0
    net: float = 0.0
    fallback_ns: int | None = None
    refused: str = ""


class Moment:
    """What holds for all options of one decision.

    Attributes:
        local_value: what the local model adds at most where the answer does not come.
        target, fine: P(on time) asked for, and what a choice pays for each unit it lacks of it.
        waited: what is in flight has been expected back for so long that something is wrong.
        redundancy, frame_bytes: over datagrams, the path's losses, and what a frame should cost with its parity.
        roomy: the device has time for any option and the local model within one interval, so its time costs nothing.
    """

    __slots__ = (
        "backlog",
        "base_ns",
        "deadline_ns",
        "drained_ns",
        "estimator",
        "fine",
        "frame_bytes",
        "interval_ns",
        "late_ns",
        "local",
        "local_value",
        "noise_ns",
        "now_ns",
        "redundancy",
        "roomy",
        "server_ns",
        "since_ns",
        "stretch",
        "target",
        "usual_ns",
        "waited",
    )  # fmt: skip

    def __init__(
        self,
        estimator: Estimator,
        local: Option | None,
        now_ns: int,
        deadline_ns: int,
        backlog: Backlog,
        late_ns: float,
        *,
        target: float,
        fine: float,
        usual_ns: float = 0.0,
        roomy: bool = False,
        since_ns: float | None = None,
        stretch: float = 1.0,
        redundancy: Redundancy | None = None,
        frame_bytes: float = inf,
    ) -> None:
        """What holds now.

        ``late_ns``: how long after the frame's capture the device came free; ``usual_ns``: what a frame's job takes lately;
        ``since_ns``: time since its capture, where the device was kept by others, too; ``stretch``: device time that the frames to
        come lose by a job, over what it takes: more than 1 where the device is shared.
        """
        self.backlog = backlog
        self.target, self.fine = target, fine
        self.usual_ns = usual_ns
        self.estimator = estimator
        self.local = local
        self.redundancy, self.frame_bytes = redundancy, frame_bytes
        self.local_value = _SURE_NOW * local.accuracy if local is not None else 0.0
        self.now_ns = now_ns
        self.deadline_ns = deadline_ns
        self.interval_ns = backlog.interval_ns
        self.late_ns = late_ns
        self.since_ns = late_ns if since_ns is None else since_ns
        self.stretch = stretch
        self.roomy = roomy
        estimator.expire(now_ns)
        self.base_ns = estimator.base_rtt_ns
        self.server_ns = estimator.server_ns
        self.noise_ns = estimator.scale_ns(0.0)
        self.drained_ns = estimator.drained_ns(now_ns)
        self.waited = estimator.overdue_ns(now_ns) > 2 * self.noise_ns

    def p_local(self, budget_ns: float) -> float:
        """P(the local model ends within so much time)."""
        local = self.local
        if local is None:
            return 0.0
        spare_ns, spread_ns = budget_ns - local.mid_ns, local.high_ns - local.mid_ns
        if spare_ns >= _SURE_AT * spread_ns:
            return _SURE_NOW
        if spread_ns <= 0.0:
            return 0.0
        return min(_SURE_NOW, 0.5 + 0.5 * erf(spare_ns / (_ROOT_2 * spread_ns)))

    def score_local(self, local: Option) -> Score:
        """The local model alone."""
        p = self.p_local(self.deadline_ns - self.now_ns)
        later = 0.0 if self.roomy else self.takes(local.mid_ns, local.high_ns)
        return self._settled(Score(local, local.mid_ns, p, p, p * local.accuracy, later))

    def _settled(self, score: Score) -> Score:
        """With its net value."""
        net = score.value - score.later
        score.net = net - self.fine * (self.target - score.p_all) if score.p_all < self.target else net
        return score

    def takes(self, mid_ns: float, high_ns: float) -> float:
        """What the frames to come lose by a job with these quantiles."""
        stretch = self.stretch
        return self.backlog.expected(self.late_ns + stretch * mid_ns - self.interval_ns, stretch * (high_ns - mid_ns))

    def too_late(self, least_ns: float, most_ns: float, n_bytes: tuple[float, float]) -> bool:
        """Whether no choice within these device times and sizes (least, most) has any hope of an answer in time."""
        reaches_ns = self.now_ns + least_ns + self.base_ns
        per_byte = self.estimator.ns_per_byte
        done_ns = max(self.drained_ns, reaches_ns) + per_byte * n_bytes[0] + self.server_ns
        slack_ns = self.deadline_ns - done_ns - DEVICE_NOISE[0] * (most_ns - least_ns)
        return self.estimator.lateness.is_never(slack_ns, self.noise_ns + per_byte * n_bytes[slack_ns < 0])

    def sent(self, o: Option) -> tuple[float, float]:
        """Of a choice: the time that the link needs for it, and the chance that it arrives; a stream repairs what it loses."""
        if self.redundancy is None:
            return o.typical_bytes * self.estimator.ns_per_byte, 1.0
        n_bytes, p = self.redundancy.cost(o.typical_bytes, self.frame_bytes)
        return n_bytes * self.estimator.ns_per_byte, p

    def score_remote(self, o: Option, least: float = -inf) -> Score | None:
        """A payload sent, with the local model to fall back on where there is time for it; None if worth ``least`` at most."""
        service_ns, arrives = self.sent(o)
        reaches_ns = self.now_ns + o.mid_ns + self.base_ns
        begins_ns = self.drained_ns if self.drained_ns > reaches_ns else reaches_ns
        share_ns = _LINK_SHARE * self.interval_ns
        if begins_ns - reaches_ns + min(service_ns - share_ns, 0.0) > _BORROWED * self.interval_ns:
            return Score(o, refused="link")
        done_ns = begins_ns + service_ns + self.server_ns
        scale_ns = self.noise_ns + service_ns
        spread_ns = o.high_ns - o.mid_ns
        p = self.estimator.lateness.p_after_device(self.deadline_ns - done_ns, spread_ns, scale_ns, o.packets)
        if self.waited and p > 0.0:  # what is stuck in front must come loose in time, too
            p *= self.estimator.p_unblocked(self.now_ns, self.deadline_ns - service_ns)
        p *= arrives
        most = p * o.accuracy + (1 - p) * self.local_value
        if most <= least:
            return None
        later = 0.0 if self.roomy else self.takes(o.mid_ns, o.high_ns)
        if most - later <= least:
            return None
        score = Score(o, done_ns - self.now_ns, p, p, p * o.accuracy, later)
        if self.local is not None and p < 0.999:
            self._fall_back(score, self.local, done_ns, scale_ns, service_ns)
        if service_ns > 1.45 * share_ns:
            score.value *= share_ns / service_ns
            score.p_all *= share_ns / service_ns
        return self._settled(score)

    def _fall_back(self, score: Score, local: Option, done_ns: float, scale_ns: float, service_ns: float) -> None:
        """Adds what the local model is worth to a frame whose answer has not come when it must start.

        As late as it can, so that most answers make it superfluous; or at once, where that would hold up the frames behind.
        """
        o, interval_ns, now_ns = score.option, self.interval_ns, self.now_ns
        missed, ready_ns = 1 - score.p, now_ns + o.high_ns
        spread_ns = local.high_ns - local.mid_ns
        latest_ns = self.deadline_ns - local.mid_ns - _CAREFUL * spread_ns
        since_ns = latest_ns - now_ns + self.since_ns
        # The job of a later frame has the device from its capture on: start before it rather than wait for it.
        phase_ns = since_ns % interval_ns
        before_ns = latest_ns - phase_ns - _LEAD_NS
        if self.roomy:
            if since_ns >= interval_ns and phase_ns < o.mid_ns and phase_ns < 0.5 * interval_ns:
                latest_ns = before_ns
            if ready_ns <= latest_ns:
                self._add(score, latest_ns, LOCAL_SURE, 0.0)
            return
        most, best = 0.0, None
        # In the latest moment it waits for the job that began meanwhile, if one did.
        waits_ns = max(phase_ns, o.mid_ns, self.usual_ns) if since_ns >= interval_ns else phase_ns
        for start_ns, begins_ns in ((latest_ns, waits_ns), (before_ns, interval_ns - _LEAD_NS)):
            if ready_ns > start_ns:
                continue
            p_local = LOCAL_SURE
            if begins_ns > phase_ns and start_ns == latest_ns:
                p_local = min(LOCAL_SURE, self.p_local(local.mid_ns + _CAREFUL * spread_ns + phase_ns - begins_ns))
            p_early = self.estimator.lateness.p_after_device(start_ns - done_ns, o.high_ns - o.mid_ns, scale_ns, o.packets)
            if self.waited and p_early > 0.0:
                p_early *= self.estimator.p_unblocked(now_ns, start_ns - service_ns)
            taken_ns, taken_spread_ns = self.stretch * local.mid_ns, self.stretch * spread_ns
            later = (1 - p_early) * self.backlog.expected(begins_ns + taken_ns - interval_ns, taken_spread_ns)
            gain = missed * p_local * local.accuracy - later
            if gain > most:
                most, best = gain, (start_ns, p_local, later)
        p_local = self.p_local(self.deadline_ns - now_ns - o.mid_ns)
        later = self.takes(o.mid_ns + local.mid_ns, o.mid_ns + local.high_ns) - score.later
        if missed * p_local * local.accuracy - later > max(most, 2 * LEAST_GAIN * local.accuracy):
            best = now_ns + o.mid_ns, p_local, later
        if best is not None:
            self._add(score, *best)

    def _add(self, score: Score, start_ns: float, p_local: float, later: float) -> None:
        """Counts a fallback in."""
        score.fallback_ns = int(start_ns)
        score.p_all += (1 - score.p) * p_local
        score.value += (1 - score.p) * p_local * self.local.accuracy if self.local is not None else 0.0
        score.later += later

    # ------------------------------------------------------------------ frames to come

    def rows(self, options: Iterable[Option]) -> list[Row]:
        """What a frame to come could be given, for ``Backlog.sweep``: the local model, and these, alone and backed by it."""
        fine, target = self.fine, self.target
        span_ns, stretch = self.deadline_ns - self.now_ns + self.since_ns, self.stretch
        lates_ns = [cell * self.interval_ns / CELLS for cell in range(CELLS + 1)]
        local = self.local
        ends = [self.p_local(span_ns - late_ns) for late_ns in lates_ns]
        found: list[Row] = []
        if local is not None:
            rewards = [p * local.accuracy - fine * max(0.0, target - p) for p in ends]
            found.append((stretch * local.mid_ns, stretch * (local.high_ns - local.mid_ns), rewards))
        for o in options:
            spread_ns = o.high_ns - o.mid_ns
            service_ns, arrives = self.sent(o)
            spare_ns = span_ns - o.mid_ns - self.base_ns - service_ns - self.server_ns
            alone, backed = [], []
            for late_ns in lates_ns:
                p = arrives * self.estimator.lateness.p_within(spare_ns - late_ns, self.noise_ns + service_ns, o.packets)
                alone.append(p * o.accuracy - fine * max(0.0, target - p))
                if local is not None:
                    then = self.p_local(span_ns - late_ns - o.mid_ns)
                    both = p + (1 - p) * then
                    backed.append(p * o.accuracy + (1 - p) * then * local.accuracy - fine * max(0.0, target - both))
            found.append((stretch * o.mid_ns, stretch * spread_ns, alone))
            if local is not None:
                found.append((stretch * (o.mid_ns + local.mid_ns), stretch * (local.high_ns - local.mid_ns), backed))
        return found


def most_hopeful(scores: Iterable[Score]) -> Score | None:
    """Of what may be sent, what is expected back first."""
    open_ = [s for s in scores if not s.refused and s.option.n_bytes]
    return min(open_, key=lambda s: s.expected_ns, default=None)
