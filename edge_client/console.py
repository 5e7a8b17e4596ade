"""Whom a run speaks to, and how it ended: what one camera, several, and Frigate's door have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from protos.errors import HeadtailError


@dataclass(frozen=True, kw_only=True, slots=True)
class Console:
    """The streams a client speaks to.

    Attributes:
        stopping: whether the client was told to end, also while its event loop is stuck in a write.
    """

    results: TextIO
    status: Callable[[str], None]
    terminal: bool
    columns: int = 120
    stopping: Callable[[], bool] = lambda: False


@dataclass(slots=True, kw_only=True)
class Ending:
    """How a run ended: its summary, and the error it ended with, if any."""

    summary: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    error: HeadtailError | None = None
    interrupted: bool = False

    async def settle(self, task: asyncio.Task[None]) -> None:
        """Waits for a run's task. An error of ours is kept; an interrupt ends the task, and is no error."""
        if self.interrupted:
            task.cancel()
        try:
            await task
        except HeadtailError as error:
            self.error = error
        except asyncio.CancelledError:
            if not self.interrupted:
                raise
