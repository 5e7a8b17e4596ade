"""Files: every frame, in its own time, answered by the server.

The reader waits instead of dropping frames; a frame whose stream broke is encoded and sent again after the reconnect. The local
model answers only when no server has been reachable for ``wait_for_server_s``.
"""

from __future__ import annotations

import asyncio
from collections import deque

from edge_client.capture.base import Delivery
from edge_client.frames import NS_PER_S, Outcome
from edge_client.pipeline.exchange import Exchange
from edge_client.pipeline.flights import Flight
from edge_client.pipeline.head_runner import HeadRunner
from edge_client.pipeline.pipeline import Pipeline
from edge_client.pipeline.rescue import Rescue
from protos.errors import DrainingError, HeadtailError, OverloadedError, UnreachableError, VersionMismatchError, from_code
from splitters.bundle.operating_point import OperatingPoint, best_point

_WINDOW = 8
_MAX_TRIES = 6
_MAX_LOSSES = 6


class FileStrategy:
    """That of pictures, directories and videos without ``--realtime``; see ``Strategy``."""

    local_rescue = False

    def __init__(self, pipeline: Pipeline, exchange: Exchange, rescue: Rescue) -> None:
        self.failure: HeadtailError | None = None
        self._pipeline, self._exchange, self._rescue = pipeline, exchange, rescue
        self._config, self._clock = pipeline.config, pipeline.clock
        self._head = HeadRunner(pipeline, keep_local=False)
        self._again: deque[Flight] = deque()
        self._paused: set[Flight] = set()
        self._current: Flight | None = None
        self._down_ns = 0
        self._vain = 0  # streams lost with frames in flight, since the last answer
        self._offline = False
        self._coming: asyncio.Future[Delivery | None] | None = None
        self._ended = False

    def waiting(self) -> list[Flight]:
        """See ``Strategy``."""
        return [*self._again, *self._paused, *([self._current] if self._current is not None else [])]

    def watched(self) -> list[Flight]:
        """See ``Strategy``; a deadline holds while a frame waits for a server, too."""
        return self.waiting()

    async def main(self) -> None:
        """See ``Strategy``."""
        pipeline = self._pipeline
        self._down_ns = self._clock()
        await pipeline.frames.start()
        try:
            while True:
                if not self._again and not self._ended:
                    delivery = await self._next()
                    self._current = pipeline.take(delivery) if delivery is not None else None
                    if self._current is not None and await self._needs_no_answer(self._current):
                        self._current = None
                        continue
                if self._current is None and self._again:
                    self._current = self._again.popleft()
                if self._current is not None:
                    await self._frame(self._current)
                    self._current = None
                elif self._ended and not self._exchange.flights and not pipeline.ledger.open_count:
                    return
                elif self._ended:
                    await pipeline.wait_changed(0.5)
                    if pipeline.stopping:
                        return
        finally:
            if self._coming is not None:
                self._coming.cancel()

    async def _next(self) -> Delivery | None:
        """The source's next frame; None at its end, and where a frame has to be sent again before one comes."""
        if self._coming is None:
            self._coming = asyncio.ensure_future(self._pipeline.frames.next())
            self._coming.add_done_callback(lambda _coming: self._pipeline.notify())
        while not self._coming.done():
            if self._again:
                return None
            await self._pipeline.wait_changed()
        coming, self._coming = self._coming, None
        delivery = coming.result()
        self._ended = delivery is None
        return delivery

    async def _needs_no_answer(self, flight: Flight) -> bool:
        """Whether a gate settles the frame. What equals a frame in flight waits for that one's answer: there is time."""
        pipeline, gates = self._pipeline, self._pipeline.gates
        if gates.looks_unchanged(flight.frame):
            while pipeline.ledger.is_open(gates.passed_index) and not pipeline.stopping:
                await pipeline.wait_changed(0.25)
            if pipeline.settle_as(flight, gates.reuse()):
                return True
        return pipeline.settle_as(flight, await gates.filter(flight, pipeline.model.interest))

    async def _frame(self, flight: Flight) -> None:
        pipeline = self._pipeline
        if not await self._ready():
            if pipeline.stopping:
                pipeline.settle(flight, Outcome.DROPPED, "stopped")
                return
            if flight.engine.local is None:
                raise self._exchange.link.error or UnreachableError("no server answered")
            await self._rescue.answer(flight)
            return
        if not pipeline.is_open(flight):  # its deadline passed while it waited
            return
        if flight.deadline_ns is not None and self._clock() >= flight.deadline_ns:
            pipeline.settle(flight, Outcome.EXPIRED)
            return
        if flight.engine is not pipeline.model.engine:
            flight.engine, flight.features = pipeline.model.engine, None
        shot = await self._head.encode(flight, self._point())
        if self._exchange.connected and flight.engine is pipeline.model.engine:
            self._exchange.send(flight, shot.encoded, shot.encoded.payloads)
        else:
            self._again.appendleft(flight)

    def _point(self) -> OperatingPoint:
        bundle = self._pipeline.model.engine.bundle
        return bundle.point(self._config.point_id) if self._config.point_id is not None else best_point(bundle.points)

    async def _ready(self) -> bool:
        """Waits for the server and a place in the window; False when there has been no server for too long."""
        exchange, patience_ns = self._exchange, self._config.wait_for_server_s * NS_PER_S
        while not self._pipeline.stopping:
            exchange.take_new_bundle()
            now_ns = self._clock()
            if exchange.connected:
                self._offline = False
                if self._has_room():
                    return True
            elif exchange.link.up and exchange.fetching:
                self._down_ns = now_ns  # it is there, and its bundle is on the way
            elif self._offline or (now_ns - self._down_ns >= patience_ns and exchange.link.failed.is_set()):
                self._offline = True
                return False
            await self._pipeline.wait_changed(0.25)
        return exchange.connected and self._has_room()

    def _has_room(self) -> bool:
        """Whether another frame may be unanswered."""
        limits = [n for n in (self._exchange.limit, self._pipeline.model.controller.granted_in_flight) if n > 0]
        return len(self._exchange.flights) < min([self._config.max_in_flight or _WINDOW, *limits])

    # ------------------------------------------------------------------ what happens to frames in flight

    def wants_fallback(self, flight: Flight, now_ns: int) -> bool:  # noqa: ARG002
        """See ``Strategy``; never asked, since no frame in flight is answered locally."""
        return False

    def on_down(self) -> None:
        """See ``Strategy``."""
        self._down_ns = self._clock()

    def on_result(self) -> None:
        """See ``Strategy``."""
        self._vain = 0

    def on_lost(self, flights: list[Flight]) -> None:
        """See ``Strategy``; they are sent again, as long as that makes sense."""
        self._vain += any(not flight.refusal for flight in flights)
        if self._vain >= _MAX_LOSSES:
            self._fail(UnreachableError(f"the server took frames {self._vain} times and answered none of them"))
            self._pipeline.stop()
        for flight in sorted(flights, key=lambda f: f.frame.index):
            if flight.refusal:
                self._refused_again(flight)
            elif flight.tries >= _MAX_LOSSES:  # every time it is sent, the stream ends
                self._fail(UnreachableError(f"frame {flight.frame.index} was sent {flight.tries} times in vain"))
                self._pipeline.settle(flight, Outcome.DROPPED, "unanswered")
            else:
                self._again.append(flight)
        self._pipeline.notify()

    def _refused_again(self, flight: Flight) -> None:
        error, flight.refusal = flight.refusal, ""
        transient = error in (OverloadedError.code, DrainingError.code, VersionMismatchError.code, UnreachableError.code)
        if transient and flight.tries < _MAX_TRIES:
            self._paused.add(flight)
            asyncio.get_running_loop().call_later(0.1 * 2**flight.tries, self._retry, flight)
            return
        self._fail(from_code(error, f"frame {flight.frame.index} was refused: {flight.refusal_text}"))
        self._pipeline.settle(flight, Outcome.DROPPED, error)

    def _retry(self, flight: Flight) -> None:
        self._paused.discard(flight)
        if self._pipeline.is_open(flight):
            self._again.append(flight)
            self._pipeline.notify()

    def _fail(self, error: HeadtailError) -> None:
        self.failure = self.failure or error
