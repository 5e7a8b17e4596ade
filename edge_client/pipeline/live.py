"""Cameras: the newest frame, a deadline, and never a wait for the network.

Each frame: change gate → prefilter → controller → head → send. A frame that the server does not answer in time is answered by
the local model.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import asdict

from edge_client.control import Decision, Local, Offload, Skip, Split
from edge_client.device.timings import SCHEDULING_NS
from edge_client.frames import NS_PER_S, Outcome
from edge_client.pipeline.exchange import Exchange
from edge_client.pipeline.flights import Flight
from edge_client.pipeline.head_runner import HeadRunner
from edge_client.pipeline.parts import Shot
from edge_client.pipeline.pipeline import Pipeline
from edge_client.pipeline.rescue import Rescue
from protos.errors import HeadtailError, UnreachableError
from protos.messages import PayloadKind

log = logging.getLogger(__name__)
explain_log = logging.getLogger("edge_client.explain")

_FAR_NS = 10 * NS_PER_S


class LiveStrategy:
    """A camera's; see ``Strategy``."""

    local_rescue = True
    failure: HeadtailError | None = None

    def __init__(self, pipeline: Pipeline, exchange: Exchange, rescue: Rescue) -> None:
        self._pipeline, self._exchange, self._rescue = pipeline, exchange, rescue
        self._config, self._clock = pipeline.config, pipeline.clock
        self._head = HeadRunner(pipeline, keep_local=True)
        self._current: Flight | None = None

    async def main(self) -> None:
        """See ``Strategy``."""
        pipeline, exchange = self._pipeline, self._exchange
        # A server that is there gets a moment to say so: else the first frames would all be answered locally.
        there = await exchange.wait_for_server(self._config.wait_for_server_s)
        if not there and pipeline.model.engine.local is None and not pipeline.stopping:
            raise exchange.link.error or UnreachableError("no server answered")
        if not pipeline.stopping:
            await pipeline.frames.start()
        exchange.set_fps(pipeline.frames.fps)
        while (delivery := await pipeline.frames.next()) is not None:
            exchange.take_new_bundle()
            self._current = pipeline.take(delivery)
            due_ns = self._current.deadline_ns or self._clock() + _FAR_NS
            async with pipeline.worker.turn(due_ns=due_ns):
                await self._frame(self._current)
            self._current = None
            await asyncio.sleep(0)  # the session's writer hands the frame over before the next one is predicted from it
        await self._land()

    def waiting(self) -> list[Flight]:
        """See ``Strategy``."""
        return [self._current] if self._current is not None else []

    def watched(self) -> list[Flight]:
        """See ``Strategy``; a frame that the device is at is answered by whoever is at it."""
        return []

    async def _land(self) -> None:
        """Waits for what is in flight; each has its deadline, and without one five seconds."""
        until_ns = self._clock() + 5 * NS_PER_S
        while self._pipeline.ledger.open_count:
            now_ns = self._clock()
            if now_ns >= until_ns or self._pipeline.stopping:
                for flight in self._exchange.flights.values():
                    flight.urgent = True
                self._pipeline.notify()
                until_ns = now_ns + _FAR_NS
                self._pipeline.stopping = False
            await self._pipeline.wait_changed(0.1)

    # ------------------------------------------------------------------ one frame

    async def _frame(self, flight: Flight) -> None:
        pipeline, gates = self._pipeline, self._pipeline.gates
        if gates.looks_unchanged(flight.frame) and pipeline.settle_as(flight, gates.reuse()):
            return
        if pipeline.settle_as(flight, await gates.filter(flight, pipeline.model.interest)):
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
                self._depart(flight, await self._head.encode(flight, point), limit_bytes)
            case Offload() as offload:
                self._depart(flight, await self._head.compress(flight, offload), offload.limit_bytes)
            case Skip(reason=reason):
                await self._skip(flight, reason)
                return
            case Local():
                await self._rescue.answer(flight)
                return
        if flight.encoded_ns and not flight.tries:  # it could not leave
            await self._rescue.answer(flight)

    def _decide(self, flight: Flight) -> Decision:
        now_ns, controller = self._clock(), self._pipeline.model.controller
        deadline_ns = flight.deadline_ns if flight.deadline_ns is not None else now_ns + _FAR_NS
        connected = self._exchange.connected
        self._pipeline.model.on_frame(flight.frame.index)
        controller.on_share(self._pipeline.worker.share)
        if self._config.point_id is not None and connected and deadline_ns > now_ns:
            return Split(point_id=self._config.point_id) if controller.allows() else Local()
        decision = controller.decide(flight.frame.index, now_ns, deadline_ns)
        return Local() if not connected and isinstance(decision, Split | Offload) else decision

    async def _fall_back_first(self, decision: Decision) -> bool:
        """Fallbacks that will be due while the device is at this decision go before it, since no job is interrupted."""
        if isinstance(decision, Skip):
            return False
        timings = self._pipeline.timings
        job = timings.local if isinstance(decision, Local) else timings.head
        now_ns = self._clock()
        free_ns = now_ns + int(job.quantile(0.95)) + SCHEDULING_NS
        due = [
            f
            for f in self._exchange.flights.values()
            if f.fallback_ns is not None and f.fallback_ns < free_ns and not (f.answering or f.held or f.given_up or f.urgent)
            if self._pipeline.is_open(f) and self.wants_fallback(f, now_ns)
        ]  # fmt: skip
        for flight in due:
            await self._rescue.answer(flight)
        return bool(due)

    async def _skip(self, flight: Flight, reason: str) -> None:
        if reason == "late":
            self._pipeline.settle(flight, Outcome.EXPIRED)
        elif reason == "offline":
            await self._rescue.answer(flight)
        else:
            self._pipeline.settle(flight, Outcome.DROPPED, "skipped", detail=reason)

    def _depart(self, flight: Flight, shot: Shot, limit_bytes: int | None) -> None:
        """Sends what fits the grant, base layer first; nothing where the link went down meanwhile."""
        payloads = shot.encoded.payloads
        if limit_bytes is not None:
            total, fitting = 0, 0
            for payload in payloads:
                total += len(payload)
                fitting += total <= limit_bytes
            payloads = payloads[:fitting]
        model = self._pipeline.model
        video, reference = shot.encoded.kind is PayloadKind.VIDEO, shot.encoded.reference

        def decodable() -> bool:  # what a video frame depends on may have been held back meanwhile
            return not video or model.video.holds(reference)

        if not payloads or not decodable() or not self._exchange.connected or flight.engine is not model.engine:
            return
        deadline_ns = flight.deadline_ns if flight.deadline_ns is not None else flight.encoded_ns + _FAR_NS
        index, controller = flight.frame.index, model.controller

        def gate(layer: int, n_bytes: int) -> bool:
            return decodable() and controller.may_send(index, n_bytes, self._clock(), deadline_ns, layer=layer)

        self._exchange.send(flight, shot.encoded, payloads, gate=gate)

    # ------------------------------------------------------------------ what happens to frames in flight

    def wants_fallback(self, flight: Flight, now_ns: int) -> bool:
        """See ``Strategy``."""
        if self._config.point_id is not None or flight.deadline_ns is None:
            return True  # the controller had no say in it
        return self._pipeline.model.controller.wants_fallback(flight.wire_id, now_ns, flight.deadline_ns)

    def on_lost(self, flights: list[Flight]) -> None:
        """See ``Strategy``; the local model answers them at once."""
        now_ns = self._clock()
        for flight in flights:
            if flight.engine.local is None and (flight.deadline_ns is None or flight.deadline_ns > now_ns):
                self._pipeline.settle(flight, Outcome.DROPPED, flight.refusal or "offline")
            else:
                self._rescue.adopt(flight)
        self._pipeline.notify()

    def on_down(self) -> None:
        """See ``Strategy``."""

    def on_result(self) -> None:
        """See ``Strategy``."""
