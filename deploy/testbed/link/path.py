"""TCP flows driven by the virtual loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from deploy.testbed.link.loop import Loop
from deploy.testbed.link.model import Link
from deploy.testbed.link.tcp import TcpFlow
from deploy.testbed.link.trace import NEVER_NS


class Path(Protocol):
    """One direction of whatever carries messages.

    Attributes:
        unreliable: whether what is sent now may never arrive.
        lost: then the share of packets lost and the mean run of losses.
    """

    @property
    def unreliable(self) -> bool: ...  # noqa: D102

    @property
    def lost(self) -> tuple[float, float] | None: ...  # noqa: D102

    def allow(self, n_bytes: float) -> None:
        """What the next messages should cost, parity included."""
        ...

    def send(self, n_bytes: int, handler: Callable[[Any], None], argument: Any) -> None:
        """Writes a message now; ``handler(argument)`` runs at its arrival."""
        ...


class Pipe:
    """One direction of a connection: messages go in, a handler is called when each has arrived."""

    unreliable = False
    lost = None
    __slots__ = ("_loop", "_wake_ns", "flow")

    def __init__(self, loop: Loop, forward: Link, *, reverse_delay_ns: int, ack_loss: float, seed: int | str) -> None:
        self._loop = loop
        self.flow = TcpFlow(forward, reverse_delay_ns=reverse_delay_ns, ack_loss=ack_loss, seed=seed)
        self._wake_ns = NEVER_NS

    def allow(self, n_bytes: float) -> None:
        """A stream has no parity."""

    def send(self, n_bytes: int, handler: Callable[[Any], None], argument: Any) -> None:
        """Writes a message now; ``handler(argument)`` runs at its arrival."""
        loop = self._loop
        self.flow.write(n_bytes, loop.now_ns, partial(self._arrived, handler, argument))
        if self.flow.wake_ns < self._wake_ns:
            self._schedule()

    def _arrived(self, handler: Callable[[Any], None], argument: Any, at_ns: int) -> None:
        self._loop.at(at_ns, handler, argument)

    def _schedule(self) -> None:
        self._wake_ns = self.flow.wake_ns
        self._loop.at(self._wake_ns, self._wake, self._wake_ns)

    def _wake(self, scheduled_ns: int) -> None:
        if scheduled_ns != self._wake_ns:
            return  # an earlier wake was scheduled since
        self._wake_ns = NEVER_NS
        if self.flow.wake_ns <= self._loop.now_ns:
            self.flow.advance(self._loop.now_ns)
        if self.flow.wake_ns < NEVER_NS:
            self._schedule()
