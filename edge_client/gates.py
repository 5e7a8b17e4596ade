"""The gates: frames that need no answer of their own.

Nothing moved since the last one (change gate), or nothing of interest is there (prefilter). Both are for cameras, and for files
where they are asked for.
"""

from __future__ import annotations

import logging

from edge_client.change import ChangeGate
from edge_client.engine import Engine, Features
from edge_client.flights import Flight
from edge_client.frames import NS_PER_MS, NS_PER_S, Outcome
from edge_client.parts import Parts, PipelineConfig
from edge_client.pipeline import Pipeline
from protos.messages import Answer, Result

log = logging.getLogger(__name__)

_FAR_NS = 10 * NS_PER_S


class GatedPipeline(Pipeline):
    """A pipeline with both gates before its head."""

    def __init__(self, config: PipelineConfig, parts: Parts, engine: Engine) -> None:
        super().__init__(config, parts, engine)
        self._gate = ChangeGate() if config.change_gate else None
        self._passed_index = 0
        self._last: tuple[int, Answer] | None = None

    def _is_unchanged(self, flight: Flight) -> bool:
        """Whether the frame equals the last one that passed, whose answer it is given; never before that answer is here."""
        if not self._looks_unchanged(flight):
            return False
        return self._reuse(flight)

    def _looks_unchanged(self, flight: Flight) -> bool:
        frame = flight.frame
        if self._gate is None or frame.image is None:
            return False
        # A file is as fast as we are; how long ago something was seen, only its own stamps say.
        now_ns = self._clock() if self._frames.live or frame.position_ns is None else frame.position_ns
        if not self._gate.changed(frame.image, now_ns):
            return True
        self._passed_index = frame.index
        return False

    def _reuse(self, flight: Flight) -> bool:
        if self._last is None or self._last[0] < self._passed_index:
            return False  # the frame it equals has no answer yet
        self._settle(flight, Outcome.UNCHANGED, answer=self._last[1], detail=f"as frame {self._last[0]}")
        return True

    async def _is_filtered(self, flight: Flight) -> bool:
        """Whether the prefilter stops the frame; the head goes on with the features it was shown."""
        gate = self.interest
        if gate is None:
            return False
        engine, image = flight.engine, flight.frame.image
        assert image is not None  # noqa: S101 - just captured

        def work() -> tuple[Features, list[float], int]:
            features = engine.features(image)
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
        if gate.stops(flight.frame.index, score):
            self._settle(flight, Outcome.FILTERED, detail=f"interest {score:.2f}")
            return True
        return False

    def _on_answer(self, flight: Flight, result: Result) -> None:
        if self.interest is not None and self.interest.learn(flight.frame.index, result.answer):
            log.warning(
                "the prefilter misses more than it promised here: its threshold is now %.3f (promised at %.3f)",
                self.interest.threshold,
                self.interest.promise.threshold,
            )

    def _on_settled(self, flight: Flight, outcome: Outcome, answer: Answer | None) -> None:
        if outcome is Outcome.FILTERED:
            answer = flight.engine.task.empty()
        if answer is not None and outcome is not Outcome.UNCHANGED and (self._last is None or flight.frame.index > self._last[0]):
            self._last = (flight.frame.index, answer)
