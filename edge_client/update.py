"""A server's new bundle, fetched in the background until it is here or no longer wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from edge_client.engine import Engine
from protos.errors import HeadtailError

log = logging.getLogger(__name__)

_FETCH_AGAIN_S = 2.0


class BundleUpdate:
    """At most one download at a time; a failed one is tried again ever more seldom.

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

    @property
    def running(self) -> bool:
        """Whether a bundle is on the way."""
        return self._task is not None

    def want(self, sha256: str) -> None:
        """The bundle with this hash is wanted; empty: none, the one in use is the server's."""
        self._wanted = sha256
        if sha256 and self._task is None:
            self.note = f"fetching bundle {sha256[:12]}"
            self._task = asyncio.create_task(self._run())

    def take(self) -> Engine | None:
        """The engine that was made ready, once."""
        engine, self._ready = self._ready, None
        if engine is not None:
            self.note = ""
        return engine

    def cancel(self) -> None:
        """Ends the download."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        wait_s = _FETCH_AGAIN_S
        try:
            while self._wanted and self._ready is None:
                try:
                    self._ready = await self._fetch(self._wanted)
                except HeadtailError as error:
                    self.note = f"the server's bundle cannot be had: {error.message}"
                    log.warning("%s", self.note)
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, 16 * _FETCH_AGAIN_S)  # a full disk does not empty itself
                    self._wanted = self._wanted if self._is_up() else ""  # the next welcome names it
        finally:
            self._task = None
            self.note = self.note if self._wanted else ""
        self._notify()
