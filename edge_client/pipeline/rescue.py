"""The local model's turn: frames that the server does not answer, or not in time, are answered on the device."""

from __future__ import annotations

import logging

from edge_client.control import Local
from edge_client.device.timings import SCHEDULING_NS
from edge_client.frames import NS_PER_MS, NS_PER_S, Outcome
from edge_client.pipeline.exchange import Exchange
from edge_client.pipeline.flights import Flight, next_turn
from edge_client.pipeline.pipeline import LATE_GRACE_NS, Pipeline
from protos.messages import Answer

log = logging.getLogger(__name__)

_UNANSWERED_NS = 60 * NS_PER_S


class Rescue:
    """Watches the frames in flight, and steps in for them."""

    def __init__(self, pipeline: Pipeline, exchange: Exchange) -> None:
        self._pipeline, self._exchange = pipeline, exchange
        self._orphans: list[Flight] = []

    def adopt(self, flight: Flight) -> None:
        """A frame that no server will answer; its turn is at once."""
        flight.urgent = True
        self._orphans.append(flight)

    def in_flight(self) -> list[Flight]:
        """Frames that may need rescue."""
        return [*self._exchange.flights.values(), *self._orphans, *self._exchange.strategy.watched()]

    async def run(self) -> None:
        """Steps in: at once where the stream broke, when it is due where the server is silent."""
        pipeline, strategy = self._pipeline, self._exchange.strategy
        while True:
            now_ns = pipeline.clock()
            self._exchange.forget(now_ns)
            waiting = [f for f in self.in_flight() if pipeline.is_open(f)]
            local = pipeline.model.engine.local is not None and strategy.local_rescue
            local_ns, margin_ns = pipeline.timings.local_turn_ns() if local else (0, 0)
            turn = next_turn(waiting, local_ns=local_ns, margin_ns=margin_ns, wake_ns=SCHEDULING_NS, now_ns=now_ns)
            if turn is None:
                await pipeline.wait_changed(self._unanswered_s(now_ns))
            elif turn[0] > now_ns:
                await pipeline.wait_changed((turn[0] - now_ns) / NS_PER_S)
            else:
                await self._step_in(turn[1], now_ns)
            self._orphans = [f for f in self._orphans if pipeline.is_open(f)]

    async def _step_in(self, flight: Flight, now_ns: int) -> None:
        """A flight's turn has come: the local model's, or the end of the wait."""
        strategy = self._exchange.strategy
        if flight.held is not None:
            self._pipeline.settle(flight, Outcome.LOCAL, answer=flight.held)
        elif flight.given_up or not strategy.local_rescue:
            self._pipeline.settle(flight, Outcome.EXPIRED)
        elif flight.urgent or strategy.wants_fallback(flight, now_ns):
            await self.answer(flight)
        else:
            flight.given_up = True

    def _unanswered_s(self, now_ns: int) -> float | None:
        """Seconds until a frame without deadline has waited too long; a stream that swallows frames is started again."""
        oldest_ns = min((f.encoded_ns for f in self._exchange.flights.values()), default=None)
        if oldest_ns is None:
            return None
        if now_ns - oldest_ns >= _UNANSWERED_NS:
            log.warning("a frame has been unanswered for %.0f s; the stream is started again", _UNANSWERED_NS / NS_PER_S)
            self._exchange.link.restart()
            return 1.0
        return (oldest_ns + _UNANSWERED_NS - now_ns) / NS_PER_S

    async def answer(self, flight: Flight, *, reason: str = "offline") -> None:
        """Gives a frame the local model's answer, or says why it cannot have one."""
        pipeline, now_ns = self._pipeline, self._pipeline.clock()
        local = flight.engine.local
        flight.answering = True
        if local is None or (flight.local_image is None and flight.frame.image is None):
            late = flight.deadline_ns is not None and now_ns >= flight.deadline_ns
            pipeline.settle(flight, Outcome.EXPIRED if late else Outcome.DROPPED, "" if late else flight.refusal or reason)
            return
        limit_ns = flight.deadline_ns + LATE_GRACE_NS if flight.deadline_ns is not None else None
        usual_ns = pipeline.timings.local.quantile(0.5)

        def too_late() -> bool:
            return limit_ns is not None and pipeline.clock() + usual_ns > limit_ns

        if too_late():
            pipeline.settle(flight, Outcome.EXPIRED)
            return
        size_px = (flight.frame.width_px, flight.frame.height_px)

        def work() -> tuple[Answer, float] | None:
            if not pipeline.is_open(flight):
                return None  # the server's answer came while this job waited
            if too_late():
                return None  # other cameras' jobs were more urgent for too long: the time is better spent on theirs
            image = flight.local_image
            if image is None:
                assert flight.frame.image is not None  # noqa: S101 - checked above
                image = local.prepare(flight.frame.image)
            return local.answer(image, size_px)

        due_ns = (flight.deadline_ns or now_ns) - int(pipeline.timings.local.quantile(0.95))
        done = await pipeline.worker.run(work, due_ns=due_ns)
        if done is None:
            if pipeline.is_open(flight):
                pipeline.settle(flight, Outcome.EXPIRED)
            return
        answer, elapsed_ms = done
        end_ns = pipeline.clock()
        pipeline.timings.local.add(int(elapsed_ms * NS_PER_MS))
        pipeline.model.on_device(Local(), int(elapsed_ms * NS_PER_MS), end_ns)
        flight.stages_ms["local"] = elapsed_ms
        if limit_ns is not None and end_ns > limit_ns:
            pipeline.settle(flight, Outcome.EXPIRED)
        elif flight.hold and flight.tries and not flight.urgent and end_ns + SCHEDULING_NS < (flight.deadline_ns or 0):
            flight.held, flight.answering = answer, False
            pipeline.notify()
        else:
            pipeline.settle(flight, Outcome.LOCAL, answer=answer)
