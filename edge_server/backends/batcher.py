"""The order in which frames reach the tail: earliest deadline first, equals together, latecomers refused.

Pure: time comes in as an argument; the lock, the thread and the answers are the backend's. Deadlines are on the
server's monotonic clock in ns, ``None`` for none. Frames batch together when their ``key`` is the same: one bundle, one
kind of payload, one shape. A single tail batches every operating point of a bundle with any other, since the latent's
shape does not depend on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Generic, TypeVar

from edge_server.backends.admission import Work, shed
from edge_server.config import BatchConfig
from protos.errors import OverloadedError

T = TypeVar("T")

_SMOOTHING = 0.2  # weight of the newest of the tail's times
_PRESENT_NS = 2_000_000_000  # a client counts as present for so long after its last frame
_SHARED_RUN_NS = 30_000_000  # longest run of the tail while several clients are present: whoever comes next waits for its end
_STALE_NS = 500_000_000  # a time that nothing has confirmed for so long refuses no frame: one slow run must not do so for ever


@dataclass(slots=True)
class Waiting(Generic[T]):
    """A frame in the queue; ``item`` is whatever the backend wants back."""

    key: Hashable
    deadline_ns: int | None
    queued_ns: int
    item: T
    order: int = 0
    client: str = ""

    @property
    def urgency(self) -> tuple[float, int]:
        """Sorts by deadline, then by arrival."""
        return (inf if self.deadline_ns is None else self.deadline_ns, self.order)


class TailTimes:
    """What a batch of n has taken lately, per key: smoothed, and between measured sizes interpolated."""

    def __init__(self) -> None:
        self._by_key: dict[Hashable, dict[int, float]] = {}
        self._run_ns: dict[Hashable, int] = {}

    def add(self, key: Hashable, size: int, tail_ns: int, now_ns: int) -> None:
        """Records one run of the tail, over at ``now_ns``."""
        self._run_ns[key] = now_ns
        times = self._by_key.setdefault(key, {})
        times[size] = tail_ns if size not in times else times[size] + _SMOOTHING * (tail_ns - times[size])

    def estimate_ns(self, key: Hashable, size: int, now_ns: int) -> int:
        """Expected time of a batch of ``size``; 0 while nothing is known, or nothing recent."""
        times = self._by_key.get(key)
        if not times or now_ns - self._run_ns[key] > _STALE_NS:
            return 0
        if size in times:
            return int(times[size])
        below = max((s for s in times if s < size), default=None)
        above = min((s for s in times if s > size), default=None)
        if below is None or above is None:
            # Outside of what was measured: in proportion upwards, no cheaper than one frame's share downwards.
            known = below if below is not None else above
            assert known is not None  # noqa: S101 - times is not empty
            return int(times[known] * size / known)
        share = (size - below) / (above - below)
        return int(times[below] + share * (times[above] - times[below]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch(Generic[T]):
    """What to run now, and what to refuse now."""

    run: list[Waiting[T]]
    refused: list[Waiting[T]] = field(default_factory=list)


class BatchQueue(Generic[T]):
    """Frames that wait for one tail executor."""

    def __init__(self, config: BatchConfig) -> None:
        self.config = config
        self.times = TailTimes()
        self._waiting: list[Waiting[T]] = []
        self._order = count()
        self._seen_ns: dict[str, int] = {}  # by client, when its last frame came

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Hashable, deadline_ns: int | None, now_ns: int, item: T, *, client: str = "") -> None:
        """Queues a frame.

        Raises:
            OverloadedError: the queue, or its client's part of it, is full, or the frame would be late even if it ran at once.
        """
        self._seen_ns[client] = now_ns
        if len(self._waiting) >= self.config.max_queue:
            raise OverloadedError(f"{len(self._waiting)} frames wait for the tail already")
        if len(self._waiting) >= self.config.max_queue // 2 and self._shared(now_ns):
            own = sum(w.client == client for w in self._waiting)
            if own >= self.config.max_queue // 2:
                raise OverloadedError(f"{own} frames of this client wait for the tail already")
        if deadline_ns is not None and now_ns + self.times.estimate_ns(key, 1, now_ns) + self.config.margin_ns > deadline_ns:
            raise OverloadedError(self._too_late(key, now_ns))
        self._waiting.append(Waiting(key, deadline_ns, now_ns, item, next(self._order), client))

    def _shared(self, now_ns: int) -> bool:
        """Whether several clients are present."""
        if len(self._seen_ns) > 1:
            self._seen_ns = {c: at_ns for c, at_ns in self._seen_ns.items() if now_ns - at_ns <= _PRESENT_NS}
        return len(self._seen_ns) > 1

    def remove(self, items: set[int]) -> None:
        """Forgets frames whose sender is gone, by ``id(item)``."""
        self._waiting = [w for w in self._waiting if id(w.item) not in items]

    def clear(self) -> list[Waiting[T]]:
        """Empties the queue and returns what waited."""
        gone, self._waiting = self._waiting, []
        return gone

    def hold_ns(self, now_ns: int) -> int:
        """How long to wait for company before `take`; 0: take now."""
        delay_ns = self.config.max_delay_ns
        if not self._waiting or delay_ns == 0 or len(self._waiting) >= self.config.max_batch:
            return 0
        until_ns = min(w.queued_ns for w in self._waiting) + delay_ns
        for w in self._waiting:
            if w.deadline_ns is not None:
                until_ns = min(
                    until_ns, w.deadline_ns - self.times.estimate_ns(w.key, len(self._waiting), now_ns) - 2 * self.config.margin_ns
                )
        return max(0, until_ns - now_ns)

    def take(self, now_ns: int) -> Batch[T]:
        """Removes and returns the next batch, with the frames that can no longer be answered in time."""
        self._waiting.sort(key=lambda w: w.urgency)
        refused = self._shed(now_ns)
        if not self._waiting:
            return Batch(run=[], refused=refused)
        first = self._waiting[0]
        same = [w for w in self._waiting if w.key == first.key][: self.config.max_batch]
        chosen = same[: self._size(same, now_ns)]
        taken = {id(w) for w in chosen}
        self._waiting = [w for w in self._waiting if id(w) not in taken]
        return Batch(run=chosen, refused=refused)

    def _size(self, same: list[Waiting[T]], now_ns: int) -> int:
        """As many as finish before the most urgent one's deadline, and soon where others may come; at least one."""
        deadline_ns, most_ns = same[0].deadline_ns, inf
        if deadline_ns is not None:
            most_ns = deadline_ns - now_ns - self.config.margin_ns
        if self._shared(now_ns):
            most_ns = min(most_ns, _SHARED_RUN_NS)
        size = len(same)
        while size > 1 and self.times.estimate_ns(same[0].key, size, now_ns) > most_ns:
            size -= 1
        return size

    def _shed(self, now_ns: int) -> list[Waiting[T]]:
        costs = {key: self._cost_ns(key, now_ns) for key in {w.key for w in self._waiting}}
        at_ns, late = now_ns + self.config.margin_ns, False
        for w in self._waiting:
            at_ns += costs[w.key]
            late = late or (w.deadline_ns is not None and at_ns > w.deadline_ns)
        if not late:
            return []
        asked_ns: Counter[str] = Counter()
        for w in self._waiting:
            asked_ns[w.client] += costs[w.key]
        works = [
            Work(key=w, deadline_ns=w.deadline_ns, cost_ns=costs[w.key], asked=asked_ns[w.client].bit_length())
            for w in self._waiting
        ]
        _, gone = shed(works, now_ns, margin_ns=self.config.margin_ns)
        refused = {id(work.key) for work in gone}
        kept = [w for w in self._waiting if id(w) not in refused]
        out = [w for w in self._waiting if id(w) in refused]
        self._waiting = kept
        return out

    def _cost_ns(self, key: Hashable, now_ns: int) -> int:
        """A frame's share of the batch it is likely to be in."""
        size = min(self.config.max_batch, sum(w.key == key for w in self._waiting))
        return self.times.estimate_ns(key, size, now_ns) // size

    def _too_late(self, key: Hashable, now_ns: int) -> str:
        return (
            f"the tail takes about {self.times.estimate_ns(key, 1, now_ns) / 1e6:.1f} ms, longer than this frame's deadline leaves"
        )

    def refusal(self, waiting: Waiting[T], now_ns: int) -> OverloadedError:
        """Why a refused frame was refused."""
        return OverloadedError(
            f"{len(self._waiting)} frames wait; this one would miss its deadline ({self._too_late(waiting.key, now_ns)})"
        )
