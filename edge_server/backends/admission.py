"""Who still makes it when the tail is the bottleneck: earliest deadline first, and an early, plain no to the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import groupby


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A frame that waits for the tail.

    Attributes:
        key: whatever the caller wants back.
        deadline_ns: on the server's clock; None: no deadline.
        cost_ns: of the tail's time.
        asked: how much its client asks of the tail, roughly: the logarithm of it.
    """

    key: object
    deadline_ns: int | None
    cost_ns: int
    asked: int = 0


def shed(queue: Iterable[Work], now_ns: int, *, margin_ns: int = 0) -> tuple[list[Work], list[Work]]:
    """Splits waiting work into (what to run, in order; what to refuse now).

    Moore and Hodgson (1968): in order of deadlines, and whenever one would come too late, the longest so far gives
    way. That refuses the fewest frames possible. Clients that ask little are placed first, and those that ask more get what is
    left, so that a flood makes nobody late but itself. ``margin_ns`` is the time an answer needs back to the device.
    """
    kept: list[Work] = []
    refused: list[Work] = []
    works = sorted(queue, key=lambda work: work.asked)
    for asked, group in groupby(works, key=lambda work: work.asked):
        kept, gone = _placed(kept, list(group), asked, now_ns + margin_ns)
        refused += gone
    return kept, refused


def _placed(kept: list[Work], group: list[Work], asked: int, at_ns: int) -> tuple[list[Work], list[Work]]:
    """A group's work among what is kept already and stays; only the group's own gives way."""
    longest: list[tuple[int, int, Work]] = []  # heap of the group's
    gone: set[int] = set()
    ordered = sorted([*kept, *group], key=_deadline)
    for i, work in enumerate(ordered):
        if work.asked == asked:
            heappush(longest, (-work.cost_ns, i, work))
        at_ns += work.cost_ns
        while work.deadline_ns is not None and at_ns > work.deadline_ns and longest:
            cost, _, gives_way = heappop(longest)
            at_ns += cost
            gone.add(id(gives_way))
    return [w for w in ordered if id(w) not in gone], [w for w in ordered if id(w) in gone]


def _deadline(work: Work) -> float:
    return float("inf") if work.deadline_ns is None else float(work.deadline_ns)
