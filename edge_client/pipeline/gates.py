"""The gates: frames that need no answer of their own.

Nothing moved since the last one (change gate), or nothing of interest is there (prefilter). Both are for cameras, and for files
where they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.device.engine import Features
from edge_client.frames import NS_PER_MS, NS_PER_S, CapturedFrame, Outcome
from edge_client.gates.change import ChangeGate
from edge_client.gates.interest import InterestGate
from edge_client.pipeline.flights import Flight
from edge_client.pipeline.parts import Parts
from protos.messages import Answer

_FAR_NS = 10 * NS_PER_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A gate's: the frame ends here, and how."""

    outcome: Outcome
    answer: Answer | None = None
    detail: str = ""


class Gates:
    """Both gates, and the last answer, which unchanged frames are given."""

    def __init__(self, parts: Parts, *, change: bool) -> None:
        self.passed_index = 0
        self._change = ChangeGate() if change else None
        self._clock, self._frames, self._worker = parts.clock, parts.frames, parts.worker
        self._last: tuple[int, Answer] | None = None

    def looks_unchanged(self, frame: CapturedFrame) -> bool:
        """Whether the frame equals the last one that passed, ``passed_index``; else it is that one from here on."""
        if self._change is None or frame.image is None or frame.raw is not None:
            return False
        # A file is as fast as we are; how long ago something was seen, only its own stamps say.
        now_ns = self._clock() if self._frames.live or frame.position_ns is None else frame.position_ns
        if not self._change.changed(frame.image, now_ns):
            return True
        self.passed_index = frame.index
        return False

    def reuse(self) -> Verdict | None:
        """The answer to the last frame that passed; None while there is none."""
        if self._last is None or self._last[0] < self.passed_index:
            return None
        return Verdict(outcome=Outcome.UNCHANGED, answer=self._last[1], detail=f"as frame {self._last[0]}")

    async def filter(self, flight: Flight, gate: InterestGate | None) -> Verdict | None:
        """Whether the prefilter stops the frame; the head goes on with the features that the prefilter was shown."""
        if gate is None:
            return None
        engine, image = flight.engine, flight.frame.image
        assert image is not None  # noqa: S101 - just captured

        def work() -> tuple[Features, list[float], int]:
            features = engine.features(image, flight.frame.raw)
            start_ns = self._clock()
            return features, engine.head.prefilter_scores(features.maps), self._clock() - start_ns

        features, scores, elapsed_ns = await self._worker.run(work, due_ns=flight.deadline_ns or self._clock() + _FAR_NS)
        flight.features = features
        flight.stages_ms |= {
            "preprocess": features.preprocess_ns / NS_PER_MS,
            "head": features.stem_ns / NS_PER_MS,
            "prefilter": elapsed_ns / NS_PER_MS,
        }
        score = gate.score(scores)
        stopped = gate.stops(flight.frame.index, score)
        return Verdict(outcome=Outcome.FILTERED, detail=f"interest {score:.2f}") if stopped else None

    def on_settled(self, flight: Flight, outcome: Outcome, answer: Answer | None) -> None:
        """A frame was given its outcome; what is known of the newest one is what unchanged frames are given."""
        if outcome is Outcome.FILTERED:
            answer = flight.engine.task.empty()
        if answer is not None and outcome is not Outcome.UNCHANGED and (self._last is None or flight.frame.index > self._last[0]):
            self._last = (flight.frame.index, answer)
