"""Who still makes it when the tail is the bottleneck: earliest deadline first, and an early, plain no to the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A frame that waits for the tail. ``deadline_ns`` is on the server's clock; None: no deadline."""

    key: object
    deadline_ns: int | None
    cost_ns: int


def shed(queue: Iterable[Work], now_ns: int, *, margin_ns: int = 0) -> tuple[list[Work], list[Work]]:
    """Splits waiting work into (what to run, in order; what to refuse now).

    Moore and Hodgson (1968): in order of deadlines, and whenever one would come too late, the longest so far gives
    way. That refuses the fewest frames possible. ``margin_ns`` is the time an answer needs back to the device.
    """
    kept: list[tuple[int, int, Work]] = []  # heap of the longest first
    refused: list[Work] = []
    busy_ns = 0
    ordered = sorted(queue, key=_deadline)
    for i, work in enumerate(ordered):
        heappush(kept, (-work.cost_ns, i, work))
        busy_ns += work.cost_ns
        if work.deadline_ns is not None and now_ns + busy_ns + margin_ns > work.deadline_ns:
            cost, _, longest = heappop(kept)
            busy_ns += cost
            refused.append(longest)
    return sorted((w for _, _, w in kept), key=_deadline), refused


def _deadline(work: Work) -> float:
    return float("inf") if work.deadline_ns is None else float(work.deadline_ns)
