"""Congestion control for paths that lose packets: the window follows delay and delivery, and loss alone never narrows it.

aioquic's own Reno and CUBIC take every loss for congestion and collapse at 5 %. Here

* the window grows only while it is what holds us back, doubling each round trip until delay rises, then by two packets, and by
  ever less the nearer the queue is to its target;
* it is bounded by what the path delivered lately (the newest ten round trips' best) times the least round trip, and a quarter;
* where every round trip of late is longer than the least by more than a target, the window shrinks in proportion, once a
  round trip (cf. LEDBAT, RFC 6817). Where the queue is twice that, the path became slower: what is still delivered in a least
  round trip is the window then. The target is 25 ms, and 5 where packets are lost while the window is full: a short queue
  that overflows shows no more delay than that, and losses without any are the path's own. Losses never narrow it below the
  initial window;
* a window that is always full keeps a queue, and would in the end take it for the path: a few seconds after the least round trip
  was seen last the window is halved for two, so that it is seen again. Flows that share a queue see the least at the same
  moment, and so come to drain it together (cf. BBR's ProbeRTT);
* a circuit breaker: a path on which almost nothing arrives for seconds is sent the least that still probes it.

Times are seconds, as aioquic hands them over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.tls import Epoch

from protos.datagrams.loss import Losses

NAME = "headtail"

_TARGET_S = 0.025  # of queueing delay
_ACK_DELAY_S = 0.025  # that a receiver may add to any round trip
_LOSSY_TARGET_S, _LOSSY = 0.005, 0.02  # where so many packets are lost
_LEAST_WINDOW_S = 10.0  # for which the least round trip is remembered
_DRAIN_EVERY_S, _DRAIN_RTTS, _SAME_S = 4.0, 2.0, 0.001
_YIELD = 0.7
_LEAST_PACKETS, _INITIAL_PACKETS = 4, 10
_HEADROOM = 1.25
_BROKEN_SHARE, _BROKEN_S = 0.9, 3.0
_STARTING_GAIN, _GAIN = 2.0, 1.2  # of the pace, as Linux paces TCP
_GONE_RTTS = 1.25  # and twice a receiver's delay: then a packet is in the network no longer
_UNBOUNDED_BYTES = 100_000_000


_Number = tuple[Epoch, int]  # each epoch counts its packets from 0


@dataclass(slots=True)
class _Sent:
    """A packet whose fate is not known: what was delivered when it left, and whether the window was full."""

    at_s: float
    n_bytes: int
    delivered: int
    full: bool
    gone: bool = False


class DelayControl(QuicCongestionControl):
    """One connection's window.

    Whoever sends keeps to ``room_bytes`` and ``pace_bytes_per_s``. aioquic is told of a window without bounds: its own pacer would
    hold datagrams back until several small ones share a packet, and copies that share a packet are lost together.

    Attributes:
        window_bytes: what may be on its way.
        losses: the fates of its packets.
        sent: packets that left, counted up.
        heard_s: when a packet was acknowledged last.
    """

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.window_bytes, self.congestion_window = self.congestion_window, _UNBOUNDED_BYTES
        self.losses = Losses()
        self.sent = 0
        self.heard_s = 0.0
        self.rtt_s = 0.1
        self._packet_bytes = max_datagram_size
        self._starting = True
        self._delivered = 0
        self._on_way: dict[_Number, _Sent] = {}
        self._newer: deque[_Number] = deque()  # of packets that may still be in the network
        self._gone_bytes = 0  # of packets on their way that cannot be
        self._rtts: deque[tuple[float, float]] = deque()  # increasing: the front is the window's least
        self._lately: deque[tuple[float, float]] = deque()  # of the last round trip, and at least 100 ms
        self._rates: deque[tuple[float, float]] = deque()  # decreasing: the front is the window's best, bytes/s
        self._standing_s = 0.0
        self._rate = 0.0  # of the last packet's round trip, bytes/s
        self._acted_s = 0.0
        self._full_s = self._drained_s = -1.0  # when the window was full last; when it was last seen drained, or was drained
        self._draining: tuple[float, int] | None = None  # until when, and the window afterwards
        self._broken_since_s: float | None = None

    @property
    def least_rtt_s(self) -> float:
        """The least round trip of the last ten seconds; a tenth of a second before any."""
        return self._rtts[0][1] if self._rtts else 0.1

    def room_bytes(self, now: float) -> int:
        """What may leave now.

        Where acknowledgements are lost too, packets that left the network long ago wait for one; they do not count.
        """
        if self.losses.lately > _LOSSY:
            before_s = now - _GONE_RTTS * self.rtt_s - 2 * _ACK_DELAY_S
            while self._newer and ((sent := self._on_way.get(self._newer[0])) is None or sent.at_s < before_s):
                self._newer.popleft()
                if sent is not None:
                    sent.gone = True
                    self._gone_bytes += sent.n_bytes
        return self.window_bytes - self._in_network_bytes

    @property
    def _in_network_bytes(self) -> int:
        return self.bytes_in_flight - self._gone_bytes

    @property
    def pace_bytes_per_s(self) -> float:
        """How fast packets leave, evenly: a window in somewhat less than a round trip, since one that never fills never grows."""
        return (_STARTING_GAIN if self._starting else _GAIN) * self.window_bytes / max(self.rtt_s, 1e-3)

    def on_packet_sent(self, *, packet: QuicSentPacket) -> None:
        """See aioquic."""
        self.bytes_in_flight += packet.sent_bytes
        self.sent += 1
        full = self._in_network_bytes + 2 * self._packet_bytes > self.window_bytes
        number = packet.epoch, packet.packet_number
        self._on_way[number] = _Sent(packet.sent_time or 0.0, packet.sent_bytes, self._delivered, full)
        self._newer.append(number)

    def _settled(self, packet: QuicSentPacket) -> _Sent | None:
        """A packet's fate is known: it is on its way no longer."""
        self.bytes_in_flight -= packet.sent_bytes
        sent = self._on_way.pop((packet.epoch, packet.packet_number), None)
        if sent is not None and sent.gone:
            self._gone_bytes -= sent.n_bytes
        while self._newer and self._newer[0] not in self._on_way:
            self._newer.popleft()
        return sent

    def on_packet_acked(self, *, now: float, packet: QuicSentPacket) -> None:
        """See aioquic."""
        sent = self._settled(packet)
        self.heard_s = now
        self._delivered += packet.sent_bytes
        if packet.is_ack_eliciting:
            self.losses.add(packet.packet_number, lost=False)
        if sent is None:
            return
        if now > sent.at_s:
            self._rate = (self._delivered - sent.delivered) / (now - sent.at_s)
            self._note_rate(self._rate, now, full=sent.full)
        if sent.full:
            self._full_s = now
            if self._draining is None:
                share = packet.sent_bytes / self.window_bytes
                further = 2 * self._packet_bytes * share * max(0.0, 1 - self._standing_s / _TARGET_S)
                gain = packet.sent_bytes if self._starting else further
                self.window_bytes += int(gain)
                self._bound()

    def on_packets_expired(self, *, packets: Iterable[QuicSentPacket]) -> None:
        """See aioquic."""
        for packet in packets:
            self._settled(packet)

    def on_packets_lost(self, *, now: float, packets: Iterable[QuicSentPacket]) -> None:
        """See aioquic: it is counted, and narrows nothing but by the circuit breaker."""
        for packet in packets:
            self._settled(packet)
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
        self._narrow(max(_LEAST_PACKETS * self._packet_bytes, self.window_bytes // 2))

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
        standing_s = self._standing_s = min(each for _, each in self._lately) - self.least_rtt_s
        if rtt <= self.least_rtt_s + _SAME_S:
            self._drained_s = now
        self._drain(now)
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
            narrower = int(self.window_bytes * (1 - (1 - _YIELD) * min(1.0, over)))
            if over >= 1 and limited and self._rate:
                narrower = min(narrower, int(self._rate * (self.least_rtt_s + _TARGET_S)))
            if standing_s <= _TARGET_S:  # losses alone say that it is too wide
                narrower = max(narrower, min(self.window_bytes, _INITIAL_PACKETS * self._packet_bytes))
            self._narrow(narrower)

    def _drain(self, now: float) -> None:
        """Lets the queue run empty now and then."""
        if self._draining is not None:
            until_s, after_bytes = self._draining
            if now < until_s:
                return
            self._draining = None
            self.window_bytes = max(self.window_bytes, after_bytes)
            self._drained_s = self._acted_s = self._full_s = now  # nothing left meanwhile
        elif self._drained_s < 0 or now - self._full_s > 4 * self.rtt_s:
            self._drained_s = now
        elif now - self._drained_s > _DRAIN_EVERY_S and not self._starting:
            self._draining = now + _DRAIN_RTTS * self.rtt_s, int(self.window_bytes * _YIELD)
            self.window_bytes = max(self.window_bytes // 2, _LEAST_PACKETS * self._packet_bytes)

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
            self.window_bytes = min(self.window_bytes, int(most))

    def _narrow(self, to_bytes: int) -> None:
        self._starting = False
        self.window_bytes = max(to_bytes, _LEAST_PACKETS * self._packet_bytes)


_made: list[DelayControl] = []


def _make(*, max_datagram_size: int) -> DelayControl:
    control = DelayControl(max_datagram_size=max_datagram_size)
    _made[:] = [control]
    return control


def latest() -> DelayControl:
    """The window of the connection that was made just now; aioquic gives no other way to it."""
    return _made.pop()


register_congestion_control(NAME, _make)
