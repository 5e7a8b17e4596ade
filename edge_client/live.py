"""Cameras: the newest frame, a deadline, and never a wait for the network.

Frame by frame: change gate → controller → head → send; what the server does not answer in time the local model does.
"""

from __future__ import annotations

from dataclasses import replace

from edge_client.control import Local, Offload, Skip, Split
from edge_client.flights import Flight
from edge_client.frames import NS_PER_S, CapturedFrame, Outcome
from edge_client.pipeline import Pipeline, offline

_FAR_NS = 10 * NS_PER_S


class LivePipeline(Pipeline):
    """The camera's pipeline."""

    _current: Flight | None = None

    async def _main(self) -> None:
        # A server that is there gets a moment to say so: else the first frames would all be answered locally.
        there = await self._wait_for_server(self.config.wait_for_server_s)
        if not there and self.engine.local is None and not self._stopping:
            raise offline(self.link.error)
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
        self.controller.window.set_limit(self._welcome_limit)
        if self.connected:
            self.controller.estimator.on_connect(self._clock())

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

    async def _frame(self, flight: Flight) -> None:
        now_ns = self._clock()
        deadline_ns = flight.deadline_ns if flight.deadline_ns is not None else now_ns + _FAR_NS
        decision = self.controller.decide(flight.frame.index, now_ns, deadline_ns)
        if self.config.point_id is not None and isinstance(decision, Split | Offload):
            decision = Split(point_id=self.config.point_id, limit_bytes=decision.limit_bytes)
        if not self.connected and isinstance(decision, Split | Offload):
            decision = Local()
        flight.decision = decision
        match decision:
            case Local():
                await self._answer_locally(flight)
            case Split():
                await self._split(flight, decision)
            case Skip(reason=reason):
                await self._skip(flight, reason)
            case Offload():
                await self._answer_locally(flight)

    async def _skip(self, flight: Flight, reason: str) -> None:
        if reason == "late":
            self._settle(flight, Outcome.EXPIRED)
        elif reason == "offline":
            await self._answer_locally(flight)
        else:
            self._settle(flight, Outcome.DROPPED, "skipped", detail=reason)

    async def _split(self, flight: Flight, decision: Split) -> None:
        point = flight.engine.bundle.point(decision.point_id)
        shot = await self._encode(flight, point, keep_local=True)
        payloads = shot.encoded.payloads
        if decision.limit_bytes is not None:
            total, fitting = 0, 0
            for payload in payloads:
                total += len(payload)
                fitting += total <= decision.limit_bytes
            payloads = payloads[:fitting]
        if not payloads or not self.connected or flight.engine is not self.engine:
            await self._answer_locally(flight)
            return
        deadline_ns = flight.deadline_ns if flight.deadline_ns is not None else flight.encoded_ns + _FAR_NS
        index, controller = flight.frame.index, self.controller

        def gate(layer: int, n_bytes: int) -> bool:
            return controller.may_send(index, n_bytes, self._clock(), deadline_ns, layer=layer)

        self._send(flight, payloads, gate=gate)

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
