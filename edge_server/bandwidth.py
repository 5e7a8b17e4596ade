"""Grants: the bitrate each session may send.

A session alone on its link is only held back while it fills a queue; its own controller does the rest. Sessions that
share a bottleneck (a group named by the clients) are given what maximises their summed accuracy above a fairness floor.
Pure: time comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_server.allocation import Segment, concave_hull, share
from edge_server.arrivals import Arrivals, LinkRate
from protos.errors import ConfigError
from protos.messages import Grant


@dataclass(frozen=True, kw_only=True, slots=True)
class BandwidthConfig:
    """Settings of the grants.

    Attributes:
        fairness_floor: share of an equal part every session of a group gets, 0..1.
        utilisation: share of the estimated bottleneck that is handed out, (0, 1].
        interval_ns: a session's grant is renewed this often at most.
        overuse_queue_ns, overuse_trend_ms_per_s: queueing delay and its growth beyond which the link is overused.
        decrease: factor on the delivered bitrate while overused, (0, 1).
        increase_per_s: factor by which a grant may grow in a second, above 1.
        idle_ns: a session silent for this long takes no part in the sharing.
        min_bps: no grant is smaller.
    """

    fairness_floor: float = 0.5
    utilisation: float = 0.9
    interval_ns: int = 200_000_000
    overuse_queue_ns: int = 25_000_000
    overuse_trend_ms_per_s: float = 20.0
    decrease: float = 0.85
    increase_per_s: float = 1.5
    idle_ns: int = 2_000_000_000
    min_bps: int = 16_000

    def __post_init__(self) -> None:
        if not 0 <= self.fairness_floor <= 1 or not 0 < self.utilisation <= 1 or not 0 < self.decrease < 1:
            raise ConfigError("fairness_floor must be 0..1, utilisation above 0 and at most 1, decrease between 0 and 1")
        if self.increase_per_s <= 1 or self.interval_ns <= 0 or self.idle_ns <= 0 or self.min_bps <= 0:
            raise ConfigError("increase_per_s must exceed 1; interval_ns, idle_ns and min_bps must be positive")


@dataclass(slots=True)
class _Session:
    group: str
    fps: float
    utility: tuple[Segment, ...]
    arrivals: Arrivals = field(default_factory=Arrivals)
    granted_bps: float = 0.0
    told_ns: int | None = None
    credit_bytes: float = 0.0
    credit_ns: int = 0


class BandwidthManager:
    """All sessions of one server."""

    def __init__(self, config: BandwidthConfig | None = None) -> None:
        self.config = config or BandwidthConfig()
        self._sessions: dict[str, _Session] = {}
        self._links: dict[str, LinkRate] = {}
        self._shares: dict[str, tuple[int, dict[str, float]]] = {}
        self._queue_ns = 0
        self._tail_ns = 0

    def open(self, session_id: str, group: str = "", *, fps: float = 0.0, points: Sequence[tuple[float, float]] = ()) -> None:
        """A session begins.

        Args:
            session_id: unique among the open ones.
            group: sessions of one name share a bottleneck; empty: not known.
            fps: frames/s it means to send; 0: unknown (10 is assumed).
            points: (payload bytes, accuracy 0..1) of the operating points it can choose from; empty: unknown, the
                session then counts as gaining from any bitrate, ever less.
        """
        rate = fps if fps > 0 else 10.0
        curve = points or [(1e3 * 2**i, 1 - 0.5 ** (i + 1)) for i in range(8)]
        self._sessions[session_id] = _Session(group, rate, concave_hull([(8 * b * rate, a) for b, a in curve]))
        self._shares.pop(group, None)

    def close(self, session_id: str) -> None:
        """A session ended; unknown ids are ignored."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._shares.pop(session.group, None)
            if not any(s.group == session.group for s in self._sessions.values()):
                self._links.pop(session.group, None)

    def on_layer(self, session_id: str, n_bytes: int, sent_ns: int, now_ns: int) -> None:
        """A layer arrived. ``sent_ns`` is the device's monotonic clock, ``now_ns`` ours."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        earliest_ns = session.arrivals.add(n_bytes, sent_ns, now_ns)
        if session.group:
            self._links.setdefault(session.group, LinkRate()).add(n_bytes, earliest_ns, now_ns)
        self._charge(session, n_bytes, now_ns)

    def on_tail(self, queue_ns: int, tail_ns: int) -> None:
        """The tail's recent p95 wait and time, passed on with every grant."""
        self._queue_ns, self._tail_ns = max(0, queue_ns), max(0, tail_ns)

    def grant(self, session_id: str, now_ns: int) -> Grant | None:
        """The session's grant, when it is due and says something new; else None."""
        session = self._sessions.get(session_id)
        if session is None or session.arrivals.link.samples == 0:
            return None
        since_ns = self.config.interval_ns if session.told_ns is None else now_ns - session.told_ns
        if since_ns < self.config.interval_ns:
            return None
        target_bps = self._target_bps(session_id, session, now_ns)
        if session.granted_bps > 0 and target_bps > session.granted_bps:
            growth = self.config.increase_per_s ** min(since_ns / 1e9, 5.0)
            target_bps = min(target_bps, session.granted_bps * growth)
        target_bps = max(target_bps, float(self.config.min_bps)) if target_bps > 0 else 0.0
        small = session.granted_bps > 0 and abs(target_bps - session.granted_bps) < 0.03 * session.granted_bps
        if small and since_ns < 5 * self.config.interval_ns:
            return None
        session.granted_bps, session.told_ns = target_bps, now_ns
        return Grant(
            bitrate_bps=int(target_bps),
            queue_ns=self._queue_ns,
            tail_ns=self._tail_ns,
            delivery_bps=session.arrivals.delivery_bps(now_ns),
            delay_trend=session.arrivals.trend_ms_per_s,
        )

    def pause_ns(self, session_id: str, now_ns: int) -> int:
        """How long the server should wait before it reads this session's next message.

        0 for who keeps to its grant. One who does not is read no faster than granted: its transport's flow control
        then holds it back, and the others' share of the link stays theirs.
        """
        session = self._sessions.get(session_id)
        if session is None or session.granted_bps <= 0 or session.credit_bytes >= 0:
            return 0
        owed_s = -session.credit_bytes * 8 / session.granted_bps - (now_ns - session.credit_ns) / 1e9
        return max(0, min(int(owed_s * 1e9), 5_000_000_000))

    def _charge(self, session: _Session, n_bytes: int, now_ns: int) -> None:
        # Two seconds of grant may be saved: arrivals bunch up behind a stalled link through no fault of the sender.
        if session.granted_bps <= 0:
            session.credit_bytes, session.credit_ns = 0.0, now_ns
            return
        gained = max(0, now_ns - session.credit_ns) / 1e9 * session.granted_bps / 8
        session.credit_bytes = min(session.credit_bytes + gained, 2 * session.granted_bps / 8) - n_bytes
        session.credit_ns = now_ns

    def _target_bps(self, session_id: str, session: _Session, now_ns: int) -> float:
        if session.group:
            peers = self._active(session.group, now_ns)
            if len(peers) > 1:
                return self._shared(session.group, peers, now_ns).get(session_id, 0.0)
        c, arrivals = self.config, session.arrivals
        if arrivals.queue_ns > c.overuse_queue_ns and arrivals.trend_ms_per_s > c.overuse_trend_ms_per_s:
            return c.decrease * max(arrivals.delivery_bps(now_ns), arrivals.link.bps * c.decrease)
        return 0.0

    def _shared(self, group: str, peers: dict[str, _Session], now_ns: int) -> dict[str, float]:
        at_ns, shares = self._shares.get(group, (0, {}))
        if shares and 0 <= now_ns - at_ns < self.config.interval_ns and shares.keys() == peers.keys():
            return shares
        capacity_bps = self._links[group].bps * self.config.utilisation
        over = sum(
            s.arrivals.queue_ns > self.config.overuse_queue_ns and s.arrivals.trend_ms_per_s > self.config.overuse_trend_ms_per_s
            for s in peers.values()
        )
        if 2 * over > len(peers):
            capacity_bps *= self.config.decrease
        shares = share(capacity_bps, {k: s.utility for k, s in peers.items()}, floor=self.config.fairness_floor)
        self._shares[group] = (now_ns, shares)
        return shares

    def _active(self, group: str, now_ns: int) -> dict[str, _Session]:
        idle_ns = self.config.idle_ns
        return {k: s for k, s in self._sessions.items() if s.group == group and now_ns - s.arrivals.last_ns < idle_ns}
