"""Cameras: the newest frame, a deadline, and never a wait for the network.

Frame by frame: change gate → prefilter → controller → head → send; what the server does not answer in time the local
model does.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace

from edge_client.control import Decision, Local, Offload, Skip, Split
from edge_client.engine import Encoded, Engine, Features
from edge_client.flights import Flight
from edge_client.frames import NS_PER_S, CapturedFrame, Outcome
from edge_client.gates import GatedPipeline
from edge_client.parts import Parts, PipelineConfig, Shot
from edge_client.timings import SCHEDULING_NS
from protos.errors import UnreachableError

log = logging.getLogger(__name__)
explain_log = logging.getLogger("edge_client.explain")

_FAR_NS = 10 * NS_PER_S


class LivePipeline(GatedPipeline):
    """The camera's pipeline."""

    def __init__(self, config: PipelineConfig, parts: Parts, engine: Engine) -> None:
        super().__init__(config, parts, engine)
        self._current: Flight | None = None

    async def _main(self) -> None:
        # A server that is there gets a moment to say so: else the first frames would all be answered locally.
        there = await self._wait_for_server(self.config.wait_for_server_s)
        if not there and self.engine.local is None and not self._stopping:
            raise self.link.error or UnreachableError("no server answered")
        if not self._stopping:
            await self._frames.start()
        self.controller = self._parts.controller(self.engine, self._frames.fps)
        self._adopt_link()
        while (delivery := await self._frames.next()) is not None:
            self._swap_engine()
            self._current = self._take(delivery)
            await self._frame(self._current)
            self._current = None
        await self._land()

    def _adopt_link(self) -> None:
        """The fps is known only now, and with it the controller's interval."""
        self.controller.set_limit(self._welcome_limit)
        if self.connected:
            self.controller.on_connect(self._clock())

    def _waiting(self) -> list[Flight]:
        return [self._current] if self._current is not None else []

    async def _land(self) -> None:
        """Waits for what is in flight; each has its deadline, and without one five seconds."""
        until_ns = self._clock() + 5 * NS_PER_S
        while self.ledger.open_count:
            now_ns = self._clock()
            if now_ns >= until_ns or self._stopping:
                for flight in self._flights.values():
                    flight.urgent = True
                self._notify()
                until_ns = now_ns + _FAR_NS
                self._stopping = False
            await self._wait_changed(0.1)

    # ------------------------------------------------------------------ one frame

    async def _frame(self, flight: Flight) -> None:
        if self._is_unchanged(flight) or await self._is_filtered(flight):
            return
        decision = self._decide(flight)
        if await self._fall_back_first(decision):
            decision = self._decide(flight)
        flight.decision = decision
        if decision.explain is not None:
            explain_log.info("%s", json.dumps(asdict(decision.explain)))
        match decision:
            case Split(point_id=point_id, limit_bytes=limit_bytes):
                point = flight.engine.bundle.point(point_id)
                self._depart(flight, await self._encode(flight, point, keep_local=True), limit_bytes)
            case Offload() as offload:
                self._depart(flight, await self._offload(flight, offload), offload.limit_bytes)
            case Skip(reason=reason):
                await self._skip(flight, reason)
                return
            case Local():
                await self._answer_locally(flight)
                return
        if flight.encoded_ns and not flight.tries:  # it could not leave
            await self._answer_locally(flight)

    def _decide(self, flight: Flight) -> Decision:
        now_ns = self._clock()
        deadline_ns = flight.deadline_ns if flight.deadline_ns is not None else now_ns + _FAR_NS
        if self.config.point_id is not None and self.connected and deadline_ns > now_ns:
            if self.controller.allows():
                return Split(point_id=self.config.point_id)
            return Local()
        reference = self.predictor.choose()[1] if self.predictor is not None else None
        self.controller.on_reference(self.ages.age(reference, flight.frame.index))
        decision = self.controller.decide(flight.frame.index, now_ns, deadline_ns)
        return Local() if not self.connected and isinstance(decision, Split | Offload) else decision

    async def _fall_back_first(self, decision: Decision) -> bool:
        """Fallbacks that will be due while the device is at this decision go before it, since no job is interrupted."""
        if isinstance(decision, Skip):
            return False
        job = self.timings.local if isinstance(decision, Local) else self.timings.head
        now_ns = self._clock()
        free_ns = now_ns + int(job.quantile(0.95)) + SCHEDULING_NS
        due = [
            f
            for f in self._flights.values()
            if f.fallback_ns is not None and f.fallback_ns < free_ns and not (f.answering or f.given_up or f.urgent)
            if self.ledger.is_open(f.frame.index) and self._wants_fallback(f, now_ns)
        ]  # fmt: skip
        for flight in due:
            await self._answer_locally(flight)
        return bool(due)

    async def _skip(self, flight: Flight, reason: str) -> None:
        if reason == "late":
            self._settle(flight, Outcome.EXPIRED)
        elif reason == "offline":
            await self._answer_locally(flight)
        else:
            self._settle(flight, Outcome.DROPPED, "skipped", detail=reason)

    async def _offload(self, flight: Flight, choice: Offload) -> Shot:
        if flight.features is None and flight.frame.image is not None:
            flight.features = flight.engine.picture(flight.frame.image)

        def make(engine: Engine, features: Features) -> Encoded:
            return engine.compress(features, choice.format, choice.quality, choice.size_px)

        return await self._run_head(flight, make, keep_local=True)

    def _depart(self, flight: Flight, shot: Shot, limit_bytes: int | None) -> None:
        """Sends what fits the grant, base layer first; nothing where the link went down meanwhile."""
        payloads = shot.encoded.payloads
        if limit_bytes is not None:
            total, fitting = 0, 0
            for payload in payloads:
                total += len(payload)
                fitting += total <= limit_bytes
            payloads = payloads[:fitting]
        if not payloads or not self.connected or flight.engine is not self.engine:
            return
        deadline_ns = flight.deadline_ns if flight.deadline_ns is not None else flight.encoded_ns + _FAR_NS
        index, controller = flight.frame.index, self.controller

        def gate(layer: int, n_bytes: int) -> bool:
            return controller.may_send(index, n_bytes, self._clock(), deadline_ns, layer=layer)

        self._send(flight, shot.encoded, payloads, gate=gate)

    # ------------------------------------------------------------------ what happens to frames in flight

    def _let_go(self, flight: Flight) -> CapturedFrame:
        return replace(flight.frame, image=None) if flight.local_image is not None else flight.frame

    def _on_lost(self, flights: list[Flight]) -> None:
        now_ns = self._clock()
        for flight in flights:
            flight.urgent = True
            if flight.engine.local is None and (flight.deadline_ns is None or flight.deadline_ns > now_ns):
                self._settle(flight, Outcome.DROPPED, flight.refusal or "offline")
            else:
                self._orphans.append(flight)
        self._notify()

    def _wants_fallback(self, flight: Flight, now_ns: int) -> bool:
        if self.config.point_id is not None or flight.deadline_ns is None:
            return True  # the controller had no say in it
        return self.controller.wants_fallback(flight.wire_id, now_ns, flight.deadline_ns)
