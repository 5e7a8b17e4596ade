"""Puts bundles into use and takes them out of it, at the start and while the server runs; a bad one blocks none of the others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edge_server.backends import Backend
from edge_server.models import Model, ModelStore, open_model
from protos.errors import BundleError, HeadtailError, ModelError, UnknownModelError

log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_S = 0.02


class Holder(Protocol):
    """A session, as far as it matters here."""

    model: Model | None

    def tell_replaced(self, model: Model) -> None:
        """The tail of this session's model was replaced."""
        ...

    def drain(self, grace_ns: int, why: str) -> None:
        """Tells the client that the session will end, and why new frames are refused."""
        ...

    def finish(self, error: HeadtailError | None = None) -> None:
        """Ends the session once it has sent what it owes."""
        ...

    def end(self, error: HeadtailError) -> None:
        """Ends the session at once."""
        ...


class Loading:
    """Changes what a running server holds: one change at a time, and none half done because its caller left.

    Args:
        store: the models.
        backend: of their tails.
        sessions: those that are open; seen as they are at each moment.
        grace_s: how long sessions on a removed model may take for what they owe.
        linger_s: how long they stay open after they were told, so that frames on their way get a plain refusal.
    """

    def __init__(
        self, store: ModelStore, backend: Backend, sessions: Collection[Holder], *, grace_s: float = 10.0, linger_s: float = 0.3
    ) -> None:
        self._store = store
        self._backend = backend
        self._sessions = sessions
        self._grace_s, self._linger_s = grace_s, linger_s
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def reload(self) -> None:
        """Reads all bundles from disk again and puts changed ones into use; sessions are told. What cannot be used is logged."""
        async with self._lock:
            try:
                failures = await bring_up_to_date(self._store, self._backend, self._on_used)
            except HeadtailError as error:
                failures = [error]
        for failure in failures:
            log.error("kept as it was: %s", failure.message)

    async def add(self, source: str) -> Model:
        """Puts a bundle into use; one that is in use from that source already is read again.

        Args:
            source: a default's name, or a bundle's directory.

        Raises:
            HeadtailError: it cannot be read or loaded, or its name is taken; nothing was changed.
        """
        return await self._whole(self._add(source))

    async def replace(self, old: Model, path: Path) -> Model:
        """Puts the bundle in a directory into use in a model's place, until bundles are read from their own places again.

        Args:
            old: in use.
            path: of a bundle of the same name.

        Raises:
            HeadtailError: it cannot be read or loaded, or the model is not in use any more; nothing was changed.
        """
        return await self._whole(self._replace(old, path))

    async def remove(self, name: str) -> int:
        """Takes a model out of use; its sessions are told, answered and ended. Returns how many there were.

        Raises:
            UnknownModelError: the server does not hold it.
        """
        return await self._whole(self._remove(name))

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """To its end, also where the caller is cancelled."""
        task = self._spawn(work)
        return await asyncio.shield(task)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _add(self, source: str) -> Model:
        async with self._lock:
            place, model = await asyncio.get_running_loop().run_in_executor(None, self._store.open, source)
            if all(each.sha256 != model.sha256 for each in self._store.all()):
                await load(self._backend, model)
                self._on_used(model, self._store.use(place, model))
            return model

    async def _replace(self, old: Model, path: Path) -> Model:
        async with self._lock:
            model = await asyncio.get_running_loop().run_in_executor(None, open_model, path)
            place = self._store.place_of(old)
            if model.name != old.name:
                raise BundleError(f"{path} holds {model.name!r}, not {old.name!r}")
            await load(self._backend, model)
            self._on_used(model, self._store.use(place, model))
            return model

    async def _remove(self, name: str) -> int:
        async with self._lock:
            removed = self._store.remove(name)
        gone = UnknownModelError(f"{name!r} was taken out of use at this server")
        told = self._on(name)
        log.info("%s is taken out of use; %d sessions are told", name, len(told))
        until = time.monotonic() + self._grace_s
        for session in told:
            session.drain(int(self._grace_s * 1e9), "this model was taken out of use at this server and no new frames are taken")
        if told:
            await asyncio.sleep(min(self._linger_s, self._grace_s))
        for session in told:
            session.finish(gone)
        while (not told.isdisjoint(self._sessions) or self._store.is_held(removed.sha256)) and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        for session in told.intersection(self._sessions):
            session.end(gone)
        await self._unload(removed.sha256)
        log.info("%s: bundle %s is out of use", name, removed.sha256[:12])
        return len(told)

    def _on(self, name: str) -> set[Holder]:
        return {each for each in self._sessions if each.model is not None and each.model.name == name}

    def _on_used(self, model: Model, old: Model | None) -> None:
        log.info("%s: bundle %s replaces %s", model.name, model.sha256[:12], old.sha256[:12] if old else "none")
        for session in self._sessions:
            session.tell_replaced(model)
        if old is not None:
            self._spawn(self._retire(old.sha256))

    async def _retire(self, sha256: str) -> None:
        """Unloads a replaced tail when nothing runs on it any more."""
        while self._store.is_held(sha256) or any(s.model is not None and s.model.sha256 == sha256 for s in self._sessions):
            await asyncio.sleep(1.0)
        await self._unload(sha256)

    async def _unload(self, sha256: str) -> None:
        """Unless the bundle has come into use again meanwhile."""
        async with self._lock:
            if all(each.sha256 != sha256 for each in self._store.all()):
                await self._backend.unload(sha256)

    async def close(self) -> None:
        """Leaves what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def bring_up_to_date(
    store: ModelStore, backend: Backend, on_used: Callable[[Model, Model | None], None]
) -> list[HeadtailError]:
    """Reads the bundles from disk and puts those into use that are new or changed, one after the other.

    Args:
        store: whose sources.
        backend: loads their tails.
        on_used: told each model put into use, and the one it replaces.

    Returns:
        Why others were left as they were.

    Raises:
        HeadtailError: the sources contradict each other; nothing was changed.
    """
    fresh, failures = await asyncio.get_running_loop().run_in_executor(None, store.read)
    for source, model in fresh:
        try:
            await load(backend, model)
        except HeadtailError as error:
            failures.append(error)
        else:
            on_used(model, store.use(source, model))
    return failures


async def load(backend: Backend, model: Model) -> None:
    """Loads a model's tail.

    Raises:
        HeadtailError: it cannot be, for whatever reason.
    """
    try:
        await backend.load(model.bundle)
    except HeadtailError:
        raise
    except Exception as error:
        log.exception("%s: its tail cannot be loaded", model.name)
        raise ModelError(f"{model.name}: its tail cannot be loaded: {type(error).__name__}: {error}") from error
