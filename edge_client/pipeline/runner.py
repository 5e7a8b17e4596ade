"""One run from the first frame to the last outcome: session, strategy and rescue side by side, and an end in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from edge_client.device.engine import Engine
from edge_client.frames import Outcome
from edge_client.pipeline.exchange import Exchange
from edge_client.pipeline.parts import Parts, PipelineConfig
from edge_client.pipeline.pipeline import Pipeline
from edge_client.pipeline.rescue import Rescue
from edge_client.pipeline.strategy import Strategy
from edge_client.transport.base import Link
from protos.errors import HeadtailError

log = logging.getLogger(__name__)

_STOP_S = 8.0
_HEAD_ENDS_S = 5.0
_LAST_JOB_S = 1.0

MakeStrategy = Callable[[Pipeline, Exchange, Rescue], Strategy]
"""``live.LiveStrategy`` or ``files.FileStrategy``."""


class Runner:
    """Puts a pipeline together with what moves its frames.

    Attributes:
        pipeline: frames and outcomes.
        exchange: frames in flight; the session's events go to it.
        strategy: what the source's kind asks for.
    """

    def __init__(self, config: PipelineConfig, parts: Parts, engine: Engine, strategy: MakeStrategy) -> None:
        self.pipeline = Pipeline(config, parts, engine)
        self.exchange = Exchange(self.pipeline)
        self._rescue = Rescue(self.pipeline, self.exchange)
        self.strategy = self.exchange.strategy = strategy(self.pipeline, self.exchange, self._rescue)
        parts.worker.overdue = self._abandon

    @property
    def note(self) -> str:
        """One line for the status, mostly empty."""
        return self.exchange.note

    def stop(self) -> None:
        """Ends the source; what is in flight is still waited for, shortly."""
        self.pipeline.stop()

    async def run(self, link: Link) -> None:
        """Runs to the source's end or ``stop``; afterwards every captured frame has its outcome.

        Raises:
            HeadtailError: the source failed, or the server refused us before it ever took us.
        """
        self.exchange.link = link
        session = asyncio.create_task(link.run())
        main = asyncio.create_task(self.strategy.main())
        rescue = asyncio.create_task(self._rescue.run())
        patience = asyncio.create_task(self._patience())
        try:
            await asyncio.wait({session, main, rescue, patience}, return_when=asyncio.FIRST_COMPLETED)
            if session.done() and session.exception() is None:
                await asyncio.wait({main, rescue, patience}, return_when=asyncio.FIRST_COMPLETED)
            for task in (main, rescue, session):
                if task.done():
                    task.result()
        finally:
            self.exchange.close()
            self.pipeline.drop_untaken()
            for task in (main, rescue, patience):
                task.cancel()
            self._drop_the_rest()
            link.close()
            with suppress(TimeoutError, HeadtailError):
                await asyncio.wait_for(session, 1.5)
            await asyncio.gather(main, rescue, return_exceptions=True)
            hopeless = asyncio.get_running_loop().call_later(_LAST_JOB_S, self._abandon)
            with suppress(TimeoutError):  # the run ends although a head does not return
                await asyncio.wait_for(self.pipeline.worker.join(), _HEAD_ENDS_S)
            hopeless.cancel()

    async def _patience(self) -> None:
        """Ends, and the run with it, some time after ``stop``, whatever the last frame waits for."""
        await self.pipeline.stop_asked.wait()
        await asyncio.sleep(_STOP_S)

    def _drop_the_rest(self) -> None:
        for flight in [*self._rescue.in_flight(), *self.strategy.waiting()]:
            if flight.held is not None:
                self.pipeline.settle(flight, Outcome.LOCAL, answer=flight.held)
            else:
                self.pipeline.settle(flight, Outcome.DROPPED, "stopped")

    def _abandon(self) -> None:
        """The device is at a job that does not end by itself."""
        log.error("a model has been at one frame for too long; it is given up")
        flights = [*self._rescue.in_flight(), *self.strategy.waiting()]
        engines = [self.pipeline.model.engine, *(f.engine for f in flights)]
        for engine in {id(e): e for e in engines}.values():
            engine.abandon()
