"""One TCP direction as the application sees it: when do bytes arrive? Over 400 lines: one connection, one state (`TcpFlow`).

Modelled, with the constants of a Linux kernel: a byte stream cut into segments when they are sent, CUBIC in whole packets,
selective acknowledgement with RACK loss detection and the tail loss probe (RFC 8985), proportional rate reduction (RFC
6937), retransmission time-outs with back-off (RFC 6298), windows that grow only while they are the limit (RFC 7661),
restart after idle, head-of-line blocking.
Left out: handshake, receive window, delayed acknowledgements, reordering, ECN, spurious time-outs and probes (a timer
never fires here while an acknowledgement is under way) and the capacity that acknowledgements use.

The model is lazy. A packet's fate is known the moment it is sent, so the sender needs waking only while data waits
for the window or something is lost; acknowledgements of an undisturbed frame are worked off at the next write.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from deploy.testbed.link.cubic import Cubic
from deploy.testbed.link.model import LOST, Link
from deploy.testbed.link.trace import NEVER_NS

MSS_BYTES = 1448
HEADER_BYTES = 52
_RTO_MIN_NS = 200_000_000
_RTO_MAX_NS = 120_000_000_000
_FIRST_RTO_NS = 1_000_000_000
_TIMER_MIN_NS = 2_000_000
_TICK_NS = 4_000_000  # a kernel's timers fire on ticks, 250 a second, never early
_DUP_THRESHOLD = 3
_OPEN, _RECOVERY, _LOSS = 0, 1, 2


class _Message:
    __slots__ = ("arrival_ns", "deliver", "missing")

    def __init__(self, missing: int, deliver: Callable[[int], None]) -> None:
        self.missing = missing
        self.arrival_ns = 0
        self.deliver = deliver


class _Packet:
    __slots__ = ("ack_ns", "acked", "arrived", "lost", "message", "more", "n_bytes", "retransmitted", "sent_ns", "seq", "xid")

    def __init__(self, n_bytes: int, message: _Message, seq: int) -> None:
        self.n_bytes = n_bytes
        self.message = message
        self.more: tuple[_Message, ...] = ()  # messages that begin in what was left of it while it waited
        self.seq = seq
        self.xid = -1
        self.sent_ns = self.ack_ns = 0
        self.acked = False
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
        "_ack_loss",
        "_acks",
        "_armed_ns",
        "_armed_probe",
        "_backoff",
        "_cubic",
        "_forward",
        "_last_delivered_ns",
        "_last_sent_ns",
        "_limited",
        "_lost",
        "_max_out",
        "_messages",
        "_min_rtt",
        "_order",
        "_out",
        "_pending",
        "_prior_cwnd",
        "_probe_repairs",
        "_probe_seq",
        "_prr_delivered",
        "_prr_out",
        "_rack_ns",
        "_rack_xid",
        "_recovery_seq",
        "_resend",
        "_reverse_delay",
        "_rng",
        "_round_seq",
        "_rttvar",
        "_sacked",
        "_sent_seq",
        "_seq",
        "_srtt",
        "_state",
        "_una",
        "_usage_seq",
        "_used",
        "_used_ns",
        "_xid",
        "retransmits",
        "timeouts",
        "unsent_bytes",
        "wake_ns",
    )  # fmt: skip

    def __init__(self, forward: Link, *, reverse_delay_ns: int, ack_loss: float = 0.0, seed: int | str = 0) -> None:
        self._forward = forward
        self._reverse_delay = reverse_delay_ns
        self._ack_loss = ack_loss
        self._rng = random.Random(f"ack/{seed}")  # noqa: S311
        self._cubic = Cubic()
        self._pending: deque[_Packet] = deque()
        self._resend: deque[_Packet] = deque()
        self._order: deque[_Packet] = deque()  # sent and not cumulatively acknowledged, in order
        self._out: dict[int, _Packet] = {}  # under way as far as the sender knows, by transmission, oldest first
        self._lost = 0  # of _out
        self._acks: deque[tuple[_Packet, int]] = deque()  # acknowledgements to come: packet, transmission
        self._messages: deque[_Message] = deque()
        # Sequence numbers count packets: written, sent, cumulatively acknowledged.
        self._seq = self._sent_seq = self._una = 0
        self._xid = 0
        self._round_seq = self._recovery_seq = 0
        self._state = _OPEN
        self._sacked = 0  # acknowledged above the oldest hole
        self._prior_cwnd = self._prr_delivered = self._prr_out = 0
        self._limited, self._max_out, self._usage_seq = False, 0, 0
        self._used = self._used_ns = 0
        self._probe_seq = -1  # what was sent when a tail loss probe went out; -1: none is unresolved
        self._probe_repairs = False
        self._rack_xid = -1
        self._rack_ns = NEVER_NS
        self._armed_ns = 0
        self._armed_probe = False
        self._srtt = self._rttvar = 0.0
        self._min_rtt = NEVER_NS
        self._backoff = 0
        self._last_sent_ns = self._last_delivered_ns = 0
        self.wake_ns = NEVER_NS
        self.unsent_bytes = self.retransmits = self.timeouts = 0

    # ------------------------------------------------------------------ the owner's side

    def write(self, n_bytes: int, now_ns: int, deliver: Callable[[int], None]) -> None:
        """The application writes a message."""
        if self._acks:
            self._work_off(now_ns)
        if not self._order and self._sent_seq:
            idle_ns = now_ns - self._last_sent_ns
            if idle_ns > _RTO_MIN_NS and idle_ns > (rto_ns := self._rto_ns()):
                self._cubic.on_idle(idle_ns, rto_ns)
            self._cubic.on_start(idle_ns, now_ns)
        message = _Message(0, deliver)
        self._messages.append(message)
        pending, seq, left = self._pending, self._seq, n_bytes if n_bytes > 0 else 1
        self.unsent_bytes += left
        if pending and pending[-1].n_bytes < MSS_BYTES:
            part = min(left, MSS_BYTES - pending[-1].n_bytes)
            pending[-1].n_bytes += part
            pending[-1].more += (message,)
            message.missing += 1
            left -= part
        while left > 0:
            pending.append(_Packet(left if left < MSS_BYTES else MSS_BYTES, message, seq))
            message.missing += 1
            left -= MSS_BYTES
            seq += 1
        self._seq = seq
        self._transmit(now_ns)
        self._set_wake()

    def advance(self, now_ns: int) -> None:
        """Works off acknowledgements and timers up to ``now_ns``."""
        self._work_off(now_ns)
        if self._lost:
            if self._rack_ns <= now_ns:
                if self._rack() and self._state == _RECOVERY:
                    self._reduce(1, clean=False)
            elif not self._acks and self._timer_ns() <= now_ns:
                self._on_timer(now_ns)
        if self._pending or self._resend:
            self._transmit(now_ns)
        self._set_wake()

    @property
    def unacked_bytes(self) -> int:
        """Written and not yet acknowledged, as far as acknowledgements were worked off."""
        return self.unsent_bytes + sum(p.n_bytes for p in self._out.values()) + sum(p.n_bytes for p in self._resend)

    # ------------------------------------------------------------------ sending

    def _transmit(self, now_ns: int) -> None:
        """What the window allows, the lost first."""
        resend, pending = self._resend, self._pending
        room = before = self._cubic.cwnd - len(self._out)
        quiet, arms = self._state == _OPEN and not self._sacked, False
        while room > 0:
            if resend:
                packet = resend.popleft()
                arms = arms or packet.seq == self._una
            elif pending:
                packet = self._take()
                arms = arms or quiet
            else:
                break
            self._put_on_link(packet, now_ns)
            room -= 1
        if room < before:
            if self._state == _RECOVERY:
                self._prr_out += before - room
            if arms:
                self._arm(now_ns)
        self._note_use(now_ns, limited=room <= 0)

    def _take(self) -> _Packet:
        packet = self._pending.popleft()
        self.unsent_bytes -= packet.n_bytes
        self._sent_seq = packet.seq + 1
        self._order.append(packet)
        return packet

    def _note_use(self, now_ns: int, *, limited: bool) -> None:
        """Whether the window was the limit, and how much of it was used, in the round trip that is now under way."""
        out = self._sent_seq - self._una
        if self._una >= self._usage_seq or limited or (not self._limited and out > self._max_out):
            self._limited = limited
            self._max_out = out
            self._usage_seq = self._sent_seq
        if self._may_grow():
            self._used, self._used_ns = 0, now_ns
            return
        if out > self._used:
            self._used = out
        if now_ns - self._used_ns >= _RTO_MIN_NS and now_ns - self._used_ns >= self._rto_ns():
            if self._state == _OPEN and not self._pending:
                self._cubic.on_unused(self._used)
            self._used, self._used_ns = 0, now_ns

    def _may_grow(self) -> bool:
        cubic = self._cubic
        return cubic.cwnd < 2 * self._max_out if cubic.cwnd < cubic.ssthresh else self._limited

    def _put_on_link(self, packet: _Packet, now_ns: int) -> None:
        packet.sent_ns = self._last_sent_ns = now_ns
        xid = packet.xid = self._xid
        self._xid = xid + 1
        self._out[xid] = packet
        arrival_ns = self._forward.send(packet.n_bytes + HEADER_BYTES, now_ns)
        if arrival_ns == LOST:
            packet.lost = True
            self._lost += 1
            return
        if not packet.arrived:
            packet.arrived = True
            self._arrive(packet.message, arrival_ns)
            for message in packet.more:
                self._arrive(message, arrival_ns)
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
        acks, out = self._acks, self._out
        while acks and acks[0][0].ack_ns <= now_ns:
            packet, xid = acks.popleft()
            at_ns = packet.ack_ns
            if packet.xid == xid and xid in out:
                self._on_ack(packet, at_ns)
                if self._pending or self._resend:
                    self._transmit(at_ns)

    def _on_ack(self, packet: _Packet, at_ns: int) -> None:
        out = self._out
        del out[packet.xid]
        packet.acked = True
        self._rtt_sample(at_ns - packet.sent_ns)
        self._backoff = 0
        if not packet.retransmitted:
            self._cubic.on_rtt(at_ns - packet.sent_ns, at_ns)
        delivered = 1
        if self._lost or self._resend:
            delivered += self._covered(packet)
        order, passed = self._order, 0
        while order and order[0].acked:
            order.popleft()
            passed += 1
        self._sacked += delivered - passed
        advanced = passed > 0
        if advanced:
            self._una += passed
            self._on_advance(at_ns)
        found_lost = self._lost > 0 and next(iter(out)) < packet.xid and self._suspect(packet, at_ns)
        if self._state == _RECOVERY:
            self._reduce(delivered, clean=advanced and not found_lost)
        elif advanced and self._may_grow():
            self._cubic.on_acked(delivered, at_ns)
        if advanced:
            self._arm(at_ns)

    def _on_advance(self, at_ns: int) -> None:
        """The oldest hole, or the oldest packet under way, was acknowledged."""
        una = self._una
        if una > self._round_seq:
            self._round_seq = self._sent_seq
            self._cubic.on_round(at_ns)
        if 0 <= self._probe_seq < una or (self._probe_seq == una and not self._probe_repairs):
            if self._probe_repairs and self._state == _OPEN:
                self._cubic.on_loss()
                self._cubic.cwnd = self._cubic.ssthresh
            self._probe_seq = -1
        if self._state != _OPEN and una >= self._recovery_seq:
            if self._state == _RECOVERY:
                self._cubic.cwnd = self._cubic.ssthresh
            self._state = _OPEN

    def _covered(self, packet: _Packet) -> int:
        """Packets that arrived before this one and whose own acknowledgement was lost: this one speaks for them too."""
        found = [p for p in self._resend if p.arrived]
        for p in found:
            self._resend.remove(p)
        if self._lost:
            older = []
            for xid, p in self._out.items():
                if xid > packet.xid:
                    break
                if p.arrived and p.lost:
                    older.append(p)
            for p in older:
                del self._out[p.xid]
            self._lost -= len(older)
            found += older
        for p in found:
            p.acked = True
        return len(found)

    def _suspect(self, packet: _Packet, at_ns: int) -> bool:
        """Older packets are still out. They are lost at once in recovery or after three others, else a little later."""
        self._rack_xid = packet.xid
        if self._sacked >= _DUP_THRESHOLD or self._state != _OPEN:
            return self._rack()
        if self._rack_ns == NEVER_NS:
            self._rack_ns = at_ns + _ticks(min(self._min_rtt / 4, self._srtt) + _TIMER_MIN_NS)
        return False

    def _rack(self) -> bool:
        """What was sent before something that arrived, and has not arrived itself, is lost; whether there was any."""
        self._rack_ns = NEVER_NS
        lost = []
        for xid, p in self._out.items():
            if xid >= self._rack_xid:
                break
            if p.lost:
                lost.append(p)
        if not lost:
            return False
        self._mark_lost(lost)
        if self._state == _OPEN:
            self._state = _RECOVERY
            self._recovery_seq = self._sent_seq
            self._prior_cwnd = self._cubic.cwnd
            self._prr_delivered = self._prr_out = 0
            self._probe_seq = -1
            self._cubic.on_loss()
        return True

    def _reduce(self, delivered: int, *, clean: bool) -> None:
        """Proportional rate reduction: the window comes down to the threshold over a round trip, and never falls idle."""
        cubic, pipe = self._cubic, len(self._out)
        self._prr_delivered += delivered
        if pipe > cubic.ssthresh:
            more = -(-cubic.ssthresh * self._prr_delivered // self._prior_cwnd) - self._prr_out
        else:
            more = min(cubic.ssthresh - pipe, max(self._prr_delivered - self._prr_out, delivered) + clean)
        cubic.cwnd = pipe + max(more, 0 if self._prr_out else 1)

    def _mark_lost(self, packets: list[_Packet]) -> None:
        for p in packets:
            del self._out[p.xid]
            p.retransmitted = True
            self._resend.append(p)
        if len(self._resend) > 1:
            self._resend = deque(sorted(self._resend, key=_by_seq))
        self._lost -= len(packets)
        self.retransmits += len(packets)

    def _rtt_sample(self, rtt: int) -> None:
        if rtt < self._min_rtt:
            self._min_rtt = rtt
        if self._srtt == 0.0:
            self._srtt, self._rttvar = rtt, rtt / 2
        else:
            self._rttvar += (abs(rtt - self._srtt) - self._rttvar) / 4
            self._srtt += (rtt - self._srtt) / 8

    # ------------------------------------------------------------------ timers

    def _rto_ns(self) -> int:
        """Never below ``_RTO_MIN_NS``."""
        base = int(self._srtt + max(4 * self._rttvar, _RTO_MIN_NS)) if self._srtt else _FIRST_RTO_NS
        return min(base << self._backoff, _RTO_MAX_NS)

    def _arm(self, now_ns: int) -> None:
        self._armed_ns = now_ns
        self._armed_probe = self._state == _OPEN and not self._sacked and self._probe_seq < 0 and self._srtt > 0

    def _timer_ns(self) -> int:
        wait_ns = self._rto_ns()
        if self._armed_probe:
            alone = self._sent_seq - self._una == 1
            wait_ns = min(wait_ns, int(2 * self._srtt) + (_RTO_MIN_NS if alone else _TIMER_MIN_NS))
        return self._armed_ns + _ticks(wait_ns)

    def _on_timer(self, now_ns: int) -> None:
        if not self._out:
            return
        if self._armed_probe:
            self._probe(now_ns)
            return
        self.timeouts += 1
        again = self._state == _RECOVERY or (self._state == _LOSS and self._backoff > 0)
        self._backoff = min(self._backoff + 1, 15)
        self._mark_lost(list(self._out.values()))
        self._rack_ns = NEVER_NS
        self._state, self._recovery_seq = _LOSS, self._sent_seq
        self._probe_seq = -1
        self._cubic.on_timeout(again=again)
        self._arm(now_ns)

    def _probe(self, now_ns: int) -> None:
        """The tail loss probe: new data if there is any, else the last packet once more."""
        self._probe_repairs = False
        if self._pending:
            packet = self._take()
        else:
            packet = next(reversed(self._out.values()))
            del self._out[packet.xid]
            self._lost -= 1  # no acknowledgement is under way when a timer fires, so all that is out is lost
            packet.retransmitted = True
            self._probe_repairs = not packet.arrived  # else both copies arrive, and the receiver says so
            self.retransmits += 1
        self._put_on_link(packet, now_ns)
        self._probe_seq = self._sent_seq
        self._arm(now_ns)

    def _set_wake(self) -> None:
        wake = NEVER_NS
        if self._lost:
            wake = min(self._rack_ns, self._acks[0][0].ack_ns if self._acks else self._timer_ns())
        elif self._acks and (self._pending or self._resend):
            wake = self._acks[0][0].ack_ns
        self.wake_ns = wake


def _ticks(wait_ns: float) -> int:
    """When a timer of that length fires, on average: on the tick after the one it is due at."""
    return (-int(-wait_ns // _TICK_NS)) * _TICK_NS + _TICK_NS // 2


def _by_seq(packet: _Packet) -> int:
    return packet.seq
