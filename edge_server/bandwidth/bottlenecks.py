"""Which sessions share a bottleneck: those whose queueing delays rise and fall together.

A queue at a common link delays every session that sends through it, so the delays of these sessions move together, and
those of sessions on other links do not. Each session's delay is kept slot by slot. Once a second two rank correlations are
computed for every pair: of the delays, and of their changes from slot to slot after the drift of the neighbouring seconds is
taken off. The second one keeps a single spike, or two links that happen to fill and drain together, from counting.
A pair is joined after several such seconds. It is parted after more seconds in which both queue and the delays have nothing
in common. An empty queue says neither, but a pair that nothing has confirmed for a minute is parted too. The idea is that
of shared bottleneck detection for coupled congestion control (RFC 8382), which compares summaries of each flow; one server
sees all flows and can compare the delays themselves.

What it brings (20 cameras with the default classifier at 10 fps on one link, 60 s simulated, two seeds; summed accuracy of answers
in time, without it → with it → in a named group): 1 Mbit/s 13.2 → 13.4 → 13.5, 2 Mbit/s 13.9 → 14.2 → 14.3, 3 Mbit/s 14.4 → 14.5 →
14.5; from 5 Mbit/s on nothing, since there every camera may send all it wants. With the detector: 4 Mbit/s +2 %, 2 Mbit/s nothing.

Pure: time comes in as an argument. One update costs a few products of a (sessions x slots) matrix with its transpose.
Sessions beyond the matrix's size are left out.

Shape legend: S rows (sessions), W slots.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError

_Floats = NDArray[np.float64]

# The largest of n independent correlations over m slots is about sqrt(2 ln n / m). A correlation must exceed that by this
# many standard deviations.
_BEYOND_CHANCE = 0.5
_AROUND = 4  # slots to either side


@dataclass(frozen=True, kw_only=True, slots=True)
class BottleneckConfig:
    """Settings of the detection.

    Attributes:
        max_sessions: compared with each other; also the bound on the work.
        slot_ns: one delay is kept for each.
        slots: how many are remembered.
        interval_ns: the comparison is made this often.
        min_common: slots in which both sessions must have sent to be compared.
        min_spread_ns: between a session's 20th and 80th percentile of delay; less is no queue worth the name.
        join, join_changes: rank correlation of delays, and of their changes, from which on a pair looks joined. That of the
            changes must also exceed the largest that chance gives among that many pairs.
        part: rank correlation of the changes below which a pair looks apart.
        part_spread_ns: spread both must have to look apart. Far above what payloads of different sizes make of it: once a
            group is granted what its link carries, its queue is gone and each delay goes its own small way.
        joins, parts: comparisons in a row that must say so.
        unconfirmed_ns: a joint is dissolved when it has not looked joined for so long.
    """

    max_sessions: int = 256
    slot_ns: int = 200_000_000
    slots: int = 60
    interval_ns: int = 1_000_000_000
    min_common: int = 25
    min_spread_ns: int = 4_000_000
    join: float = 0.6
    join_changes: float = 0.4
    part: float = 0.15
    part_spread_ns: int = 40_000_000
    joins: int = 4
    parts: int = 8
    unconfirmed_ns: int = 60_000_000_000

    def __post_init__(self) -> None:
        if min(self.max_sessions, self.slot_ns, self.interval_ns, self.joins, self.parts) < 1 or self.unconfirmed_ns < 0:
            raise ConfigError("max_sessions, slot_ns, interval_ns, joins and parts must be positive, unconfirmed_ns not negative")
        if not 3 <= self.min_common <= self.slots or not -1 <= self.part < self.join <= 1 or not -1 <= self.join_changes <= 1:
            raise ConfigError("min_common must be 3..slots, part below join, correlations -1..1")


class Bottlenecks:
    """Detected groups of one server's sessions."""

    def __init__(self, config: BottleneckConfig | None = None) -> None:
        self.config = c = config or BottleneckConfig()
        self._rows: dict[str, int] = {}  # in the order they were opened
        self._free = list(range(c.max_sessions - 1, -1, -1))
        self._owners: dict[int, str] = {}
        self._delays: _Floats = np.empty((0, c.slots))
        self._score: NDArray[np.int16] = np.empty((0, 0), np.int16)
        self._joined: NDArray[np.bool_] = np.empty((0, 0), np.bool_)
        self._confirmed_ns: NDArray[np.int64] = np.empty((0, 0), np.int64)
        self._slot = -1
        self._due_ns: int | None = None
        self._groups: dict[str, str] = {}
        self._named = 0

    def open(self, session_id: str, owner: str = "") -> None:
        """A session begins. Only sessions of one owner are ever joined: nobody's delays can touch a stranger's grant."""
        if session_id in self._rows or not self._free:
            return
        row = self._rows[session_id] = self._free.pop()
        self._owners[row] = owner
        if row >= len(self._delays):
            self._grow(min(self.config.max_sessions, max(16, 2 * (row + 1))))
        self._clear(row)

    def close(self, session_id: str) -> None:
        """A session ended; unknown ids are ignored."""
        row = self._rows.pop(session_id, None)
        if row is not None:
            self._clear(row)
            self._owners.pop(row)
            self._free.append(row)
            self._groups.pop(session_id, None)

    def add(self, session_id: str, queue_ns: int, now_ns: int) -> None:
        """A layer arrived that had waited ``queue_ns``. Of several in one slot the least counts: it met the queue alone."""
        row = self._rows.get(session_id)
        if row is None or not self._move_to(now_ns):
            return
        column = self._slot % self.config.slots
        known = self._delays[row, column]
        if not known <= queue_ns:  # also where nothing is known
            self._delays[row, column] = float(queue_ns)

    def spoil(self, since_ns: int, now_ns: int) -> None:
        """The server itself was late in between, which delays everyone alike and says nothing of any link."""
        if not self._move_to(now_ns):
            return
        first = max(since_ns // self.config.slot_ns, self._slot - self.config.slots + 1)
        for slot in range(int(first), self._slot + 1):
            self._delays[:, slot % self.config.slots] = np.nan

    def group(self, session_id: str) -> str:
        """The name of the session's group; empty: it is in none."""
        return self._groups.get(session_id, "")

    def update(self, now_ns: int) -> bool:
        """Compares, when it is time to; whether any session's group has changed."""
        if self._due_ns is None or now_ns < self._due_ns - self.config.interval_ns:  # the first call, or the clock jumped back
            self._due_ns = now_ns + self.config.interval_ns
        if now_ns < self._due_ns or len(self._rows) < 2:
            return False
        self._due_ns = now_ns + self.config.interval_ns
        self._compare(now_ns)
        before, self._groups = self._groups, self._clusters()
        return before != self._groups

    # ------------------------------------------------------------------ inside

    def _grow(self, size: int) -> None:
        old = len(self._delays)
        delays, score = np.full((size, self.config.slots), np.nan), np.zeros((size, size), np.int16)
        joined, confirmed = np.zeros((size, size), np.bool_), np.zeros((size, size), np.int64)
        delays[:old], score[:old, :old], joined[:old, :old] = self._delays, self._score, self._joined
        confirmed[:old, :old] = self._confirmed_ns
        self._delays, self._score, self._joined, self._confirmed_ns = delays, score, joined, confirmed

    def _clear(self, row: int) -> None:
        self._delays[row] = np.nan
        for matrix in (self._score, self._joined, self._confirmed_ns):
            matrix[row] = 0
            matrix[:, row] = 0

    def _move_to(self, now_ns: int) -> bool:
        slot, n = now_ns // self.config.slot_ns, self.config.slots
        if slot < self._slot - n:  # the clock jumped back: what was kept is of another time
            self._slot = slot - n
        if slot < self._slot:
            return False
        for passed in range(max(self._slot + 1, slot - n + 1), slot + 1):
            self._delays[:, passed % n] = np.nan
        self._slot = slot
        return True

    def _compare(self, now_ns: int) -> None:
        c = self.config
        order = np.arange(self._slot + 1, self._slot + 1 + c.slots) % c.slots  # oldest first
        rows = np.array([r for r in self._rows.values() if np.count_nonzero(~np.isnan(self._delays[r])) >= c.min_common], np.intp)
        pair = np.ix_(rows, rows)
        if len(rows) >= 2:
            delays = self._delays[rows][:, order]
            common, together = _rank_correlation(delays)
            _, changes = _rank_correlation(_ripple(delays))
            low, high = np.nanpercentile(delays, (20, 80), axis=1)
            spread = np.minimum.outer(high - low, high - low)
            owners = [self._owners[r] for r in rows.tolist()]
            kin = np.array([[a == b for b in owners] for a in owners]) & ~np.eye(len(rows), dtype=bool)
            comparable = (common >= c.min_common) & kin
            chance = (2 * log(max(2, len(rows) * (len(rows) - 1) / 2))) ** 0.5 + _BEYOND_CHANCE
            least = np.maximum(c.join_changes, chance / np.sqrt(np.maximum(common, 1.0)))
            alike = comparable & (spread >= c.min_spread_ns) & (together >= c.join) & (changes >= least)
            unlike = comparable & (spread >= c.part_spread_ns) & (changes < c.part)
            score = self._score[pair]
            # Runs: a positive one of likeness, a negative one of unlikeness; neither ends when there is nothing to see.
            score = np.where(alike, np.maximum(score, 0) + 1, np.where(unlike, np.minimum(score, 0) - 1, score))
            self._score[pair] = np.clip(score, -c.parts, c.joins)
            joined = self._joined[pair]
            self._joined[pair] = (joined | (score >= c.joins)) & ~(score <= -c.parts)
            self._confirmed_ns[pair] = np.where(alike, now_ns, self._confirmed_ns[pair])
        stale = self._joined & (np.abs(now_ns - self._confirmed_ns) > c.unconfirmed_ns)
        self._joined &= ~stale
        self._score[stale] = 0

    def _clusters(self) -> dict[str, str]:
        """Oldest session first: each joins the cluster with most of whose members it is joined, or begins its own."""
        clusters: list[list[int]] = []
        names: dict[int, str] = {row: name for name, row in self._rows.items()}
        for row in self._rows.values():
            joined = self._joined[row]
            if not joined.any():
                continue
            shares = [joined[members].mean() for members in clusters]
            best = max(range(len(shares)), key=shares.__getitem__, default=-1)
            if best >= 0 and shares[best] > 0.5:
                clusters[best].append(row)
            else:
                clusters.append([row])
        found: dict[str, str] = {}
        taken: set[str] = set()
        for members in sorted((m for m in clusters if len(m) > 1), key=len, reverse=True):
            known = Counter(g for r in members if (g := self._groups.get(names[r], "")) and g not in taken)
            label = known.most_common(1)[0][0] if known else self._new_name()
            taken.add(label)
            found |= {names[r]: label for r in members}
        return found

    def _new_name(self) -> str:
        self._named += 1
        return f"\0{self._named}"  # no group a client names begins like this


def _ripple(delays: _Floats) -> _Floats:
    """Changes from slot to slot less their mean over the two seconds around: (S, W) to (S, W - 1), NaN where unknown."""
    changes = np.diff(delays, axis=1)
    known = ~np.isnan(changes)
    sums = np.cumsum(np.pad(np.where(known, changes, 0.0), ((0, 0), (_AROUND + 1, _AROUND)), mode="constant"), axis=1)
    counts = np.cumsum(np.pad(known.astype(float), ((0, 0), (_AROUND + 1, _AROUND)), mode="constant"), axis=1)
    width = 2 * _AROUND + 1
    means = (sums[:, width:] - sums[:, :-width]) / np.maximum(counts[:, width:] - counts[:, :-width], 1.0)
    return np.asarray(changes - means)


def _rank_correlation(values: _Floats) -> tuple[_Floats, _Floats]:
    """Columns two rows have in common, (S, S), and Spearman's correlation over them, 0 where it is not defined.

    ``values``: (S, W), NaN where there is none. Ranks are of each row's own values, ties by position.
    """
    known = ~np.isnan(values)
    order = np.argsort(np.where(known, values, np.inf), axis=1, kind="stable")
    ranks = np.empty_like(values)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(values.shape[1], dtype=float), values.shape), axis=1)
    n_own = known.sum(axis=1, keepdims=True)
    mask = known.astype(float)
    x = np.where(known, ranks - (n_own - 1) / 2, 0.0)
    n = mask @ mask.T
    total, squares, products = x @ mask.T, (x * x) @ mask.T, x @ x.T
    safe = np.maximum(n, 1.0)
    variance = np.maximum(squares - total * total / safe, 0.0)
    scale = np.sqrt(variance * variance.T)
    covariance = products - total * total.T / safe
    return n, np.where(scale > 1e-9, covariance / np.maximum(scale, 1e-9), 0.0)
