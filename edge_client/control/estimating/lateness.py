"""How much later than predicted answers come: what the estimator's simple model of the link gets wrong.

Two empirical distributions, and how often each applies. Residuals (jitter, a busy server) are kept in units of the frame's
own uncertainty; repairs (a lost packet, and what waits behind it) are kept as times, with their frequency per packet sent.
Residuals are remembered for seconds, the frequency of losses for a minute, because it changes more slowly than the bitrate.
"""

from __future__ import annotations

from bisect import bisect_right
from math import exp

from edge_client.control.options import DEVICE_NOISE
from edge_client.control.quantile import SlidingQuantile

# Four residuals that are believed until there are real ones: the worst of them keeps a fresh session careful.
_PRIOR_RESIDUALS = (-0.2, 0.1, 0.4, 1.5)
# Repairs per packet are believed to be this frequent, with the weight of this many packets.
_PRIOR_REPAIRS, _PRIOR_PACKETS = 0.3, 40.0
# A repair also holds back the frames behind: this share of a frame's exposure does not depend on its own size.
_HELD_BACK = 0.6
_LOSS_MEMORY_NS = 60_000_000_000
_STALE_NS = 1_500_000_000
_REFUSED_NS = 10_000_000_000
_WINDOW_SAMPLES = 96
# From this many repairs a packet on a link counts as lossy, once there were that many.
_LOSSY, _LEAST_REPAIRS = 0.003, 3
_LEAST_NOISE, _MOST_NOISE = DEVICE_NOISE[0], DEVICE_NOISE[-1]


class Lateness:
    """Of one session. P(on time) is read off what was measured: no quantile is ever a mean."""

    __slots__ = (
        "_body_size", "_counted_ns", "_frames", "_held_packets", "_late", "_odds", "_packets", "_prior_weight", "_repairs",
        "_residuals", "_stale", "_tail_size",
    )  # fmt: skip

    def __init__(self, window_ns: int) -> None:
        """``window_ns``: for how long residuals are remembered."""
        self._residuals = SlidingQuantile(size=_WINDOW_SAMPLES, age_ns=window_ns)
        self._repairs = SlidingQuantile(size=_WINDOW_SAMPLES, age_ns=_LOSS_MEMORY_NS)
        self._late = self._packets = self._frames = 0.0  # repaired frames, packets, frames: exponentially forgotten
        self._counted_ns = 0
        self._stale = True
        self._prior_weight = self._body_size = self._tail_size = self._odds = self._held_packets = 1.0

    def add(self, late_ns: float, scale_ns: float, packets: int, now_ns: int, *, repaired: bool) -> None:
        """A frame of ``packets`` packets came back; ``scale_ns`` is the unit of its residual."""
        self._count(packets, now_ns)
        if repaired:
            self._repairs.add(late_ns, now_ns)
            self._late += 1
        else:
            self._residuals.add(late_ns / scale_ns, now_ns)

    def add_missing(self, packets: int, now_ns: int) -> None:
        """A frame of ``packets`` packets was refused, or will never be answered: as bad as one that came much too late."""
        self._count(packets, now_ns)
        self._late += 1
        self._repairs.add(_REFUSED_NS, now_ns)

    def expire(self, now_ns: int) -> None:
        """Forgets what is too old."""
        if self._residuals.expire(now_ns) + self._repairs.expire(now_ns) or now_ns - self._counted_ns > _STALE_NS:
            self._count(0, now_ns)

    @property
    def repair_ns(self) -> float:
        """By how much a lost packet delays a frame, median; 0 where losses are rare."""
        if len(self._repairs) < _LEAST_REPAIRS or self._late < _LOSSY * self._packets:
            return 0.0
        return self._repairs.quantile(0.5, 0.0)

    def p_within(self, slack_ns: float, scale_ns: float, packets: int = 1) -> float:
        """P(a frame of ``packets`` packets comes back no later than ``slack_ns`` after its prediction)."""
        unit = slack_ns / scale_ns
        counts = bisect_right(self._residuals.ordered, unit), bisect_right(_PRIOR_RESIDUALS, unit)
        return self._p(*counts, bisect_right(self._repairs.ordered, slack_ns), packets)

    def p_after_device(self, slack_ns: float, spread_ns: float, scale_ns: float, packets: int) -> float:
        """The same for a frame still to pass the device, whose time is median + noise x ``spread_ns`` (p95 - median)."""
        residuals, repairs = self._residuals.ordered, self._repairs.ordered
        best_ns, worst_ns = slack_ns - _LEAST_NOISE * spread_ns, slack_ns - _MOST_NOISE * spread_ns
        best, worst = best_ns / scale_ns, worst_ns / scale_ns
        body, prior, tail = bisect_right(residuals, best), bisect_right(_PRIOR_RESIDUALS, best), bisect_right(repairs, best_ns)
        if (
            (not body or residuals[body - 1] <= worst)
            and (not prior or _PRIOR_RESIDUALS[prior - 1] <= worst)
            and (not tail or repairs[tail - 1] <= worst_ns)
        ):  # so it is almost always: no sample lies in between
            return self._p(body, prior, tail, packets) if body or prior or tail else 0.0
        # The mean over the noise's points; a probability is linear in the counts, so these are added up.
        body = prior = tail = 0
        for at in DEVICE_NOISE:
            late_ns = slack_ns - at * spread_ns
            unit = late_ns / scale_ns
            body += bisect_right(residuals, unit)
            prior += bisect_right(_PRIOR_RESIDUALS, unit)
            tail += bisect_right(repairs, late_ns)
        return self._p(body, prior, tail, packets) / len(DEVICE_NOISE) if body or prior or tail else 0.0

    def is_never(self, slack_ns: float, scale_ns: float) -> bool:
        """Whether ``p_within`` is zero whatever the packets: no frame was ever that early."""
        unit, residuals, repairs = slack_ns / scale_ns, self._residuals.ordered, self._repairs.ordered
        least = min(residuals[0], _PRIOR_RESIDUALS[0]) if residuals else _PRIOR_RESIDUALS[0]
        return unit < least and not (repairs and repairs[0] <= slack_ns)

    def _p(self, body: int, prior: int, tail: int, packets: int) -> float:
        """From how many of the residuals, of those believed beforehand, and of the repairs were no later."""
        if self._stale:
            self._freshen()
        odds = self._odds * ((1 - _HELD_BACK) * packets + self._held_packets)
        return ((body + self._prior_weight * prior) / self._body_size + odds * tail / self._tail_size) / (1.0 + odds)

    def weight_beyond(self, late_ns: float) -> float:
        """How much a guess counts for want of frames that were even later: 1 without any, ever less the more there are."""
        return 1.0 / (1.0 + len(self._repairs) - self._repairs.count_at_most(late_ns))

    # ------------------------------------------------------------------ inside

    def _count(self, packets: int, now_ns: int) -> None:
        """A frame of ``packets`` packets came back (0: none did, time passed)."""
        kept = exp(-max(0, now_ns - self._counted_ns) / _LOSS_MEMORY_NS)
        self._counted_ns = now_ns
        self._late *= kept
        self._packets = self._packets * kept + packets
        self._frames = self._frames * kept + (packets > 0)
        self._stale = True

    def _freshen(self) -> None:
        """Works out what probabilities need once for each change of the windows."""
        n = len(self._residuals.ordered)
        self._prior_weight = 4.0 / (4.0 + n)
        self._body_size = n + 4 * self._prior_weight + 0.25
        self._tail_size = len(self._repairs.ordered) + 1.0
        self._odds = (self._late + _PRIOR_REPAIRS) / (self._packets + _PRIOR_PACKETS)
        self._held_packets = _HELD_BACK * (self._packets + 2.0) / (self._frames + 1.0)
        self._stale = False
