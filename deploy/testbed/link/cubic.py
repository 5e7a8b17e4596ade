"""The congestion window in packets: CUBIC (RFC 9438) with HyStart (RFC 9406's forerunner), in whole packets as Linux keeps it.

Whole packets matter: at a few per cent of loss the window is a handful, and 0.7 of five is three. Pure: time comes in
as an argument. The constants are those a Linux kernel has built in.
"""

from __future__ import annotations

INITIAL_WINDOW = 10
UNLIMITED = 1 << 30
_C, _BETA = 410 / 1024, 717 / 1024
_RENO_ACKS = 15 / 8  # a Reno flow of the same backoff gains one packet each time this many windows are acknowledged
_REFRESH_NS = 31_000_000  # the curve is evaluated this often while the window stands
_LOW_WINDOW, _MIN_SAMPLES = 16, 8
_TRAIN_GAP_NS = 2_000_000
_SETTLED_NS = 1_000_000_000  # delay samples this soon after a reduction say nothing of the empty path


class Cubic:
    """Window, threshold and CUBIC's clock."""

    __slots__ = (
        "_acked", "_carried", "_epoch_ns", "_evaluated_at", "_evaluated_ns", "_found", "_k_s", "_last_ack_ns", "_min_delay_ns",
        "_origin", "_pace", "_reno", "_round_min_ns", "_round_samples", "_round_start_ns", "_w_max", "cwnd", "ssthresh",
    )  # fmt: skip

    def __init__(self) -> None:
        self.cwnd = INITIAL_WINDOW
        self.ssthresh = UNLIMITED
        self._carried = 0  # acknowledged packets not yet turned into window
        self._forget()

    def _forget(self) -> None:
        self._w_max = self._min_delay_ns = 0
        self._epoch_ns = -1
        self._origin = self._k_s = 0.0
        self._reno = self._acked = 0
        self._pace = 0  # packets to be acknowledged for one more of window
        self._evaluated_at = self._evaluated_ns = 0
        self._found = False
        self._round_start_ns = self._last_ack_ns = self._round_min_ns = self._round_samples = 0

    def on_round(self, at_ns: int) -> None:
        """A round trip began."""
        self._round_start_ns = self._last_ack_ns = at_ns
        self._round_min_ns = self._round_samples = 0

    def on_rtt(self, rtt_ns: int, at_ns: int) -> None:
        """A round trip was measured on a packet sent once; HyStart may end slow start."""
        if self._epoch_ns >= 0 and at_ns - self._epoch_ns < _SETTLED_NS:
            return
        if self._min_delay_ns == 0 or rtt_ns < self._min_delay_ns:
            self._min_delay_ns = rtt_ns
        if self._found or self.cwnd >= self.ssthresh or self.cwnd < _LOW_WINDOW:
            return
        least = self._min_delay_ns
        if at_ns - self._last_ack_ns <= _TRAIN_GAP_NS:  # a train of closely spaced acknowledgements half a delay long
            self._last_ack_ns = at_ns
            if at_ns - self._round_start_ns > least / 2:
                self._leave_slow_start()
        if self._round_min_ns == 0 or rtt_ns < self._round_min_ns:
            self._round_min_ns = rtt_ns
        self._round_samples += 1
        if self._round_samples > _MIN_SAMPLES and self._round_min_ns > least + min(max(least / 8, 4e6), 16e6):
            self._leave_slow_start()

    def _leave_slow_start(self) -> None:
        self._found = True
        self.ssthresh = self.cwnd

    def on_acked(self, packets: int, at_ns: int) -> None:
        """``packets`` were acknowledged while the window was the limit, outside of recovery."""
        if self.cwnd < self.ssthresh:
            grown = min(self.cwnd + packets, self.ssthresh)
            packets -= grown - self.cwnd
            self.cwnd = grown
            if not packets:
                return
        self._evaluate(packets, at_ns)
        pace = self._pace
        if self._carried >= pace:
            self._carried = 0
            self.cwnd += 1
        self._carried += packets
        if self._carried >= pace:
            grown = self._carried // pace
            self._carried -= grown * pace
            self.cwnd += grown

    def _evaluate(self, packets: int, at_ns: int) -> None:
        cwnd = self.cwnd
        self._acked += packets
        if self._evaluated_at == cwnd and self._epoch_ns >= 0 and at_ns - self._evaluated_ns <= _REFRESH_NS:
            return
        self._evaluated_at, self._evaluated_ns = cwnd, at_ns
        if self._epoch_ns < 0:
            self._epoch_ns = at_ns
            self._acked, self._reno = packets, cwnd
            self._origin = float(max(cwnd, self._w_max))
            self._k_s = ((self._origin - cwnd) / _C) ** (1 / 3)
        t = (at_ns - self._epoch_ns + self._min_delay_ns) * 1e-9
        target = int(self._origin + _C * (t - self._k_s) ** 3)
        pace = cwnd // (target - cwnd) if target > cwnd else 100 * cwnd
        if self._w_max == 0:
            pace = min(pace, 20)  # nothing known of the path: 5 % a round trip
        per_packet = int(cwnd * _RENO_ACKS)
        gained = max(0, (self._acked - 1) // per_packet)
        self._acked -= gained * per_packet
        self._reno += gained
        if self._reno > cwnd:
            pace = min(pace, cwnd // (self._reno - cwnd))
        self._pace = max(pace, 2)

    def on_loss(self) -> None:
        """The threshold falls; the caller brings the window down to it."""
        self._w_max = int(self.cwnd * (1 + _BETA) / 2) if self.cwnd < self._w_max else self.cwnd
        self.ssthresh = max(int(self.cwnd * _BETA), 2)
        self._epoch_ns = -1
        self._carried = 0

    def on_timeout(self, *, again: bool) -> None:
        """A retransmission time-out; ``again``: of a recovery for which the threshold fell already."""
        if not again:
            self.on_loss()
        self._forget()  # what was learnt of the path no longer counts
        self.cwnd = 1
        self._carried = 0

    def on_start(self, idle_ns: int, now_ns: int) -> None:
        """Data leaves again after nothing was under way for ``idle_ns``: the curve's clock stood still."""
        if self._epoch_ns >= 0:
            self._epoch_ns = min(self._epoch_ns + idle_ns, now_ns)

    def on_idle(self, idle_ns: int, rto_ns: int) -> None:
        """Restart after idle, as Linux does it: half the window for each time-out that passed."""
        self.ssthresh = max(self.ssthresh, self.cwnd // 2 + self.cwnd // 4)
        floor = min(INITIAL_WINDOW, self.cwnd)
        while idle_ns > rto_ns and self.cwnd > floor:
            idle_ns -= rto_ns
            self.cwnd //= 2
        self.cwnd = max(self.cwnd, floor)

    def on_unused(self, used: int) -> None:
        """For a time-out's length no more than ``used`` packets were under way: the window comes half-way down to that."""
        used = max(used, INITIAL_WINDOW)
        if used < self.cwnd:
            self.ssthresh = max(self.ssthresh, self.cwnd // 2 + self.cwnd // 4)
            self.cwnd = (self.cwnd + used) // 2
