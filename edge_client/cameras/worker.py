"""One thread for the device's work of all cameras: the job with the earliest deadline goes first, whoever's it is.

Frames have the same deadline from their capture on, so cameras of equal pace get equal turns; none can have more than a frame or
two waiting, since a live camera begins its next frame only when the last one has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from edge_client.device.worker import DeviceWorker, Executor

T = TypeVar("T")

_LOOK_S = 0.01


class SharedWorker:
    """The worker, and each camera's part in it."""

    def __init__(self, execute: Executor) -> None:
        self._all = DeviceWorker(execute)
        self._all.overdue = self._overdue
        self._parts: list[CameraWorker] = []

    def part(self) -> CameraWorker:
        """What one camera's pipeline works with."""
        made = CameraWorker(self._all)
        self._parts.append(made)
        return made

    def _overdue(self) -> None:
        for part in self._parts:
            if part.busy:
                part.overdue()


class CameraWorker(DeviceWorker):
    """A camera's jobs among the others'.

    Attributes:
        busy: a job of this camera's is running now.
    """

    def __init__(self, shared: DeviceWorker) -> None:
        super().__init__(_not_used)
        self.busy = False
        self._shared = shared

    @property
    def idle(self) -> bool:
        """Whether nothing of this camera runs."""
        return not self.busy

    async def join(self) -> None:
        """Waits for the job of this camera that runs; the others go on."""
        while self.busy:
            await asyncio.sleep(_LOOK_S)

    async def run(self, function: Callable[[], T], *, due_ns: int) -> T:
        """See ``DeviceWorker``."""

        def work() -> T:
            self.busy = True
            try:
                return function()
            finally:
                self.busy = False

        return await self._shared.run(work, due_ns=due_ns)


async def _not_used(function: Callable[[], object]) -> object:
    return function()
