"""What a choice is worth: P(on time), expected accuracy, what stands against it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.control.estimator import Estimator
from edge_client.control.options import Option

# The local model's p95 fits, so it makes it that often (other work on the device may stand in its way).
LOCAL_SURE = 0.98
# On the mean each frame may have this share of an interval of link time; what a frame takes beyond is borrowed from
# the next ones, and no more than so much may be borrowed.
_LINK_SHARE, _BORROWED = 0.95, 0.45


@dataclass(slots=True)
class Score:
    """One option's, for one frame.

    Attributes:
        expected_ns: decision to answer, median.
        p: P(answer from the server before the deadline).
        p_all: the same with the fallback, over all frames: those it displaces are never answered.
        value: expected accuracy, less what displaced frames would have brought.
        fallback_ns: when the local model should start; None: no use.
        refused: why it cannot be chosen; empty: it can.
    """

    option: Option
    expected_ns: float = 0.0
    p: float = 0.0
    p_all: float = 0.0
    value: float = 0.0
    fallback_ns: int | None = None
    refused: str = ""


class Moment:
    """What holds for all options of one decision."""

    __slots__ = ("base_ns", "deadline_ns", "drained_ns", "estimator", "interval_ns", "local", "noise_ns", "now_ns", "server_ns")

    def __init__(self, estimator: Estimator, local: Option | None, now_ns: int, deadline_ns: int, interval_ns: float) -> None:
        self.estimator = estimator
        self.local = local
        self.now_ns = now_ns
        self.deadline_ns = deadline_ns
        self.interval_ns = interval_ns
        estimator.expire(now_ns)
        self.base_ns = estimator.base_rtt_ns
        self.server_ns = estimator.server_ns
        self.noise_ns = estimator.scale_ns(0.0)
        self.drained_ns = estimator.drained_ns(now_ns)

    def score_local(self, local: Option) -> Score:
        """The local model alone."""
        budget_ns = self.deadline_ns - self.now_ns
        p = LOCAL_SURE if local.high_ns <= budget_ns else (0.5 if local.mid_ns <= budget_ns else 0.0)
        kept = min(1.0, self.interval_ns / max(1.0, local.mid_ns))
        return Score(local, local.mid_ns, p, p * kept, p * kept * local.accuracy)

    def score_remote(self, o: Option) -> Score:
        """A payload sent, with the local model to fall back on where the device has time for it."""
        e = self.estimator
        service_ns = e.service_ns(o.typical_bytes)
        reaches_ns = self.now_ns + o.mid_ns + self.base_ns
        begins_ns = self.drained_ns if self.drained_ns > reaches_ns else reaches_ns
        share_ns = _LINK_SHARE * self.interval_ns
        if begins_ns - reaches_ns + min(service_ns - share_ns, 0.0) > _BORROWED * self.interval_ns:
            return Score(o, refused="link")
        done_ns = begins_ns + service_ns + self.server_ns
        spare_ns = o.high_ns - o.mid_ns
        scale_ns = self.noise_ns + service_ns
        p = e.p_within(self.deadline_ns - done_ns - spare_ns, scale_ns, o.packets)
        score = Score(o, done_ns - self.now_ns, p, p, p * o.accuracy)
        if self.local is not None:
            self._fall_back(score, self.local, done_ns + spare_ns, scale_ns)
        displaces = max(1.0, o.mid_ns / self.interval_ns, service_ns / share_ns if service_ns > 1.45 * share_ns else 1.0)
        score.value /= displaces
        score.p_all /= displaces
        return score

    def _fall_back(self, score: Score, local: Option, done_ns: float, scale_ns: float) -> None:
        """Adds what the local model is worth to a frame whose answer has not come when it must start."""
        o = score.option
        start_ns = self.deadline_ns - local.high_ns
        if self.now_ns + o.high_ns > start_ns:
            return
        if score.p > 0.999:
            score.fallback_ns = int(start_ns)
            return
        sure = self._local_in_time(start_ns, o.mid_ns, local)
        p_early = self.estimator.p_within(start_ns - done_ns, scale_ns, o.packets)
        idle_ns = max(0.0, self.interval_ns - o.mid_ns)
        displaced = max(0.0, (1 - p_early) * local.mid_ns - idle_ns) / self.interval_ns
        gain = (1 - score.p) * sure * local.accuracy - displaced * o.accuracy
        if gain >= 0:
            score.fallback_ns = int(start_ns)
            score.p_all += (1 - score.p) * sure
            score.value += gain

    def _local_in_time(self, start_ns: float, head_ns: float, local: Option) -> float:
        """P(a fallback due at ``start_ns`` ends in time): the head of a later frame may have the device just then."""
        turns, phase_ns = divmod(start_ns - self.now_ns, self.interval_ns)
        if turns < 1 or phase_ns >= head_ns:
            return LOCAL_SURE
        left_ns = self.deadline_ns - (start_ns + head_ns - phase_ns)
        if left_ns < local.mid_ns:
            return 0.5 * max(0.0, 1 - (local.mid_ns - left_ns) / max(1.0, 0.1 * local.mid_ns))
        spread_ns = max(1.0, local.high_ns - local.mid_ns)
        return min(LOCAL_SURE, 0.5 + 0.48 * (left_ns - local.mid_ns) / spread_ns)
