"""The congestion window of CUBIC (RFC 9438) with HyStart's delay exit, in packets. Pure."""

from __future__ import annotations

INITIAL_WINDOW = 10.0
_C, _BETA = 0.4, 0.7


class Cubic:
    """Window, threshold and CUBIC's clock."""

    __slots__ = ("_epoch_ns", "_k_s", "_origin", "_reno", "_round_samples", "_w_max", "cwnd", "ssthresh")

    def __init__(self) -> None:
        self.cwnd = INITIAL_WINDOW
        self.ssthresh = 1e9
        self._w_max = 0.0
        self._epoch_ns = -1
        self._origin = self._k_s = self._reno = 0.0
        self._round_samples = 0

    def on_round(self) -> None:
        """A round trip began."""
        self._round_samples = 0

    def on_rtt(self, rtt_ns: float, min_rtt_ns: float) -> None:
        """HyStart: slow start ends when a round's delay has grown noticeably."""
        self._round_samples += 1
        if (
            16 <= self.cwnd < self.ssthresh
            and self._round_samples >= 8
            and rtt_ns >= min_rtt_ns + min(max(min_rtt_ns / 8, 4e6), 16e6)
        ):
            self.ssthresh = self.cwnd

    def on_acked(self, packets: int, at_ns: int, srtt_ns: float, max_pipe: int) -> None:
        """``packets`` were acknowledged; ``max_pipe`` were under way at most in the last round."""
        cwnd = self.cwnd
        if cwnd < self.ssthresh:
            if cwnd < 2 * max_pipe:
                self.cwnd = cwnd + packets
            return
        if max_pipe < int(cwnd):
            self._epoch_ns = -1  # the application is the limit: no growth, and the clock stands still
            return
        if self._epoch_ns < 0:
            self._epoch_ns = at_ns
            self._reno = cwnd
            if cwnd < self._w_max:
                self._k_s, self._origin = ((self._w_max - cwnd) / _C) ** (1 / 3), self._w_max
            else:
                self._k_s, self._origin = 0.0, cwnd
        t = (at_ns - self._epoch_ns + srtt_ns) * 1e-9
        target = min(self._origin + _C * (t - self._k_s) ** 3, 1.5 * cwnd)
        self._reno += packets * 3 * (1 - _BETA) / (1 + _BETA) / cwnd
        self.cwnd = max(cwnd + packets * ((target - cwnd) / cwnd if target > cwnd else 0.01 / cwnd), self._reno)

    def on_loss(self) -> None:
        """Fast recovery begins."""
        self._w_max = self.cwnd * (1 + _BETA) / 2 if self.cwnd < self._w_max else self.cwnd
        self.cwnd = self.ssthresh = max(2.0, self.cwnd * _BETA)
        self._epoch_ns = -1

    def on_timeout(self) -> None:
        """A retransmission time-out."""
        self._w_max = self.cwnd
        self.ssthresh = max(2.0, self.cwnd * _BETA)
        self.cwnd = 1.0
        self._epoch_ns = -1

    def on_idle(self, idle_ns: int, rto_ns: int) -> None:
        """Slow start after idle, as Linux does it: half the window for each time-out that passed."""
        self.ssthresh = max(self.ssthresh, 0.75 * self.cwnd)
        floor = min(INITIAL_WINDOW, self.cwnd)
        while idle_ns > rto_ns and self.cwnd > floor:
            idle_ns -= rto_ns
            self.cwnd /= 2
        self.cwnd = max(self.cwnd, floor)
        self._epoch_ns = -1
