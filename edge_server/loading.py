"""Puts bundles into use, at the start and whenever they are read again; one that is bad blocks none of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from edge_server.backends import Backend
from edge_server.models import Model, ModelStore
from protos.errors import HeadtailError, ModelError

log = logging.getLogger(__name__)


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
            await backend.load(model.bundle)
        except HeadtailError as error:
            failures.append(error)
        except Exception as error:
            log.exception("%s: its tail cannot be loaded", model.name)
            failures.append(ModelError(f"{model.name}: its tail cannot be loaded: {type(error).__name__}: {error}"))
        else:
            on_used(model, store.use(source, model))
    return failures
