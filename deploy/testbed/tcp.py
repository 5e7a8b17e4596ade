"""One direction of a TCP connection as the application sees it: when do the bytes written now arrive?

Modelled: segments, CUBIC, selective acknowledgement with RACK loss detection and the tail loss probe (RFC 8985),
retransmission time-outs with back-off (RFC 6298, Linux's 200 ms floor), restart after idle, head-of-line blocking.
Left out: handshake, receive window, delayed acknowledgements, reordering, ECN, spurious time-outs (F-RTO is taken to
undo them all) and the capacity that acknowledgements use.

The model is lazy. A packet's fate is known the moment it is sent, so the sender needs waking only while data waits
for the window or something is lost; acknowledgements of an undisturbed frame are worked off at the next write.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from deploy.testbed.cubic import Cubic
from deploy.testbed.link import LOST, Link
from deploy.testbed.trace import NEVER_NS

MSS_BYTES = 1448
HEADER_BYTES = 52
_RTO_MIN_NS = 200_000_000
_RTO_MAX_NS = 60_000_000_000
_FIRST_RTO_NS = 1_000_000_000
_DUP_THRESHOLD = 3


class _Message:
    __slots__ = ("arrival_ns", "deliver", "missing")

    def __init__(self, missing: int, deliver: Callable[[int], None]) -> None:
        self.missing = missing
        self.arrival_ns = 0
        self.deliver = deliver


class _Packet:
    __slots__ = ("ack_ns", "arrived", "lost", "message", "n_bytes", "retransmitted", "sent_ns", "seq", "xid")

    def __init__(self, n_bytes: int, message: _Message, seq: int) -> None:
        self.n_bytes = n_bytes
        self.message = message
        self.seq = seq
        self.xid = -1
        self.sent_ns = self.ack_ns = 0
        self.arrived = False  # some transmission of it reached the receiver
        self.lost = False  # no acknowledgement of the newest transmission will come by itself
        self.retransmitted = False


class TcpFlow:
    """A sender, its path and the receiver's in-order delivery.

    Args:
        forward: the link the data takes; flows may share one.
        reverse_delay_ns: propagation of acknowledgements.
        ack_loss: share of acknowledgements lost; a later one covers for them.
        seed: of the acknowledgements' fate.

    The owner calls ``write``, and ``advance`` when ``wake_ns`` has come. ``deliver(arrival_ns)`` of a message is called
    as soon as its arrival is certain, that is at or before ``arrival_ns``.
    """

    __slots__ = (
        "_ack_loss", "_acks", "_backoff", "_cubic", "_forward", "_last_delivered_ns", "_last_sent_ns", "_lost", "_max_pipe",
        "_messages", "_min_rtt", "_out", "_pending", "_probed", "_rack_ns", "_rack_xid", "_recovery_seq", "_resend",
        "_reverse_delay", "_rng", "_round_xid", "_rttvar", "_sacked", "_seq", "_srtt", "_timer_ns", "_xid",
        "retransmits", "timeouts", "unsent_bytes", "wake_ns",
    )  # fmt: skip

    def __init__(self, forward: Link, *, reverse_delay_ns: int, ack_loss: float = 0.0, seed: int | str = 0) -> None:
        self._forward = forward
        self._reverse_delay = reverse_delay_ns
        self._ack_loss = ack_loss
        self._rng = random.Random(f"ack/{seed}")  # noqa: S311
        self._cubic = Cubic()
        self._pending: deque[_Packet] = deque()
        self._resend: deque[_Packet] = deque()
        self._out: dict[int, _Packet] = {}  # under way as far as the sender knows, by transmission, oldest first
        self._lost = 0  # of _out
        self._acks: deque[tuple[_Packet, int]] = deque()  # acknowledgements to come: packet, transmission
        self._messages: deque[_Message] = deque()
        self._seq = self._xid = self._round_xid = self._recovery_seq = 0
        self._max_pipe = 0
        self._probed = False
        self._sacked = 0  # acknowledged above the oldest hole
        self._rack_xid = -1
        self._rack_ns = NEVER_NS
        self._timer_ns = NEVER_NS
        self._srtt = self._rttvar = 0.0
        self._min_rtt = float(NEVER_NS)
        self._backoff = 0
        self._last_sent_ns = self._last_delivered_ns = 0
        self.wake_ns = NEVER_NS
        self.unsent_bytes = self.retransmits = self.timeouts = 0

    # ------------------------------------------------------------------ the owner's side

    def write(self, n_bytes: int, now_ns: int, deliver: Callable[[int], None]) -> None:
        """The application writes a message."""
        self._work_off(now_ns)
        if not self._out and not self._resend and self._srtt and now_ns - self._last_sent_ns > self._rto_ns():
            self._cubic.on_idle(now_ns - self._last_sent_ns, self._rto_ns())
        segments = max(1, -(-n_bytes // MSS_BYTES))
        message = _Message(segments, deliver)
        self._messages.append(message)
        seq, left = self._seq, n_bytes
        for _ in range(segments):
            self._pending.append(_Packet(min(left, MSS_BYTES), message, seq))
            left -= MSS_BYTES
            seq += 1
        self._seq = seq
        self.unsent_bytes += n_bytes
        self._transmit(now_ns)
        self._set_wake()

    def advance(self, now_ns: int) -> None:
        """Works off acknowledgements and timers up to ``now_ns``."""
        self._work_off(now_ns)
        if self._lost:
            if self._rack_ns <= now_ns:
                self._rack()
            elif self._timer_ns <= now_ns and not self._acks:
                self._on_timer(now_ns)
        self._transmit(now_ns)
        self._set_wake()

    @property
    def unacked_bytes(self) -> int:
        """Written and not yet acknowledged, as far as acknowledgements were worked off."""
        return self.unsent_bytes + sum(p.n_bytes for p in self._out.values()) + sum(p.n_bytes for p in self._resend)

    # ------------------------------------------------------------------ sending

    def _transmit(self, now_ns: int) -> None:
        if not self._resend and not self._pending:
            return
        room = max(1, int(self._cubic.cwnd)) - len(self._out)
        while room > 0:
            if self._resend:
                packet = self._resend.popleft()
            elif self._pending:
                packet = self._pending.popleft()
                self.unsent_bytes -= packet.n_bytes
            else:
                break
            self._put_on_link(packet, now_ns)
            room -= 1
        self._arm(now_ns)

    def _put_on_link(self, packet: _Packet, now_ns: int) -> None:
        packet.sent_ns = now_ns
        xid = packet.xid = self._xid
        self._xid = xid + 1
        out = self._out
        out[xid] = packet
        if len(out) > self._max_pipe:
            self._max_pipe = len(out)
        self._last_sent_ns = now_ns
        arrival_ns = self._forward.send(packet.n_bytes + HEADER_BYTES, now_ns)
        if arrival_ns == LOST:
            packet.lost = True
            self._lost += 1
            return
        if not packet.arrived:
            packet.arrived = True
            self._arrive(packet.message, arrival_ns)
        if self._ack_loss and self._rng.random() < self._ack_loss:
            packet.lost = True  # until a later acknowledgement covers it
            self._lost += 1
        else:
            packet.lost = False
            packet.ack_ns = arrival_ns + self._reverse_delay
            self._acks.append((packet, xid))

    def _arrive(self, message: _Message, arrival_ns: int) -> None:
        message.missing -= 1
        if arrival_ns > message.arrival_ns:
            message.arrival_ns = arrival_ns
        if message.missing:
            return
        messages = self._messages
        while messages and not messages[0].missing:
            head = messages.popleft()
            if head.arrival_ns > self._last_delivered_ns:
                self._last_delivered_ns = head.arrival_ns
            head.deliver(self._last_delivered_ns)

    # ------------------------------------------------------------------ acknowledgements

    def _work_off(self, now_ns: int) -> None:
        acks = self._acks
        while acks and acks[0][0].ack_ns <= now_ns:
            packet, xid = acks.popleft()
            at_ns = packet.ack_ns
            if packet.xid == xid and xid in self._out:
                self._on_ack(packet, at_ns)
                self._transmit(at_ns)

    def _on_ack(self, packet: _Packet, at_ns: int) -> None:
        out = self._out
        del out[packet.xid]
        acked = 1
        rtt = at_ns - packet.sent_ns
        if rtt < self._min_rtt:
            self._min_rtt = rtt
        if not packet.retransmitted:
            self._rtt_sample(rtt)
        self._backoff = 0
        self._probed = False
        if self._lost and next(iter(out)) < packet.xid:
            acked += self._holes(packet, at_ns)
        else:
            self._sacked = 0
        self._cubic.on_acked(acked, at_ns, self._srtt, self._max_pipe)
        if packet.xid >= self._round_xid:
            self._round_xid = self._xid
            self._max_pipe = len(out) + acked
            self._cubic.on_round()
        self._arm(at_ns)

    def _holes(self, packet: _Packet, at_ns: int) -> int:
        """Older packets are still out: their acknowledgement was lost and this one covers it, or they are lost."""
        older = [p for p in self._out.values() if p.xid < packet.xid]
        covered = [p for p in older if p.arrived and p.lost]
        for p in covered:
            del self._out[p.xid]
            self._lost -= 1
        if len(covered) < len(older):
            self._sacked += 1 + len(covered)
            self._rack_xid = packet.xid
            recovering = any(p.seq < self._recovery_seq for p in older)
            if self._sacked >= _DUP_THRESHOLD or recovering:
                self._rack()
            elif self._rack_ns == NEVER_NS:
                self._rack_ns = at_ns + int(self._min_rtt / 4)
        return len(covered)

    def _rack(self) -> None:
        """What was sent before something that arrived, and has not arrived itself, is lost."""
        self._rack_ns = NEVER_NS
        self._sacked = 0
        lost = [p for p in self._out.values() if p.xid < self._rack_xid and p.lost]
        self._mark_lost(lost)
        if any(p.seq >= self._recovery_seq for p in lost):
            self._cubic.on_loss()
            self._recovery_seq = self._next_seq()

    def _mark_lost(self, packets: list[_Packet]) -> None:
        for p in packets:
            del self._out[p.xid]
            p.retransmitted = True
            self._resend.append(p)
        self._lost -= len(packets)
        self.retransmits += len(packets)

    def _rtt_sample(self, rtt: float) -> None:
        if self._srtt == 0.0:
            self._srtt, self._rttvar = rtt, rtt / 2
        else:
            self._rttvar += (abs(rtt - self._srtt) - self._rttvar) / 4
            self._srtt += (rtt - self._srtt) / 8
        self._cubic.on_rtt(rtt, self._min_rtt)

    # ------------------------------------------------------------------ timers

    def _rto_ns(self) -> int:
        base = int(self._srtt + max(4 * self._rttvar, _RTO_MIN_NS)) if self._srtt else _FIRST_RTO_NS
        return min(base << self._backoff, _RTO_MAX_NS)

    def _arm(self, now_ns: int) -> None:
        if not self._out:
            self._timer_ns = NEVER_NS
            return
        if not self._lost:
            return  # nothing will need the timer; armed again with the packet that does
        wait_ns = self._rto_ns()
        if self._srtt and not self._probed and self._backoff == 0 and not self._resend:
            wait_ns = min(wait_ns, int(2 * self._srtt) + (_RTO_MIN_NS if len(self._out) == 1 else 2_000_000))
        self._timer_ns = now_ns + wait_ns

    def _on_timer(self, now_ns: int) -> None:
        if not self._out:
            return
        if self._srtt and not self._probed and self._backoff == 0:
            self._probe(now_ns)
            return
        self.timeouts += 1
        self._backoff = min(self._backoff + 1, 8)
        self._mark_lost(list(self._out.values()))
        self._sacked, self._rack_ns = 0, NEVER_NS
        self._recovery_seq = self._next_seq()
        self._cubic.on_timeout()

    def _probe(self, now_ns: int) -> None:
        """The tail loss probe: new data if there is any, else the last packet once more."""
        self._probed = True
        if self._pending:
            packet = self._pending.popleft()
            self.unsent_bytes -= packet.n_bytes
        else:
            packet = next(reversed(self._out.values()))
            del self._out[packet.xid]
            self._lost -= 1  # no acknowledgement is under way when a timer fires, so all that is out is lost
            packet.retransmitted = True
            self.retransmits += 1
            if packet.seq >= self._recovery_seq:
                self._cubic.on_loss()
                self._recovery_seq = self._next_seq()
        self._put_on_link(packet, now_ns)
        self._arm(now_ns)

    def _next_seq(self) -> int:
        """The first segment never sent: a loss below it belongs to the recovery that begins now."""
        return self._pending[0].seq if self._pending else self._seq

    def _set_wake(self) -> None:
        wake = NEVER_NS
        if self._acks and (self._pending or self._resend or self._lost):
            wake = self._acks[0][0].ack_ns
        if self._lost:
            wake = min(wake, self._rack_ns)
            if not self._acks:
                wake = min(wake, self._timer_ns)
        self.wake_ns = wake
