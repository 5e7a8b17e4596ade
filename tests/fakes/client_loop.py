"""An asyncio loop on virtual time: a sleep takes no time at all, and nothing ever happens twice differently."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.SelectSelector):
    """Instead of waiting, moves the loop's clock on."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits and nothing will ever happen"
            self.loop.now_s += max(self.loop.step_s, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when everything waits.

    Args:
        step_s: least time between one round of the loop and the next. aioquic's timers come due a rounding error early, and would
            be set again for the same moment for ever.
    """

    def __init__(self, step_s: float = 0.0) -> None:
        self.now_s, self.step_s = 0.0, step_s
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds."""
        return self.now_s

    def clock(self) -> int:
        """Virtual nanoseconds, as the client's clock."""
        return round(self.now_s * 1e9)


def run_virtual(main: Callable[[VirtualLoop], Awaitable[T]], *, limit_s: float = 120.0, step_s: float = 0.0) -> T:
    """Runs ``main`` to its end on a fresh virtual loop; more than ``limit_s`` virtual seconds count as a hang."""
    loop = VirtualLoop(step_s)

    async def bounded() -> T:
        async with asyncio.timeout(limit_s):
            return await main(loop)

    try:
        return loop.run_until_complete(bounded())
    finally:
        loop.close()
