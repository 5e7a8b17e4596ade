"""One rule at one camera: frames in, events out. Pure; time is the frames' own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edge_client.events.objects import Objects, Seen, Tracked, seen_in
from edge_client.events.rules import EventRule, inside
from edge_client.frames import NS_PER_S, FrameReport, Outcome
from splitters.tasks.base import Labels


class Kind(StrEnum):
    """What happened."""

    APPEARED = "appeared"
    STILL = "still"
    LEFT = "left"
    COUNTS = "counts"
    SERVER = "server"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something to tell.

    Attributes:
        at_unix_ns: of the frame that showed it.
        counts: objects there now, by label, of this rule.
        thing: the object of ``appeared``, ``still`` and ``left``.
        up: of ``server``.
    """

    kind: Kind
    camera: str
    rule: str
    at_unix_ns: int
    frame: int
    counts: dict[str, int] = field(default_factory=dict)
    thing: dict[str, Any] | None = None
    up: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain types, without an id: whoever queues it gives it one."""
        line: dict[str, Any] = {
            "event": self.kind.value, "camera": self.camera, "rule": self.rule, "at_unix_ns": self.at_unix_ns,
            "frame": self.frame, "counts": self.counts,
        }  # fmt: skip
        if self.thing is not None:
            line["object"] = self.thing
        if self.up is not None:
            line["up"] = self.up
        return line


class Watch:
    """Applies a rule.

    Args:
        rule: which objects count.
        camera: its name.
    """

    def __init__(self, rule: EventRule, camera: str) -> None:
        self.rule, self._camera = rule, camera
        self._objects = Objects(left_s=rule.left_s)
        self._counts: dict[str, int] | None = None

    def take(self, report: FrameReport, labels: Labels) -> list[Event]:
        """The events of one frame; one that nothing is known of says nothing."""
        if report.outcome is Outcome.FILTERED:
            things: list[Seen] = []
        elif report.answer is not None:
            frame = report.frame
            things = [s for s in seen_in(report.answer, labels) if self._counts_for(s, frame.width_px, frame.height_px)]
        else:
            return []
        frame = report.frame
        now_s = (frame.position_ns if frame.position_ns is not None else frame.captured_ns) / NS_PER_S
        left = self._objects.update(things, now_s)
        events = []
        told: list[tuple[Kind, Tracked]] = [(Kind.LEFT, t) for t in left if t.told]
        for tracked in self._objects.known:
            if not tracked.told and now_s - tracked.first_s >= self.rule.seconds_min and tracked.last_s == now_s:
                tracked.told, tracked.told_s = True, now_s
                told.append((Kind.APPEARED, tracked))
            elif tracked.told and self.rule.still_s and now_s - tracked.told_s >= self.rule.still_s:
                tracked.told_s = now_s
                told.append((Kind.STILL, tracked))
        counts = dict(sorted(Counter(t.seen.label for t in self._objects.known if t.told).items()))
        events = [self._event(kind, report, counts, self._thing(t, report)) for kind, t in told]
        if counts != self._counts:
            self._counts = counts
            events.append(self._event(Kind.COUNTS, report, counts))
        return events

    def _counts_for(self, seen: Seen, width_px: int, height_px: int) -> bool:
        rule = self.rule
        if seen.score < rule.score_min or (rule.classes and seen.label not in rule.classes):
            return False
        if seen.box_px is None:
            return True
        x1, y1, x2, y2 = seen.box_px
        if (x2 - x1) * (y2 - y1) < rule.area_min * width_px * height_px:
            return False
        middle = ((x1 + x2) / 2 / width_px, (y1 + y2) / 2 / height_px)
        if any(inside(middle, mask) for mask in rule.masks):
            return False
        return not rule.zones or bool(self._zones(seen, width_px, height_px))

    def _zones(self, seen: Seen, width_px: int, height_px: int) -> list[str]:
        if seen.box_px is None:
            return []
        x1, _, x2, y2 = seen.box_px
        # A box may reach over the picture's edge; who stands there still stands in the zone at that edge.
        foot = (min(max((x1 + x2) / 2 / width_px, 0.0), 1.0), min(y2 / height_px, 1 - 1e-9))
        return [zone.name for zone in self.rule.zones if inside(foot, zone.polygon)]

    def _thing(self, tracked: Tracked, report: FrameReport) -> dict[str, Any]:
        seen, frame = tracked.seen, report.frame
        thing: dict[str, Any] = {
            "number": tracked.number, "label": seen.label, "score": round(seen.score, 4),
            "seconds": round(tracked.last_s - tracked.first_s, 3),
        }  # fmt: skip
        if seen.box_px is not None:
            thing["box_px"] = [round(v, 1) for v in seen.box_px]
            thing["zones"] = self._zones(seen, frame.width_px, frame.height_px)
        return thing

    def _event(self, kind: Kind, report: FrameReport, counts: dict[str, int], thing: dict[str, Any] | None = None) -> Event:
        frame = report.frame
        return Event(
            kind=kind, camera=self._camera, rule=self.rule.name, at_unix_ns=frame.captured_unix_ns, frame=frame.index,
            counts=counts, thing=thing,
        )  # fmt: skip
