"""The frames of one run: each is captured once and settled once, whatever fails; and the model that they meet.

Everything here happens on one event loop. Between capture and outcome a frame is in the hands of the strategy (``live``,
``files``), the network (``exchange``) or the local model (``rescue``).
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

from edge_client.capture.base import Delivery
from edge_client.device.engine import Engine
from edge_client.device.timings import Timings
from edge_client.frames import NS_PER_MS, CapturedFrame, Ledger, Outcome
from edge_client.pipeline.active_model import ActiveModel
from edge_client.pipeline.flights import Flight
from edge_client.pipeline.gates import Gates, Verdict
from edge_client.pipeline.parts import Parts, PipelineConfig
from protos.messages import Answer

log = logging.getLogger(__name__)

LATE_GRACE_NS = 100 * NS_PER_MS


class Pipeline:
    """The ledger, and who settles frames in it.

    Attributes:
        ledger: captured frames and their outcomes; adds up at every moment.
        model: the model in use.
        timings: of this device's own work.
        gates: which frames need no answer of their own.
        bundle_switches: how often the model was replaced.
        stopping: no more frames are wanted.
        stop_asked: set by the first ``stop``.
    """

    def __init__(self, config: PipelineConfig, parts: Parts, engine: Engine) -> None:
        self.config, self.parts = config, parts
        self.clock, self.frames, self.worker = parts.clock, parts.frames, parts.worker
        self.ledger = Ledger()
        self.timings = Timings()
        self.model = ActiveModel(engine, parts, temporal=config.temporal)
        self.gates = Gates(parts, change=config.change_gate)
        self.bundle_switches = 0
        self.stopping = False
        self.stop_asked = asyncio.Event()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------------ what happens

    def notify(self) -> None:
        """Something changed that somebody may wait for."""
        self._changed.set()

    async def wait_changed(self, timeout_s: float | None = None) -> None:
        """Waits for the next ``notify``, or so long."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # wait_for may swallow a cancellation that comes with the event
                await self._changed.wait()

    def stop(self) -> None:
        """Ends the source; what is in flight is still waited for, shortly."""
        self.stopping = True
        self.stop_asked.set()
        self.drop_untaken()
        self.notify()

    def replace_model(self, engine: Engine) -> None:
        """Another bundle takes over, between two frames."""
        log.info("bundle %s takes over from %s", engine.sha256[:12], self.model.sha256[:12])
        self.model = ActiveModel(engine, self.parts, temporal=self.config.temporal, fps=self.frames.fps, lenient=True)
        self.bundle_switches += 1

    # ------------------------------------------------------------------ frames and their outcomes

    def take(self, delivery: Delivery) -> Flight:
        """Accounts for a delivery and makes a flight of its frame."""
        for frame in delivery.superseded:
            self._drop(frame, "superseded")
        frame = delivery.frame
        self.ledger.capture(frame.index)
        deadline_ns = frame.captured_ns + int(self.config.deadline_ms * NS_PER_MS) if self.config.deadline_ms > 0 else None
        stages = {"capture": (self.clock() - frame.captured_ns) / NS_PER_MS}
        return Flight(frame=frame, engine=self.model.engine, deadline_ns=deadline_ns, stages_ms=stages)

    def drop_untaken(self) -> None:
        """Closes the source; frames it captured that nobody took are accounted for."""
        for frame in self.frames.close():
            self._drop(frame, "stopped")

    def _drop(self, frame: CapturedFrame, reason: str) -> None:
        self.ledger.capture(frame.index)
        self.settle(Flight(frame=frame, engine=self.model.engine, deadline_ns=None), Outcome.DROPPED, reason)

    def is_open(self, flight: Flight) -> bool:
        """Whether the flight's frame still waits for its outcome."""
        return self.ledger.is_open(flight.frame.index)

    def settle(self, flight: Flight, outcome: Outcome, reason: str = "", answer: Answer | None = None, detail: str = "") -> bool:
        """Gives a frame its outcome and reports it; False, and nothing is reported, where it has one."""
        frame = flight.frame
        if not self.ledger.settle(frame.index, outcome, reason):
            return False
        answer = self.config.floor.cut(answer, flight.engine.bundle)
        report = flight.report(outcome, reason, answer, detail, now_ns=self.clock())
        self.parts.emit(report if self.config.keep_images else replace(report, frame=replace(frame, image=None)))
        self.gates.on_settled(flight, outcome, answer)
        self.notify()
        return True

    def settle_as(self, flight: Flight, verdict: Verdict | None) -> bool:
        """Settles a frame as a gate says; False where it says nothing."""
        return verdict is not None and self.settle(flight, verdict.outcome, answer=verdict.answer, detail=verdict.detail)
