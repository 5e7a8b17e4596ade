"""Congestion control for paths that lose packets: the window follows delay and delivery, and loss alone never narrows it.

aioquic's own Reno and CUBIC take every loss for congestion and collapse at 5 %. Here

* the window grows only while it is what holds us back, doubling each round trip until delay rises, then by two packets;
* it is bounded by what the path delivered lately (the newest ten round trips' best) times the least round trip, and a quarter;
* where every round trip of late is longer than the least by more than a target, the window shrinks in proportion, once a
  round trip (cf. LEDBAT, RFC 6817). The target is 25 ms, and 5 where packets are lost while the window is full: a short queue
  that overflows shows no more delay than that, and losses without any are the path's own. Losses never narrow it below the
  initial window;
* a window that is always full keeps a queue, and would in the end take it for the path: every few seconds it is halved for two
  round trips, so that the least is seen (cf. BBR's ProbeRTT);
* a circuit breaker: a path on which almost nothing arrives for seconds is sent the least that still probes it.

Times are seconds, as aioquic hands them over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket

from protos.datagrams.loss import Losses

NAME = "headtail"

_TARGET_S = 0.025  # of queueing delay
_ACK_DELAY_S = 0.025  # that a receiver may add to any round trip
_LOSSY_TARGET_S, _LOSSY = 0.005, 0.02  # where so many packets are lost
_LEAST_WINDOW_S = 10.0  # for which the least round trip is remembered
_DRAIN_EVERY_S, _DRAIN_RTTS = 4.0, 2.0
_YIELD = 0.7
_LEAST_PACKETS, _INITIAL_PACKETS = 4, 10
_HEADROOM = 1.25
_BROKEN_SHARE, _BROKEN_S = 0.9, 3.0


class DelayControl(QuicCongestionControl):
    """One connection's window.

    Attributes:
        losses: the fates of its packets.
        sent: packets that left, counted up.
        heard_s: when a packet was acknowledged last.
    """

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.losses = Losses()
        self.sent = 0
        self.heard_s = 0.0
        self.rtt_s = 0.1
        self._packet_bytes = max_datagram_size
        self._starting = True
        self._delivered = 0
        self._on_way: dict[int, tuple[int, bool]] = {}  # packet to what was delivered when it left, and whether the window was full
        self._rtts: deque[tuple[float, float]] = deque()  # increasing: the front is the window's least
        self._lately: deque[tuple[float, float]] = deque()  # of the last round trip, and at least 100 ms
        self._rates: deque[tuple[float, float]] = deque()  # decreasing: the front is the window's best, bytes/s
        self._acted_s = 0.0
        self._full_s = self._drained_s = -1.0  # when the window was full last; when it was last seen drained, or was drained
        self._draining: tuple[float, int] | None = None  # until when, and the window afterwards
        self._broken_since_s: float | None = None

    @property
    def least_rtt_s(self) -> float:
        """The least round trip of the last ten seconds; a tenth of a second before any."""
        return self._rtts[0][1] if self._rtts else 0.1

    @property
    def room_bytes(self) -> int:
        """What may leave now."""
        return self.congestion_window - self.bytes_in_flight

    @property
    def pace_bytes_per_s(self) -> float:
        """How fast the window empties, evenly spread over a round trip."""
        return self.congestion_window / max(self.rtt_s, 1e-3)

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """See aioquic."""
        self.bytes_in_flight += packet.sent_bytes
        self.sent += 1
        full = self.bytes_in_flight + 2 * self._packet_bytes > self.congestion_window
        self._on_way[packet.packet_number] = (self._delivered, full)

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        """See aioquic."""
        self.bytes_in_flight -= packet.sent_bytes
        self.heard_s = now
        self._delivered += packet.sent_bytes
        if packet.is_ack_eliciting:
            self.losses.add(packet.packet_number, lost=False)
        before, full = self._on_way.pop(packet.packet_number, (self._delivered, False))
        elapsed_s = now - (packet.sent_time or now)
        if elapsed_s > 0:
            self._note_rate((self._delivered - before) / elapsed_s, now, full=full)
        if full:
            self._full_s = now
            if self._draining is None:
                share = packet.sent_bytes / self.congestion_window
                gain = packet.sent_bytes if self._starting else 2 * self._packet_bytes * share
                self.congestion_window += int(gain)
                self._bound()

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """See aioquic."""
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            self._on_way.pop(packet.packet_number, None)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """See aioquic: it is counted, and narrows nothing but by the circuit breaker."""
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            self._on_way.pop(packet.packet_number, None)
            if packet.is_ack_eliciting:
                self.losses.add(packet.packet_number, lost=True)
        if self.losses.seen < _BROKEN_SHARE or self.losses.counted < 20:
            self._broken_since_s = None
        elif self._broken_since_s is None:
            self._broken_since_s = now
        elif now - self._broken_since_s > _BROKEN_S:
            self._narrow(_LEAST_PACKETS * self._packet_bytes)

    def on_persistent_congestion(self) -> None:
        """See aioquic: whole round trips without anything; what was learnt of the path is no longer true."""
        self._rates.clear()
        self._narrow(max(_LEAST_PACKETS * self._packet_bytes, self.congestion_window // 2))

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """See aioquic."""
        self.rtt_s = 0.875 * self.rtt_s + 0.125 * rtt if self._rtts else rtt
        while self._rtts and self._rtts[-1][1] >= rtt:
            self._rtts.pop()
        self._rtts.append((now, rtt))
        while now - self._rtts[0][0] > _LEAST_WINDOW_S:
            self._rtts.popleft()
        self._lately.append((now, rtt))
        while now - self._lately[0][0] > max(self.rtt_s, 0.1):
            self._lately.popleft()
        standing_s = min(each for _, each in self._lately) - self.least_rtt_s
        self._drain(now, standing_s)
        if self._draining is None and now - self._acted_s > self.rtt_s:
            self._yield(now, standing_s)

    def _yield(self, now: float, standing_s: float) -> None:
        """Narrows the window where a queue stands."""
        limited = now - self._full_s <= 2 * self.rtt_s
        lossy = limited and self.losses.counted >= 20 and self.losses.lately > _LOSSY
        target_s = _LOSSY_TARGET_S if lossy else _TARGET_S
        # A receiver may sit on an acknowledgement: only what is beyond that, or stands in every round trip, is the path's.
        over = (standing_s - target_s) / target_s
        if over > 0 and (len(self._lately) > 2 or standing_s > target_s + _ACK_DELAY_S):
            self._acted_s = now
            narrower = int(self.congestion_window * (1 - (1 - _YIELD) * min(1.0, over)))
            if standing_s <= _TARGET_S:  # losses alone say that it is too wide
                narrower = max(narrower, min(self.congestion_window, _INITIAL_PACKETS * self._packet_bytes))
            self._narrow(narrower)

    def _drain(self, now: float, standing_s: float) -> None:
        """Lets the queue run empty now and then."""
        if self._draining is not None:
            until_s, window_bytes = self._draining
            if now < until_s:
                return
            self._draining = None
            self.congestion_window = max(self.congestion_window, window_bytes)
            self._drained_s = self._acted_s = self._full_s = now  # nothing left meanwhile
        elif standing_s < _LOSSY_TARGET_S or self._drained_s < 0 or now - self._full_s > 4 * self.rtt_s:
            self._drained_s = now
        elif now - self._drained_s > _DRAIN_EVERY_S and not self._starting:
            self._draining = now + _DRAIN_RTTS * self.rtt_s, int(self.congestion_window * _YIELD)
            self.congestion_window = max(self.congestion_window // 2, _LEAST_PACKETS * self._packet_bytes)

    def _note_rate(self, rate: float, now: float, *, full: bool) -> None:
        # A sender that had nothing more to send has not seen what the path can do; more than the best is news all the same.
        if not full and self._rates and rate < self._rates[0][1]:
            return
        while self._rates and self._rates[-1][1] <= rate:
            self._rates.pop()
        self._rates.append((now, rate))
        while now - self._rates[0][0] > 10 * max(self.rtt_s, 0.1) and len(self._rates) > 1:
            self._rates.popleft()

    def _bound(self) -> None:
        if not self._starting and self._rates:
            most = _HEADROOM * self._rates[0][1] * (self.least_rtt_s + _ACK_DELAY_S) + _LEAST_PACKETS * self._packet_bytes
            self.congestion_window = min(self.congestion_window, int(most))

    def _narrow(self, window_bytes: int) -> None:
        self._starting = False
        self.congestion_window = max(window_bytes, _LEAST_PACKETS * self._packet_bytes)


_made: list[DelayControl] = []


def _make(*, max_datagram_size: int) -> DelayControl:
    control = DelayControl(max_datagram_size=max_datagram_size)
    _made[:] = [control]
    return control


def latest() -> DelayControl:
    """The window of the connection that was made just now; aioquic gives no other way to it."""
    return _made.pop()


register_congestion_control(NAME, _make)
