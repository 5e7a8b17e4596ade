"""The server's model on this device: which bundle to begin with, tried, measured and opened; later the server's new one."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable

from edge_client.bundles.fetch import choose_model, fetch_bundle, list_models
from edge_client.bundles.store import BundleStore
from edge_client.device.choices import DeviceTimes, keep_times
from edge_client.device.engine import Engine
from edge_client.device.proof import prove
from edge_client.device.video import AUTO
from edge_client.frames import Clock
from edge_client.transport.rpc import Endpoint
from protos.errors import HeadtailError
from splitters.bundle import Bundle

log = logging.getLogger(__name__)

_RETRY_S = 0.5
_GLANCE_S = 2.0
_TIMES = "times"  # the folder of the cache that device times are kept in
_DRIFT = 1.25  # by which a pace differs from what is kept before that follows

Load = Callable[[Bundle], Awaitable[tuple[Engine, DeviceTimes]]]
"""Opens a bundle; also how long this device takes for it."""


def loads_here(store: BundleStore, *, clock: Clock, threads: int, encoder: str = AUTO) -> Load:
    """Opens bundles for this device; one that was never tried here is tried, and measured, in a child process first."""

    async def load(bundle: Bundle) -> tuple[Engine, DeviceTimes]:
        times = await prove(bundle, threads=threads, cache=store.root / _TIMES)
        opened = functools.partial(Engine, bundle, clock=clock, threads=threads, encoder=encoder)
        return await asyncio.get_running_loop().run_in_executor(None, opened), times

    return load


class ModelLoader:
    """One model of one server.

    Args:
        endpoint: the server.
        model: its name there; empty: the server's first.
        store: where bundles are kept.
        load: opens one.
        key: under which the store remembers what this server gave last; empty: its address.

    Attributes:
        engine: the one loaded last.
        fresh: whether the bundle to begin with is known to be the server's.
    """

    def __init__(self, endpoint: Endpoint, model: str, *, store: BundleStore, load: Load, key: str = "") -> None:
        self.engine: Engine | None = None
        self.fresh = False
        self._endpoint, self._model, self._store, self._load = endpoint, model, store, load
        self._key = key or endpoint.address
        self._times: dict[str, DeviceTimes] = {}
        self._kept: dict[str, float] = {}  # by which factor what is kept differs from that

    def times(self, engine: Engine) -> DeviceTimes:
        """What was measured of an engine on this device."""
        return self._times.get(engine.sha256, DeviceTimes())

    def paced(self, engine: Engine, factor: float) -> None:
        """Frames take longer here by a lasting factor than was measured: the next start begins with what they take."""
        times, kept = self._times.get(engine.sha256), self._kept.get(engine.sha256, 1.0)
        if times is not None and factor > 0 and max(factor / kept, kept / factor) > _DRIFT:
            self._kept[engine.sha256] = factor
            log.info("frames take %.2f times what was measured of bundle %s here; that is kept", factor, engine.sha256[:12])
            keep_times(times.scaled(factor), engine.bundle, threads=engine.threads, cache=self._store.root / _TIMES)

    async def first(self, *, live: bool, wait_s: float) -> Engine:
        """The model to begin with: the server's where that is the one remembered or must be fetched, else the remembered.

        Args:
            live: do not wait for a download where a bundle is remembered: the new one comes in the background.
            wait_s: how long a server is waited for where none is.

        Raises:
            HeadtailError: no server, and nothing remembered; the server refuses; or the bundle cannot be run here.
        """
        bundle = await self._first_bundle(live=live, wait_s=wait_s)
        engine = await self._opened(bundle)
        if self.fresh:
            self._store.remember(self._key, self._model, bundle.sha256)
        return engine

    async def fetch(self, sha256: str) -> Engine:
        """In the background: fetches, loads, and remembers the server's new bundle."""
        if self.engine is not None and self.engine.sha256 == sha256:
            return self.engine
        pace = functools.partial(asyncio.sleep, 0.01)
        bundle = await fetch_bundle(self._endpoint, self._store, model=self._model, sha256=sha256, pace=pace)
        engine = await self._opened(bundle)
        self._store.remember(self._key, self._model, bundle.sha256)
        return engine

    async def _opened(self, bundle: Bundle) -> Engine:
        engine, self._times[bundle.sha256] = await self._load(bundle)
        self.engine = engine
        return engine

    async def _first_bundle(self, *, live: bool, wait_s: float) -> Bundle:
        endpoint, model = self._endpoint, self._model
        known = self._store.remembered(self._key, model)
        if known is not None and (bundle := self._store.open(known)) is not None:
            try:
                info = choose_model(await list_models(endpoint, timeout_s=_GLANCE_S), model, endpoint.address)
            except HeadtailError as error:
                if not error.retryable:
                    raise
                info = None
            self.fresh = info is not None and info.bundle_sha256 == known
            if info is None or self.fresh or live:
                return bundle
        until_s = time.monotonic() + wait_s
        while True:
            try:
                info = choose_model(await list_models(endpoint), model, endpoint.address)
                bundle = await fetch_bundle(endpoint, self._store, model=info.name, sha256=info.bundle_sha256)
            except HeadtailError as error:
                if not error.retryable or time.monotonic() >= until_s:
                    raise
                await asyncio.sleep(_RETRY_S)
                continue
            self.fresh = True
            return bundle
