"""Frames between the device and an answer, and when the local model has to step in for them.

All times are monotonic nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from edge_client.control import Decision
from edge_client.engine import Engine, Features
from edge_client.frames import NS_PER_MS, CapturedFrame, FrameReport, Outcome
from protos.messages import Answer
from splitters.preprocess import Frame


@dataclass(slots=True, eq=False, kw_only=True)
class Flight:
    """One frame on its way.

    Attributes:
        engine: the bundle it was encoded with; its local model is the one that may step in.
        deadline_ns: when an answer is worthless; None: never.
        local_image: the local model's input, kept instead of the frame.
        urgent: the server will not answer (stream broken, refused): step in at once.
        answering: the local model is at it.
        features: the stem's, where the prefilter has run it already.
        tries: how often it was sent.
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
    tries: int = 0
    features: Features | None = None
    refusal: str = ""
    refusal_text: str = ""

    def report(self, outcome: Outcome, reason: str, answer: Answer | None, detail: str, *, now_ns: int) -> FrameReport:
        """What sinks and summary are told."""
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
            detail=detail,
        )


def latest_start(flights: Iterable[Flight], *, local_ns: int, margin_ns: int, now_ns: int) -> tuple[int, Flight] | None:
    """The flight the local model has to begin with next, and when.

    The local model answers one frame at a time, so a start may have to come early for the sake of later deadlines:
    going back from the last deadline, each answer must be ready when the next one's turn begins.

    Args:
        flights: those that wait for an answer and are not being answered.
        local_ns: time of one local answer, a high quantile.
        margin_ns: what else may stand in the way (the head's job that is running).
        now_ns: returned for urgent flights.
    """
    waiting = [f for f in flights if not f.answering]
    urgent = [f for f in waiting if f.urgent]
    if urgent:
        return now_ns, min(urgent, key=lambda f: f.deadline_ns if f.deadline_ns is not None else now_ns)
    dated = sorted((f for f in waiting if f.deadline_ns is not None), key=lambda f: f.deadline_ns or 0)
    if not dated:
        return None
    start_ns: int | None = None
    for flight in reversed(dated):
        ready_ns = (flight.deadline_ns or 0) - margin_ns
        start_ns = (ready_ns if start_ns is None else min(ready_ns, start_ns)) - local_ns
    assert start_ns is not None  # noqa: S101 - dated is not empty
    return start_ns, dated[0]
