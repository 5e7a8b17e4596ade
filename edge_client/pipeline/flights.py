"""Frames between the device and an answer, and when the local model has to step in for them.

All times are monotonic nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from edge_client.control import Decision, Offload, Split
from edge_client.device.engine import Engine, Features
from edge_client.frames import NS_PER_MS, CapturedFrame, FrameReport, Outcome
from protos.messages import Answer
from splitters.tasks.preprocess import Frame


@dataclass(slots=True, eq=False, kw_only=True)
class Flight:
    """One frame on its way.

    Attributes:
        engine: the bundle it was encoded with; its local model is the one that may step in.
        deadline_ns: when an answer is worthless; None: never.
        local_image: the local model's input, kept instead of the frame.
        urgent: the server will not answer (stream broken, refused): step in at once.
        answering: the local model is at it.
        held: the local model's answer, kept for as long as the server's better one may still come.
        features: the stem's, where the prefilter has run it already.
        tries: how often it was sent.
        wire_id: the id it was last sent under.
        video, key: it was sent as H.264; it depends on no other frame.
        given_up: the local model's time is worth more elsewhere; the server answers before the deadline, or nobody.
        refusal, refusal_text: the code and the sentence with which the server refused it; empty: it did not.
    """

    frame: CapturedFrame
    engine: Engine
    deadline_ns: int | None
    stages_ms: dict[str, float] = field(default_factory=dict)
    decision: Decision | None = None
    point_id: int | None = None
    payload_bytes: int = 0
    encoded_ns: int = 0
    local_image: Frame | None = None
    urgent: bool = False
    answering: bool = False
    held: Answer | None = None
    tries: int = 0
    wire_id: int = -1
    video: bool = False
    key: bool = False
    given_up: bool = False
    features: Features | None = None
    refusal: str = ""
    refusal_text: str = ""

    @property
    def fallback_ns(self) -> int | None:
        """When the controller wants the local model to begin with this frame; None: it did not say."""
        return self.decision.fallback_ns if isinstance(self.decision, Split | Offload) else None

    @property
    def hold(self) -> bool:
        """Whether the server's answer is worth waiting for when the local one is there."""
        return isinstance(self.decision, Split | Offload) and self.decision.hold

    def report(self, outcome: Outcome, reason: str, answer: Answer | None, detail: str, *, now_ns: int) -> FrameReport:
        """What sinks and summary are told."""
        by_hand = f"split {self.point_id}" if self.point_id is not None else ""
        return FrameReport(
            frame=self.frame,
            model=self.engine.model,
            bundle_sha256=self.engine.sha256,
            outcome=outcome,
            reason=reason,
            operating_point=self.point_id,
            payload_bytes=self.payload_bytes,
            stages_ms={**self.stages_ms, "total": (now_ns - self.frame.captured_ns) / NS_PER_MS},
            answer=answer,
            decision=self.decision.name if self.decision is not None else by_hand,
            detail=detail or (self.decision.name if self.decision is not None else ""),
        )


def next_turn(flights: Iterable[Flight], *, local_ns: int, margin_ns: int, wake_ns: int, now_ns: int) -> tuple[int, Flight] | None:
    """The flight that something has to be done about next, and when: the local model's turn, or the end of the wait.

    Urgent ones are due now, those with a ``fallback_ns`` then, those given up at their deadlines, and those whose local answer is
    held just before. All others begin just in
    time: the local model answers one frame at a time, so a start may have to come early for the sake of later deadlines;
    going back from the last deadline, each answer must be ready when the next one's turn begins.

    Args:
        flights: those that wait for an answer and are not being answered.
        local_ns: time of one local answer, a high quantile.
        margin_ns: what else may stand in the way of one that begins just in time (the head's job that is running).
        wake_ns: how late this process may wake up.
        now_ns: returned for urgent flights.
    """
    waiting = [f for f in flights if not f.answering]
    urgent = [f for f in waiting if f.urgent]
    if urgent:
        return now_ns, min(urgent, key=lambda f: f.deadline_ns if f.deadline_ns is not None else now_ns)
    turns: list[tuple[int, Flight]] = []
    just_in_time: list[tuple[int, Flight]] = []
    for f in waiting:
        if f.deadline_ns is None:
            continue
        if f.held is not None:
            turns.append((f.deadline_ns - wake_ns, f))
        elif f.given_up:
            turns.append((f.deadline_ns, f))
        elif f.fallback_ns is not None:
            turns.append((f.fallback_ns - wake_ns, f))
        else:
            just_in_time.append((f.deadline_ns, f))
    just_in_time.sort(key=lambda row: row[0])
    start_ns: int | None = None
    for deadline_ns, _ in reversed(just_in_time):
        ready_ns = deadline_ns - margin_ns
        start_ns = (ready_ns if start_ns is None else min(ready_ns, start_ns)) - local_ns
    if start_ns is not None:
        turns.append((start_ns, just_in_time[0][1]))
    return min(turns, key=lambda turn: turn[0], default=None)
