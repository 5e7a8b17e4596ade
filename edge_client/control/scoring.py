"""What a choice is worth: P(on time), expected accuracy, what it takes from other frames.

The device does one thing at a time. A job of length c that begins d after its frame's capture lets ``floor((d + c) / I) - 1``
frames of interval I be superseded, and starts the next one late; where even the best choice takes longer than I, device time
has a price: the slope, at I, of the concave hull over (time, value) of all choices. With that price two choices share the
device as the solution of a linear programme would share it, and the frame rate is adapted as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from edge_client.control.estimating.estimator import Estimator
from edge_client.control.options import DEVICE_NOISE, Option

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
        value: expected accuracy of this frame.
        device_ns: expected device time, the fallback's share included (the whole fallback where there is time to spare).
        displaced: expected accuracy of the frames that are superseded meanwhile.
        net: value, less what is displaced, the price of the device's time, and what P(on time) below the target costs.
        fallback_ns: when the local model should start; None: no use.
        refused: why it cannot be chosen; empty: it can.
    """

    option: Option
    expected_ns: float = 0.0
    p: float = 0.0
    p_all: float = 0.0
    value: float = 0.0
    device_ns: float = 0.0
    displaced: float = 0.0
    net: float = 0.0
    fallback_ns: int | None = None
    refused: str = ""


class Moment:
    """What holds for all options of one decision.

    Attributes:
        local_value: what the local model adds at most where the answer does not come.
        waited: what is in flight has been expected back for so long that something is wrong.
        roomy: the device has time for any option and the local model within one interval, so its time costs nothing.
    """

    __slots__ = (
        "base_ns", "deadline_ns", "drained_ns", "estimator", "interval_ns", "late_ns", "local", "local_value", "noise_ns", "now_ns",
        "roomy", "server_ns", "waited",
    )  # fmt: skip

    def __init__(
        self,
        estimator: Estimator,
        local: Option | None,
        now_ns: int,
        deadline_ns: int,
        interval_ns: float,
        late_ns: float,
        *,
        roomy: bool = False,
    ) -> None:
        """``late_ns``: how long after the frame's capture the device came free for it."""
        self.estimator = estimator
        self.local = local
        self.local_value = LOCAL_SURE * local.accuracy if local is not None else 0.0
        self.now_ns = now_ns
        self.deadline_ns = deadline_ns
        self.interval_ns = interval_ns
        self.late_ns = late_ns
        self.roomy = roomy
        estimator.expire(now_ns)
        self.base_ns = estimator.base_rtt_ns
        self.server_ns = estimator.server_ns
        self.noise_ns = estimator.scale_ns(0.0)
        self.drained_ns = estimator.drained_ns(now_ns)
        self.waited = estimator.overdue_ns(now_ns) > 2 * self.noise_ns

    def score_local(self, local: Option) -> Score:
        """The local model alone."""
        budget_ns = self.deadline_ns - self.now_ns
        p = LOCAL_SURE if local.high_ns <= budget_ns else (0.5 if local.mid_ns <= budget_ns else 0.0)
        return Score(local, local.mid_ns, p, p, p * local.accuracy, local.mid_ns)

    def too_late(self, least_ns: float, most_ns: float, n_bytes: tuple[float, float]) -> bool:
        """Whether no choice within these device times and sizes (least, most) has any hope of an answer in time."""
        reaches_ns = self.now_ns + least_ns + self.base_ns
        per_byte = self.estimator.ns_per_byte
        done_ns = max(self.drained_ns, reaches_ns) + per_byte * n_bytes[0] + self.server_ns
        slack_ns = self.deadline_ns - done_ns - DEVICE_NOISE[0][0] * (most_ns - least_ns)
        return self.estimator.lateness.is_never(slack_ns, self.noise_ns + per_byte * n_bytes[slack_ns < 0])

    def score_remote(self, o: Option, least: float = -inf) -> Score | None:
        """A payload sent, with the local model to fall back on where there is time for it; None if worth ``least`` at most."""
        service_ns = o.typical_bytes * self.estimator.ns_per_byte
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
        if p * o.accuracy + (1 - p) * self.local_value <= least:
            return None
        score = Score(o, done_ns - self.now_ns, p, p, p * o.accuracy, o.mid_ns)
        if self.local is not None and p < 0.999:
            self._fall_back(score, self.local, done_ns, spread_ns, scale_ns, service_ns)
        if service_ns > 1.45 * share_ns:
            score.value *= share_ns / service_ns
            score.p_all *= share_ns / service_ns
        return score

    def _fall_back(self, score: Score, local: Option, done_ns: float, spread_ns: float, scale_ns: float, service_ns: float) -> None:
        """Adds what the local model is worth to a frame whose answer has not come when it must start."""
        o, interval_ns = score.option, self.interval_ns
        start_ns = self.deadline_ns - local.high_ns
        # The head of a later frame has the device from its capture on: start before it rather than wait for it.
        phase_ns = (start_ns - self.now_ns + self.late_ns) % interval_ns
        if phase_ns < o.mid_ns and phase_ns < 0.5 * interval_ns:
            start_ns -= phase_ns
        if self.now_ns + o.high_ns > start_ns:
            return
        p_early = 0.0
        if not self.roomy:
            p_early = self.estimator.lateness.p_after_device(start_ns - done_ns, spread_ns, scale_ns, o.packets)
            if self.waited and p_early > 0.0:
                p_early *= self.estimator.p_unblocked(self.now_ns, start_ns - service_ns)
        # Failures come in runs: then every frame wants both its head and its fallback.
        room = interval_ns / (o.mid_ns + local.mid_ns)
        sure = LOCAL_SURE if room > 1 else LOCAL_SURE * room
        extra_ns, gain = (1 - p_early) * local.mid_ns, (1 - score.p) * sure * local.accuracy
        if o.mid_ns + extra_ns > interval_ns and gain * interval_ns < score.value * extra_ns:
            return  # that time is worth more to the frames behind
        score.fallback_ns = int(start_ns)
        score.p_all += (1 - score.p) * sure
        score.value += gain
        score.device_ns += extra_ns


def device_price(scores: Sequence[Score], interval_ns: float) -> tuple[float, bool]:
    """Value per ns of device time: 0 while the best choice takes less than an interval, else the hull's slope there.

    Also whether frames must be left out, because every choice worth having takes longer than an interval.
    """
    best = max(scores, key=lambda s: s.value, default=None)
    if best is None or best.device_ns <= interval_ns:
        return 0.0, False
    # The hull from (0, 0) upwards; the segment that crosses one interval.
    at_ns, at_value = 0.0, 0.0
    rest = [s for s in scores if s.value > 0 and s.device_ns > 0]
    while rest:
        steepest = max(rest, key=lambda s: ((s.value - at_value) / (s.device_ns - at_ns), s.device_ns))
        slope = (steepest.value - at_value) / (steepest.device_ns - at_ns)
        if slope <= 0:
            return 0.0, False
        if steepest.device_ns >= interval_ns:
            return slope, at_ns == 0.0
        at_ns, at_value = steepest.device_ns, steepest.value
        rest = [s for s in rest if s.device_ns > at_ns]
    return 0.0, False
