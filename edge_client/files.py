"""Files: every frame, in its own time, answered by the server.

Back-pressure instead of dropping; a frame whose stream broke is encoded and sent again after the reconnect. The local
model answers only when no server has been reachable for ``wait_for_server_s``.
"""

from __future__ import annotations

import asyncio
from collections import deque

from edge_client.engine import Engine
from edge_client.flights import Flight
from edge_client.frames import NS_PER_S, Outcome
from edge_client.gates import GatedPipeline
from edge_client.parts import Parts, PipelineConfig
from protos.errors import DrainingError, HeadtailError, OverloadedError, UnreachableError, VersionMismatchError, from_code
from protos.messages import Result
from splitters.bundle.operating_point import OperatingPoint, best_point

_WINDOW = 8
_MAX_TRIES = 6
_MAX_LOSSES = 6


class FilePipeline(GatedPipeline):
    """The pipeline of pictures, directories and videos without ``--realtime``."""

    def __init__(self, config: PipelineConfig, parts: Parts, engine: Engine) -> None:
        super().__init__(config, parts, engine)
        self.refused: HeadtailError | None = None
        self._again: deque[Flight] = deque()
        self._paused: set[Flight] = set()
        self._current: Flight | None = None
        self._down_ns = 0
        self._vain = 0  # streams lost with frames in flight, since the last answer
        self._offline = False

    @property
    def _local_allowed(self) -> bool:
        return False

    def _waiting(self) -> list[Flight]:
        return [*self._again, *self._paused, *([self._current] if self._current is not None else [])]

    def _in_flight(self) -> list[Flight]:
        return [*super()._in_flight(), *self._waiting()]  # a deadline holds while a frame waits for a server, too

    async def _main(self) -> None:
        self._down_ns = self._clock()
        await self._frames.start()
        ended = False
        while True:
            self._current = self._again.popleft() if self._again else None
            if self._current is None and not ended:
                delivery = await self._frames.next()
                ended = delivery is None
                self._current = self._take(delivery) if delivery is not None else None
                if self._current is not None and await self._needs_no_answer(self._current):
                    self._current = None
                    continue
            if self._current is not None:
                await self._frame(self._current)
                self._current = None
            elif ended and not self._flights and not self._again and not self.ledger.open_count:
                return
            elif ended:
                await self._wait_changed(0.5)
                if self._stopping:
                    return

    async def _needs_no_answer(self, flight: Flight) -> bool:
        """Whether a gate settles the frame. What equals a frame in flight waits for that one's answer: there is time."""
        if self._looks_unchanged(flight):
            while self.ledger.is_open(self._passed_index) and not self._stopping:
                await self._wait_changed(0.25)
            if self._reuse(flight):
                return True
        return await self._is_filtered(flight)

    async def _frame(self, flight: Flight) -> None:
        if not await self._ready():
            if self._stopping:
                self._settle(flight, Outcome.DROPPED, "stopped")
                return
            if flight.engine.local is None:
                raise self.link.error or UnreachableError("no server answered")
            await self._answer_locally(flight)
            return
        if not self.ledger.is_open(flight.frame.index):  # its deadline passed while it waited
            return
        if flight.deadline_ns is not None and self._clock() >= flight.deadline_ns:
            self._settle(flight, Outcome.EXPIRED)
            return
        if flight.engine is not self.engine:
            flight.engine, flight.features = self.engine, None
        shot = await self._encode(flight, self._point(), keep_local=False)
        if self.connected and flight.engine is self.engine:
            self._send(flight, shot.encoded, shot.encoded.payloads)
        else:
            self._again.appendleft(flight)

    def _point(self) -> OperatingPoint:
        if self.config.point_id is not None:
            return self.engine.bundle.point(self.config.point_id)
        return best_point(self.engine.bundle.points)

    async def _ready(self) -> bool:
        """Waits for the server and a place in the window; False when there has been no server for too long."""
        patience_ns = self.config.wait_for_server_s * NS_PER_S
        while not self._stopping:
            self._swap_engine()
            now_ns = self._clock()
            if self.connected:
                self._offline = False
                if len(self._flights) < self._window:
                    return True
            elif self.link.up and self._update.running:
                self._down_ns = now_ns  # it is there, and its bundle is on the way
            elif self._offline or (now_ns - self._down_ns >= patience_ns and self.link.failed.is_set()):
                self._offline = True
                return False
            await self._wait_changed(0.25)
        return self.connected and len(self._flights) < self._window

    @property
    def _window(self) -> int:
        limits = [n for n in (self._welcome_limit, self.controller.granted_in_flight) if n > 0]
        return min([self.config.max_in_flight or _WINDOW, *limits])

    def on_down(self, error: HeadtailError) -> None:
        """See ``SessionEvents``."""
        self._down_ns = self._clock()
        super().on_down(error)

    def on_result(self, result: Result, now_ns: int) -> None:
        """See ``SessionEvents``."""
        self._vain = 0
        super().on_result(result, now_ns)

    def _on_lost(self, flights: list[Flight]) -> None:
        self._vain += any(not flight.refusal for flight in flights)
        if self._vain >= _MAX_LOSSES:
            self.refused = self.refused or UnreachableError(f"the server took frames {self._vain} times and answered none of them")
            self.stop()
        for flight in sorted(flights, key=lambda f: f.frame.index):
            if flight.refusal:
                self._refused_again(flight)
            elif flight.tries >= _MAX_LOSSES:  # every time it is sent, the stream ends
                self.refused = self.refused or UnreachableError(f"frame {flight.frame.index} was sent {flight.tries} times in vain")
                self._settle(flight, Outcome.DROPPED, "unanswered")
            else:
                self._again.append(flight)
        self._notify()

    def _refused_again(self, flight: Flight) -> None:
        error, flight.refusal = flight.refusal, ""
        transient = error in (OverloadedError.code, DrainingError.code, VersionMismatchError.code, UnreachableError.code)
        if transient and flight.tries < _MAX_TRIES:
            self._paused.add(flight)
            asyncio.get_running_loop().call_later(0.1 * 2**flight.tries, self._retry, flight)
            return
        self.refused = self.refused or from_code(error, f"frame {flight.frame.index} was refused: {flight.refusal_text}")
        self._settle(flight, Outcome.DROPPED, error)

    def _retry(self, flight: Flight) -> None:
        self._paused.discard(flight)
        if self.ledger.is_open(flight.frame.index):
            self._again.append(flight)
            self._notify()
