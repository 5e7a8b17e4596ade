"""What a choice is worth: P(on time), expected accuracy, what stands against it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.control.estimator import Estimator
from edge_client.control.options import Option

# The local model's p95 fits, so it makes it that often (other work on the device may stand in its way).
LOCAL_SURE = 0.98
# A frame may join the link's queue only if the queue then lasts no longer than so many frame intervals: on the mean
# each frame has one interval of link time, and what is beyond is borrowed from the next.
_LINK_INTERVALS = 1.4


@dataclass(slots=True)
class Score:
    """One option's, for one frame.

    Attributes:
        expected_ns: decision to answer, median.
        p: P(answer from the server before the deadline).
        p_all: the same with the fallback.
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

    __slots__ = ("base_ns", "deadline_ns", "drained_ns", "estimator", "interval_ns", "local", "now_ns", "server_ns")

    def __init__(self, estimator: Estimator, local: Option | None, now_ns: int, deadline_ns: int, interval_ns: float) -> None:
        self.estimator = estimator
        self.local = local
        self.now_ns = now_ns
        self.deadline_ns = deadline_ns
        self.interval_ns = interval_ns
        self.base_ns = estimator.base_rtt_ns
        self.server_ns = estimator.server_ns
        self.drained_ns = estimator.drained_ns(now_ns)

    def score_local(self, local: Option) -> Score:
        """The local model alone."""
        budget_ns = self.deadline_ns - self.now_ns
        p = LOCAL_SURE if local.high_ns <= budget_ns else (0.5 if local.mid_ns <= budget_ns else 0.0)
        value = local.accuracy * p / max(1.0, local.mid_ns / self.interval_ns)
        return Score(local, local.mid_ns, p, p, value)

    def score_remote(self, o: Option, *, smallest: bool) -> Score:
        """A payload sent, with the local model to fall back on where the device has time for it."""
        e = self.estimator
        service_ns = e.service_ns(o.typical_bytes)
        reaches_ns = self.now_ns + o.mid_ns + self.base_ns
        begins_ns = self.drained_ns if self.drained_ns > reaches_ns else reaches_ns
        queue_ns = begins_ns - reaches_ns + service_ns
        if queue_ns > _LINK_INTERVALS * self.interval_ns and not (smallest and queue_ns <= 1.01 * service_ns):
            return Score(o, refused="link")
        done_ns = begins_ns + service_ns + self.server_ns
        spare_ns = o.high_ns - o.mid_ns
        scale_ns = e.scale_ns(service_ns)
        p = e.p_within(self.deadline_ns - done_ns - spare_ns, scale_ns, o.packets)
        score = Score(o, done_ns - self.now_ns, p, p, p * o.accuracy)
        if self.local is not None:
            self._fall_back(score, self.local, done_ns + spare_ns, scale_ns)
        score.value /= max(1.0, o.mid_ns / self.interval_ns)
        return score

    def _fall_back(self, score: Score, local: Option, done_ns: float, scale_ns: float) -> None:
        start_ns = self.deadline_ns - local.high_ns
        o = score.option
        if self.now_ns + o.high_ns > start_ns:
            return
        p_early = self.estimator.p_within(start_ns - done_ns, scale_ns, o.packets)
        idle_ns = max(0.0, self.interval_ns - o.mid_ns)
        displaced = max(0.0, (1 - p_early) * local.mid_ns - idle_ns) / self.interval_ns
        gain = (1 - score.p) * LOCAL_SURE * local.accuracy - displaced * o.accuracy
        if gain >= 0:
            score.fallback_ns = int(start_ns)
            score.p_all += (1 - score.p) * LOCAL_SURE
            score.value += gain
