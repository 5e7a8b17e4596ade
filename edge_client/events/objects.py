"""Which box of this frame is which object of the frames before: identity by overlap.

A box goes on with the object of its class that it overlaps most; where none overlaps, with one that is near for its size, since
small things move by more than their own width between two answers. What nobody goes on with is a new object.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import hypot

from protos.messages import Answer, Classification, Detection
from splitters.tasks.base import Labels
from splitters.tasks.canvas import label_of

BoxPx = tuple[float, float, float, float]

_OVERLAP = 0.2
_NEAR = 1.0  # of the box's longer side
_FRESH_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Something in one frame; ``box_px`` xyxy in the source's pixels, None: the whole picture."""

    label: str
    score: float
    box_px: BoxPx | None = None


@dataclass(slots=True, kw_only=True)
class Tracked:
    """An object over time; times in seconds of the source."""

    number: int
    seen: Seen
    first_s: float
    last_s: float
    told: bool = False
    told_s: float = 0.0
    zones: tuple[str, ...] = field(default_factory=tuple)


def seen_in(answer: Answer, labels: Labels) -> list[Seen]:
    """The things an answer names: every box, or a classification's first class."""
    if isinstance(answer, Detection):
        return [Seen(label=label_of(b.class_id, labels), score=b.score, box_px=b.box_px) for b in answer.boxes]
    if isinstance(answer, Classification) and answer.top:
        return [Seen(label=label_of(answer.top[0].class_id, labels), score=answer.top[0].score)]
    return []


class Objects:
    """Gives identities; forgets what was not seen for ``left_s``."""

    def __init__(self, *, left_s: float) -> None:
        self._left_s = left_s
        self._next = 1
        self.known: list[Tracked] = []

    def update(self, seen: Iterable[Seen], now_s: float) -> list[Tracked]:
        """One frame; the objects that have left with it."""
        free = list(self.known)
        fresh: list[Seen] = []
        things = list(seen)
        pairs = sorted(
            ((fit, i, j) for i, s in enumerate(things) for j, t in enumerate(free) if (fit := _fit(s, t, now_s)) > 0), reverse=True
        )
        taken: set[int] = set()
        placed: set[int] = set()
        for _, i, j in pairs:
            if i not in placed and j not in taken:
                placed.add(i)
                taken.add(j)
                free[j].seen, free[j].last_s = things[i], now_s
        fresh = [s for i, s in enumerate(things) if i not in placed]
        for thing in fresh:
            self.known.append(Tracked(number=self._next, seen=thing, first_s=now_s, last_s=now_s))
            self._next += 1
        left = [t for t in self.known if now_s - t.last_s > self._left_s]
        self.known = [t for t in self.known if now_s - t.last_s <= self._left_s]
        return left


def _fit(seen: Seen, tracked: Tracked, now_s: float) -> float:
    """How well a box goes on with an object: 1 to 2 by overlap, 0 to 1 by nearness, 0: not at all."""
    before = tracked.seen
    if seen.label != before.label:
        return 0.0
    if seen.box_px is None or before.box_px is None:
        return 2.0
    overlap = _iou(seen.box_px, before.box_px)
    if overlap >= _OVERLAP:
        return 1 + overlap
    if now_s - tracked.last_s > _FRESH_S:
        return 0.0
    (ax, ay), (bx, by) = _middle(seen.box_px), _middle(before.box_px)
    side = max(before.box_px[2] - before.box_px[0], before.box_px[3] - before.box_px[1], 1.0)
    return max(0.0, 1 - hypot(ax - bx, ay - by) / (_NEAR * side))


def _iou(a: BoxPx, b: BoxPx) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, w) * max(0.0, h)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def _middle(box: BoxPx) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
