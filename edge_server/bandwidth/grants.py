"""Grants: the bitrate each session may send.

A session alone on its link is only held back while it fills a queue; its own controller does the rest. Sessions that
share a bottleneck (a group named by the clients, or one detected by delays that move together) are given what maximises
their summed accuracy above a fairness floor.
Pure: time comes in as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log

from edge_server.bandwidth.allocation import Segment, concave_hull, share
from edge_server.bandwidth.arrivals import Arrivals, LinkRate
from edge_server.bandwidth.bottlenecks import BottleneckConfig, Bottlenecks
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
        min_link_samples: arrivals after which a group's bottleneck counts as measured.
        bottlenecks: how sessions without a named group are found to share one; None: they are not.
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
    min_link_samples: int = 20
    bottlenecks: BottleneckConfig | None = field(default_factory=BottleneckConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.fairness_floor <= 1 or not 0 < self.utilisation <= 1 or not 0 < self.decrease < 1:
            raise ConfigError("fairness_floor must be 0..1, utilisation above 0 and at most 1, decrease between 0 and 1")
        if self.increase_per_s <= 1 or self.interval_ns <= 0 or self.idle_ns <= 0 or self.min_bps <= 0:
            raise ConfigError("increase_per_s must exceed 1; interval_ns, idle_ns and min_bps must be positive")


# Of the logarithm of a payload's bytes over those of the model's table, measured on stills: how fast a session learns it, and all
# sessions of a model together, from whom a new one begins. Smaller differences leave the utility as it is.
_OFF_GAIN, _MODEL_GAIN, _SAME_OFF, _MOST_OFF = 0.1, 0.02, 0.1, log(256.0)
_MODELS = 64


@dataclass(slots=True)
class _Session:
    group: str  # as it is now
    fps: float
    table: tuple[Segment, ...]  # the utility as the model's table has it
    model: str = ""
    off: float = 0.0  # logarithm of what a payload costs over what the table says
    frames: int = 0
    utility: tuple[Segment, ...] = ()
    arrivals: Arrivals = field(default_factory=Arrivals)
    granted_bps: float = 0.0
    told_ns: int | None = None
    credit_bytes: float = 0.0
    credit_ns: int = 0
    named: bool = False  # the client said which group
    used_off: float = 0.0

    def learn(self, off: float) -> None:
        """Takes one payload's; whoever sends video needs a fraction of what stills cost, and a fraction of the bitrate."""
        self.frames += 1
        self.off += max(_OFF_GAIN, 1 / (self.frames + 2)) * (off - self.off)
        if abs(self.off - self.used_off) > _SAME_OFF:
            self.scale()

    def scale(self) -> None:
        """The utility over the bitrates that it really takes."""
        factor, self.used_off = exp(self.off), self.off
        self.utility = tuple(Segment(slope=s.slope / factor, width_bps=s.width_bps * factor) for s in self.table)


class BandwidthManager:
    """All sessions of one server."""

    def __init__(self, config: BandwidthConfig | None = None) -> None:
        self.config = config or BandwidthConfig()
        self._sessions: dict[str, _Session] = {}
        self._links: dict[str, LinkRate] = {}
        self._shares: dict[str, tuple[int, dict[str, float]]] = {}
        self._members: dict[str, dict[str, _Session]] = {}
        self._bottlenecks = Bottlenecks(self.config.bottlenecks) if self.config.bottlenecks is not None else None
        self._offs: dict[str, float] = {}  # by model
        self._queue_ns = 0
        self._tail_ns = 0

    def open(
        self,
        session_id: str,
        group: str = "",
        *,
        owner: str = "",
        fps: float = 0.0,
        points: Sequence[tuple[float, float]] = (),
        model: str = "",
    ) -> None:
        """A session begins.

        Args:
            session_id: unique among the open ones.
            group: sessions of one owner and one name share a bottleneck; empty: not known, it may be detected.
            owner: whose session it is, without white space; a name means nothing among another owner's.
            fps: frames/s it means to send; 0: unknown (10 is assumed).
            points: (payload bytes, accuracy 0..1) of the operating points it can choose from; empty: unknown, the
                session then counts as gaining from any bitrate, ever less.
            model: whose points they are; what its payloads cost other sessions lately is where this one begins.
        """
        rate = fps if fps > 0 else 10.0
        curve = points or [(1e3 * 2**i, 1 - 0.5 ** (i + 1)) for i in range(8)]
        self.close(session_id)
        key = f"{owner} {group}" if group else ""
        session = self._sessions[session_id] = _Session(key, rate, concave_hull([(8 * b * rate, a) for b, a in curve]))
        session.named, session.model, session.off = bool(key), model, self._offs.get(model, 0.0)
        session.scale()
        self._move(session_id, session, key)
        if not key and self._bottlenecks is not None:
            self._bottlenecks.open(session_id, owner)

    def close(self, session_id: str) -> None:
        """A session ended; unknown ids are ignored."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._move(session_id, session, "")
            if self._bottlenecks is not None:
                self._bottlenecks.close(session_id)

    def on_layer(self, session_id: str, n_bytes: int, sent_ns: int, now_ns: int) -> None:
        """A layer arrived. ``sent_ns`` is the device's monotonic clock, ``now_ns`` ours."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        earliest_ns = session.arrivals.add(n_bytes, sent_ns, now_ns)
        if session.group:
            self._links.setdefault(session.group, LinkRate()).add(n_bytes, earliest_ns, now_ns)
        if self._bottlenecks is not None and not session.named:
            self._bottlenecks.add(session_id, session.arrivals.queue_ns, now_ns)
            if self._bottlenecks.update(now_ns):
                for name, other in self._sessions.items():
                    if not other.named:
                        self._move(name, other, self._bottlenecks.group(name))
        self._charge(session, n_bytes, now_ns)

    def on_payload(self, session_id: str, said_bytes: float, n_bytes: int) -> None:
        """A frame of an operating point arrived, whose payloads the model's table says to have ``said_bytes``."""
        session = self._sessions.get(session_id)
        if session is None or said_bytes <= 0 or n_bytes <= 0:
            return
        off = max(-_MOST_OFF, min(log(n_bytes / said_bytes), _MOST_OFF))
        session.learn(off)
        before = self._offs.pop(session.model, session.off)
        self._offs[session.model] = before + _MODEL_GAIN * (off - before)
        while len(self._offs) > _MODELS:
            del self._offs[next(iter(self._offs))]

    def on_late(self, since_ns: int, now_ns: int) -> None:
        """The server read nothing in between although it should have: delays of that time are not any link's."""
        if self._bottlenecks is not None:
            self._bottlenecks.spoil(since_ns, now_ns)

    def queue_ns(self, session_id: str) -> int:
        """How much longer the session's newest layer was on its way than the fastest lately; 0 where nothing is known."""
        session = self._sessions.get(session_id)
        return max(0, session.arrivals.queue_ns) if session is not None else 0

    def facts(self, session_id: str) -> dict[str, float]:
        """What an operator sees: the bitrate granted (0: no limit was told), and how long the session's bytes queue on its link."""
        session = self._sessions.get(session_id)
        return {"granted_bps": round(session.granted_bps) if session else 0, "link_queue_ms": self.queue_ns(session_id) / 1e6}

    def group(self, session_id: str) -> str:
        """Key of the group the session is in, named or detected; empty: it is in none."""
        session = self._sessions.get(session_id)
        return session.group if session is not None else ""

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

        0 for who keeps to its grant, and for who shares its link with nobody: alone, a client that overruns its grant
        harms no one, and the pause itself would look like a queue on its link. One of a group that does not is read no
        faster than granted: its transport's flow control then holds it back, and the others' share stays theirs.
        """
        session = self._sessions.get(session_id)
        if session is None or not session.group or session.granted_bps <= 0 or session.credit_bytes >= 0:
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
        link = self._links.get(session.group) if session.group else None
        if link is not None and (session.named or link.samples >= self.config.min_link_samples):
            shares = self._shared(session_id, session.group, link, now_ns)
            if len(shares) > 1:
                return shares.get(session_id, 0.0)
        c, arrivals = self.config, session.arrivals
        if arrivals.queue_ns > c.overuse_queue_ns and arrivals.trend_ms_per_s > c.overuse_trend_ms_per_s:
            return c.decrease * max(arrivals.delivery_bps(now_ns), arrivals.link.bps * c.decrease)
        return 0.0

    def _shared(self, session_id: str, group: str, link: LinkRate, now_ns: int) -> dict[str, float]:
        at_ns, shares = self._shares.get(group, (0, {}))
        if session_id in shares and 0 <= now_ns - at_ns < self.config.interval_ns:
            return shares
        peers = self._active(group, now_ns)
        capacity_bps = link.bps * self.config.utilisation
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
        return {k: s for k, s in self._members.get(group, {}).items() if now_ns - s.arrivals.last_ns < idle_ns}

    def _move(self, session_id: str, session: _Session, group: str) -> None:
        """Into another group; empty: into none."""
        old, session.group = session.group, group
        if old and session_id in (members := self._members.get(old, {})) and old != group:
            del members[session_id]
            self._shares.pop(old, None)
            if not members:
                self._members.pop(old, None)
                self._links.pop(old, None)
        if group:
            self._members.setdefault(group, {})[session_id] = session
            self._shares.pop(group, None)
