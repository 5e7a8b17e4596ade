"""What acknowledgements tell about the network and the server.

The model: one FIFO bottleneck of bitrate R behind a fixed round trip p. A frame of b bytes that leaves at s is
delivered, on the clock of its acknowledgement with the server's time taken off, at

    d_k = max(s_k + p, d_{k-1}) + 8 b_k / R.

So every acknowledgement gives a service time, free of the wait behind earlier frames. R is a low median of the newest
few (a mean would take a repaired packet for a slow link), p the least round trip of recent frames and pings. How far
answers deviate from this simple model is measured and kept as a distribution, see ``lateness``.
"""

from __future__ import annotations

from collections import deque

from edge_client.control.config import ControlConfig
from edge_client.control.estimating.lateness import Lateness
from edge_client.control.quantile import SlidingQuantile

# A service time below this is clock noise; it bounds the bitrate one acknowledgement can claim.
_MIN_SERVICE_NS = 100_000
# Residuals are counted in units of (this + a tenth of the round trip + the frame's service time).
_NOISE_NS = 4_000_000
_SEGMENT_BYTES = 1448
_INITIAL_WINDOW_BYTES = 14_000.0
_FORGET_TRIED = 0.98
# A frame that took longer than this was in an outage: that says nothing about the link as it is between outages.
_OUTAGE_NS = 1_000_000_000
_WINDOW_SAMPLES = 96
# This many frames in a row that look repaired mean a slow link.
_SLOW_RUN = 3
# A frame that is later than this, in round trips beyond its noise, lost a packet.
_REPAIR_RTTS = 0.6
# The bitrate is read off this quantile of the newest service times per byte: more than half, to be careful; less on a lossy
# link, whose longer times are small repairs and belong to the residuals.
_RECENT_LEAST, _RECENT_MOST, _RECENT_QUANTILE, _LOSSY_QUANTILE = 5, 15, 0.6, 0.45
# TCP's least time-out.
_RTO_NS = 200_000_000
# After this long without a sample the bitrate is believed to recover, doubling in so much time.
_STALE_NS, _DOUBLING_NS = 1_500_000_000, 2_000_000_000
_MOST_PASSED = 64
_LEAST_NS_PER_BYTE = 8.0  # 1 Gbit/s


class _InFlight:
    __slots__ = ("n_bytes", "predicted_ns", "scale_ns", "sent_ns")

    def __init__(self, n_bytes: int, sent_ns: int) -> None:
        self.n_bytes = n_bytes
        self.sent_ns = sent_ns
        self.predicted_ns = 0.0
        self.scale_ns = 1.0


class Estimator:
    """Delivery bitrate, round trip and server time of one session. Pure: time comes in as an argument.

    Attributes:
        lateness: by how much answers miss what this model predicts.
        base_rtt_ns: round trip without queueing and without the server's time.
        server_ns: median time a frame spends in the server.
        ns_per_byte: central estimate of the bottleneck's service time, always positive and finite.
    """

    def __init__(self, config: ControlConfig | None = None) -> None:
        self.config = config or ControlConfig()
        window, size = self.config.window_ns, _WINDOW_SAMPLES
        self.connected = False
        self.backlog_bytes = 0
        self.grant_max_in_flight = 0
        self._flight: dict[int, _InFlight] = {}
        self._passed: dict[int, _InFlight] = {}  # a later frame was answered first: nothing waits behind these
        self._rtts = SlidingQuantile(size=size, age_ns=window)
        self._servers = SlidingQuantile(size=size, age_ns=window)
        self._latenesses = {True: Lateness(window), False: Lateness(window)}
        self.lateness = self._latenesses[True]
        self.server_ns = self._server_prior_ns = 10_000_000.0
        self._slow_run = 0
        self.base_rtt_ns = float(self.config.initial_rtt_ns)
        self._tried_bytes = 0.0
        self._last_delivery_ns = 0
        self._last_heard_ns = 0
        self._last_ping_ns = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_MOST)  # when, ns per byte
        self._learnt_ns_per_byte = self.ns_per_byte = 8e9 / self.config.initial_bps

    # ------------------------------------------------------------------ events

    def on_connect(self, now_ns: int) -> None:
        """The session is up (the server's welcome arrived)."""
        self.connected = True
        self._clear_flight()
        self._last_heard_ns = self._last_delivery_ns = now_ns

    def on_disconnect(self, now_ns: int) -> None:
        """The session is down; frames in flight are lost. What was learnt about the link is kept."""
        self.connected = False
        self._clear_flight()
        self._last_heard_ns = now_ns

    def on_sent(self, frame_id: int, n_bytes: int, now_ns: int) -> None:
        """``n_bytes`` of this frame were handed to the transport; once for each layer."""
        n_bytes = max(0, n_bytes)
        record = self._flight.get(frame_id)
        if record is None:
            drained_ns = self.drained_ns(now_ns)
            record = self._flight[frame_id] = _InFlight(0, now_ns)
        else:
            drained_ns = record.predicted_ns - self.server_ns
        self.backlog_bytes += n_bytes
        record.n_bytes += n_bytes
        service_ns = self.service_ns(record.n_bytes)
        record.predicted_ns = max(now_ns + self.base_rtt_ns, drained_ns) + self.service_ns(n_bytes) + self.server_ns
        record.scale_ns = self.scale_ns(service_ns)

    def on_ack(self, frame_id: int, now_ns: int, server_ns: int = 0) -> None:
        """A result arrived, late or not. ``server_ns``: last layer read to result written, as the server measured."""
        self._last_heard_ns = now_ns
        record = self._pop(frame_id)
        if record is None:
            return
        self._pass_by(record)
        server_ns = max(0, server_ns)
        delivered_ns = max(now_ns - server_ns, record.sent_ns)
        round_trip_ns = delivered_ns - record.sent_ns
        if round_trip_ns < _OUTAGE_NS:
            self._learn_rtt(round_trip_ns, now_ns)
        self._tried_bytes = max(float(record.n_bytes), self._tried_bytes * _FORGET_TRIED)
        self._servers.add(server_ns, now_ns)
        self.server_ns = self._servers.quantile(0.5, server_ns)
        start_ns = max(record.sent_ns + self.base_rtt_ns, self._last_delivery_ns)
        service_ns = max(delivered_ns - start_ns, _MIN_SERVICE_NS)
        if round_trip_ns < _OUTAGE_NS:
            waited = self._last_delivery_ns > record.sent_ns + self.base_rtt_ns
            self._learn_residual(record, now_ns)
            self._learn_rate(record.n_bytes, service_ns, now_ns, waited=waited)
        self._last_delivery_ns = max(self._last_delivery_ns, delivered_ns) if self._sane(now_ns) else delivered_ns

    def on_refused(self, frame_id: int, now_ns: int) -> None:
        """The server answered that it cannot make this frame's deadline: as bad as a frame that came too late."""
        self._last_heard_ns = now_ns
        if self._pop(frame_id) is not None:
            self.lateness.add_missing(1, now_ns)

    def on_lost(self, frame_id: int, now_ns: int, *, explained: bool = False) -> None:
        """No answer will come for this frame (it was lost on its way, or given up); it no longer fills the window.

        One that is ``explained`` by the packets that the path loses says nothing of how late answers come.
        """
        record = self._pop(frame_id)
        if record is not None and not explained:
            self.lateness.add_missing(1 + record.n_bytes // _SEGMENT_BYTES, now_ns)

    def on_grant(
        self,
        now_ns: int,
        *,
        max_in_flight: int = 0,
        queue_ns: int = 0,
        tail_ns: int = 0,
    ) -> None:
        """What the server says of its own p95 times; believed until the first results. The bitrate goes to ``Controller``."""
        self._last_heard_ns = now_ns
        self.grant_max_in_flight = max(0, max_in_flight)
        if queue_ns + tail_ns > 0:
            self._server_prior_ns = float(max(0, queue_ns) + max(0, tail_ns))
            self.server_ns = self._servers.quantile(0.5, self._server_prior_ns)

    def set_reliable(self, reliable: bool) -> None:
        """Frames go by a stream from now on, or by datagrams.

        A lost packet makes a stream late and leaves a datagram's frame unanswered, so each has its own record of lateness. What is
        still on the old way holds nothing up on the new one, and a stream that lost packets says little of the link's bitrate.
        """
        if self.lateness is self._latenesses[reliable]:
            return
        self.lateness = self._latenesses[reliable]
        self._passed.update(self._flight)
        self._flight.clear()
        self.backlog_bytes = 0
        if not reliable:
            self._recent.clear()
            self._learnt_ns_per_byte = self.ns_per_byte = min(self.ns_per_byte, 8e9 / self.config.initial_bps)

    def on_pong(self, rtt_ns: int, now_ns: int) -> None:
        """A ping came back after ``rtt_ns``."""
        self._last_heard_ns = now_ns
        if rtt_ns < _OUTAGE_NS:
            self._learn_rtt(max(0, rtt_ns), now_ns)

    def ping_due(self, now_ns: int) -> bool:
        """Whether a ping should leave now; saying so counts as sending it.

        Pings keep the round trip known while nothing is sent, and cost no frame anything.
        """
        interval = self.config.ping_interval_ns
        quiet_ns = now_ns - max(self._last_ping_ns, self._last_heard_ns if not self._flight else 0)
        if not self.connected or quiet_ns < (interval if not self._flight else 4 * interval):
            return False
        self._last_ping_ns = now_ns
        return True

    # ------------------------------------------------------------------ what is believed

    @property
    def in_flight(self) -> int:
        """Frames sent and not answered."""
        return len(self._flight)

    @property
    def room_to_try_bytes(self) -> float:
        """The largest frame worth sending: twice what lately came through, or what TCP sends without waiting.

        More would be spread over round trips by the transport's slow start, which tells nothing about the link.
        """
        return max(_INITIAL_WINDOW_BYTES, 2 * self._tried_bytes)

    def in_flight_at(self, at_ns: float, now_ns: int) -> int:
        """Frames that will probably still be unanswered at a later moment; overdue ones will."""
        return sum(r.predicted_ns > at_ns or r.predicted_ns + r.scale_ns < now_ns for r in self._flight.values())

    @property
    def delivery_bps(self) -> float:
        """Central estimate of the bottleneck's bitrate, bits/s, always positive and finite."""
        return 8e9 / self.ns_per_byte

    def rtt_ns(self, q: float) -> float:
        """A quantile of the measured round trips, without the server's time."""
        return self._rtts.quantile(q, self.base_rtt_ns)

    @property
    def repair_ns(self) -> float:
        """By how much a lost packet delays a frame, median; 0 where losses are rare. At most three round trips and a time-out."""
        return min(self.lateness.repair_ns, 3 * self.base_rtt_ns + _RTO_NS)

    def service_ns(self, n_bytes: float) -> float:
        """Time the bottleneck needs for ``n_bytes``."""
        return n_bytes * self.ns_per_byte

    def scale_ns(self, service_ns: float) -> float:
        """The unit residuals of a frame with that service time are counted in."""
        return _NOISE_NS + 0.1 * self.base_rtt_ns + service_ns

    def drained_ns(self, now_ns: int) -> float:
        """When, on the clock of acknowledgements, all that is in flight will have been delivered.

        What is overdue is taken to come now; how likely that is, ``p_unblocked`` says.
        """
        at_ns = float(self._last_delivery_ns)
        base_ns, per_byte = self.base_rtt_ns, self.ns_per_byte
        overdue_ns = 0.0
        if not self._flight:
            return at_ns
        first = True
        for record in self._flight.values():
            at_ns = max(at_ns, record.sent_ns + base_ns) + per_byte * record.n_bytes
            if first:
                first = False
                overdue_ns = max(0.0, now_ns - at_ns - self.server_ns)
        return at_ns + overdue_ns

    def overdue_ns(self, now_ns: int) -> float:
        """How long the oldest frame in flight has been expected back."""
        for record in self._flight.values():
            return max(0.0, now_ns - record.predicted_ns)
        return 0.0

    def p_within(self, slack_ns: float, scale_ns: float, packets: int = 1) -> float:
        """P(a frame of ``packets`` packets comes back no later than ``slack_ns`` after its prediction)."""
        return self.lateness.p_within(slack_ns, scale_ns, packets)

    def p_still(self, frame_id: int, now_ns: int, deadline_ns: int) -> float:
        """P(the answer to a frame in flight, not there yet, comes before its deadline)."""
        record = self._flight.get(frame_id)
        return self._p_still(record, now_ns, deadline_ns) if record is not None else 0.0

    def p_unblocked(self, now_ns: int, by_ns: float) -> float:
        """P(the oldest frame in flight is answered by then): no later one overtakes it."""
        for record in self._flight.values():
            return self._p_still(record, now_ns, by_ns)
        return 1.0

    def _p_still(self, record: _InFlight, now_ns: int, by_ns: float) -> float:
        """From what frames this late have done, and, for want of such frames, from that waits are heavy-tailed.

        What has lasted x lasts another t with probability x / (x + t): so a stalled link closes itself within a frame or two.
        """
        more_ns, late_ns = by_ns - now_ns, now_ns - record.predicted_ns
        if more_ns <= 0:
            return 0.0
        packets = 1 + record.n_bytes // _SEGMENT_BYTES
        soon = self.p_within(by_ns - record.predicted_ns, record.scale_ns, packets)
        already = self.p_within(late_ns, record.scale_ns, packets)
        seen = max(0.0, soon - already) / max(1e-3, 1.0 - already)
        if late_ns <= 0:
            return seen
        weight = self.lateness.weight_beyond(late_ns)
        return seen + weight * (more_ns / (more_ns + late_ns + record.scale_ns) - seen)

    def expire(self, now_ns: int) -> None:
        """Forgets what is too old: a link not used for a while is an unknown one, and worth a try."""
        self.lateness.expire(now_ns)
        idle_ns = now_ns - (self._recent[-1][0] if self._recent else self._last_delivery_ns)
        if idle_ns > _STALE_NS and not self._flight:
            # Of a link nothing was ever sent over, even the first guess is no bound: frames may all be larger than it allows.
            least = min(8e9 / self.config.initial_bps, self._learnt_ns_per_byte) if self._recent else _LEAST_NS_PER_BYTE
            grown = self._learnt_ns_per_byte / 2.0 ** min(30.0, (idle_ns - _STALE_NS) / _DOUBLING_NS)
            self.ns_per_byte = max(least, grown)

    # ------------------------------------------------------------------ inside

    def _pop(self, frame_id: int) -> _InFlight | None:
        record = self._flight.pop(frame_id, None)
        if record is None:
            return self._passed.pop(frame_id, None)
        self.backlog_bytes -= record.n_bytes
        return record

    def _pass_by(self, record: _InFlight) -> None:
        """Frames sent before one that is answered are out of the network: over datagrams they are lost, or nearly so."""
        late = [i for i, other in self._flight.items() if other.sent_ns < record.sent_ns]
        for frame_id in late:
            passed = self._flight.pop(frame_id)
            self.backlog_bytes -= passed.n_bytes
            self._passed[frame_id] = passed
        while len(self._passed) > _MOST_PASSED:
            del self._passed[next(iter(self._passed))]

    def _clear_flight(self) -> None:
        self._flight.clear()
        self._passed.clear()
        self.backlog_bytes = 0

    def _sane(self, now_ns: int) -> bool:
        """False after the clock jumped back behind the last delivery."""
        return self._last_delivery_ns <= now_ns

    def _learn_rtt(self, rtt_ns: int, now_ns: int) -> None:
        self._rtts.add(rtt_ns, now_ns)
        self.base_rtt_ns = float(self._rtts.minimum(rtt_ns))

    def _learn_residual(self, record: _InFlight, now_ns: int) -> None:
        """Sorts a residual into the body or, when only a repair can explain it, the tail."""
        late_ns = now_ns - record.predicted_ns
        repaired = late_ns > _REPAIR_RTTS * self.base_rtt_ns + 3 * record.scale_ns
        self.lateness.add(late_ns, record.scale_ns, 1 + record.n_bytes // _SEGMENT_BYTES, now_ns, repaired=repaired)

    def _learn_rate(self, n_bytes: int, service_ns: float, now_ns: int, *, waited: bool) -> None:
        """Takes in a service time.

        A repaired packet holds a frame back and then releases those behind it all at once: neither says how fast the
        link is. Several slow frames in a row are no repairs, though, but a link that has become slow.
        """
        expected_ns = self.service_ns(n_bytes)
        if n_bytes <= 0 or (waited and service_ns < 0.5 * expected_ns):
            return
        repaired = service_ns > expected_ns + _REPAIR_RTTS * self.base_rtt_ns + 3 * self.scale_ns(expected_ns)
        self._slow_run = self._slow_run + 1 if repaired else 0
        if repaired and self._slow_run < _SLOW_RUN:
            return
        recent = self._recent
        recent.append((now_ns, service_ns / n_bytes))
        while len(recent) > _RECENT_LEAST and now_ns - recent[0][0] > self.config.rate_memory_ns:
            recent.popleft()
        ordered = sorted(cost for _, cost in recent)
        quantile = _LOSSY_QUANTILE if self.repair_ns > 0 else _RECENT_QUANTILE
        self._learnt_ns_per_byte = self.ns_per_byte = ordered[int(quantile * len(ordered))]
