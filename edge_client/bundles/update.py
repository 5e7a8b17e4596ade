"""A server's new bundle, fetched in the background until it is here or no longer wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from edge_client.device.engine import Engine
from protos.errors import BundleError, HeadtailError, ProtocolError

log = logging.getLogger(__name__)

_FIRST_S = 2.0
_LONGEST_S = 32.0
_CALM_S = 60.0
_REFUSED_S = 600.0
_REFUSALS = 64


class BundleUpdate:
    """At most one download at a time, and each the later the more there were of late.

    A network that fails, a disk that is full and a server that announces one bundle after another all cost the same: downloads.
    Every attempt doubles the wait for the next, whatever came of it; a quiet minute makes it short again. A bundle that was
    refused as bad is not asked for again for ten minutes, another one is.

    Args:
        fetch: fetches the bundle of a hash and makes an engine of it.
        is_up: whether the server is there to be asked again.
        notify: told when an engine is ready, or the matter has been dropped.
    """

    def __init__(self, fetch: Callable[[str], Awaitable[Engine]], is_up: Callable[[], bool], notify: Callable[[], None]) -> None:
        self.note = ""
        self._fetch, self._is_up, self._notify = fetch, is_up, notify
        self._wanted = ""
        self._ready: Engine | None = None
        self._task: asyncio.Task[None] | None = None
        self._wait_s = 0.0
        self._next_s = self._calm_s = -1.0
        self._refused: dict[str, float] = {}
        self._renewed = asyncio.Event()
        self._over = self._fetching = False

    @property
    def running(self) -> bool:
        """Whether a bundle is on the way, and not only waited for: one that cannot be had is no reason to wait."""
        return self._fetching

    def want(self, sha256: str) -> None:
        """The bundle with this hash is wanted; empty: none, the one in use is the server's."""
        if sha256 != self._wanted:
            self._renewed.set()
        self._wanted = sha256
        if sha256 and self._task is None and not self._over:
            self.note = f"fetching bundle {sha256[:12]}"
            self._task = asyncio.create_task(self._run())

    def take(self) -> Engine | None:
        """The engine that was made ready, once."""
        engine, self._ready = self._ready, None
        if engine is not None:
            self.note = ""
        return engine

    def cancel(self) -> None:
        """Ends the download; there will be no other."""
        self._over = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._wanted and self._ready is None:
                wanted = self._wanted
                early_s = max(self._next_s, self._refused.get(wanted, 0.0)) - loop.time()
                if early_s > 0:
                    await self._wait(early_s)
                    continue
                self._fetching = True
                try:
                    self._ready = await self._fetch(wanted)
                except HeadtailError as error:
                    self.note = f"the server's bundle cannot be had: {error.message}"
                    log.warning("%s", self.note)
                    if isinstance(error, BundleError | ProtocolError):
                        self._refused[wanted] = loop.time() + _REFUSED_S
                        self._refused = dict([*self._refused.items()][-_REFUSALS:])
                finally:
                    self._fetching = False
                self._wait_s = min(2 * self._wait_s, _LONGEST_S) if loop.time() < self._calm_s else _FIRST_S
                self._next_s = loop.time() + self._wait_s
                self._calm_s = self._next_s + _CALM_S
        finally:
            self._task = None
            self.note = self.note if self._wanted else ""
        self._notify()

    async def _wait(self, seconds: float) -> None:
        """Until then, or until another bundle is wanted."""
        self._renewed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._renewed.wait()
                return
        self._wanted = self._wanted if self._is_up() else ""  # the next welcome names it
