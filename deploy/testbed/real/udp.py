"""Datagrams through the shaper: what it loses is lost, what it delays comes later; nothing is repaired."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from deploy.testbed.link.model import LOST, Link
from deploy.testbed.real.realtime import RealTime

_HEADERS_BYTES = 28  # of IP and UDP
Fate = Callable[[bytes], Iterable[tuple[bytes, int]]]
"""What becomes of a datagram that the link carries: what arrives instead of it, each so much later, ns."""


def unchanged(data: bytes) -> Iterable[tuple[bytes, int]]:
    """It arrives as it is, once."""
    return ((data, 0),)


class UdpProxy(asyncio.DatagramProtocol):
    """A socket that clients send to; each client has a socket of its own towards the target.

    Args:
        time: of the links.
        up, down: shared with whatever else travels them.
        target: (host, port).
        fate: of every datagram that is not lost, in either direction.
    """

    def __init__(self, time: RealTime, up: Link, down: Link, target: tuple[str, int], *, fate: Fate = unchanged) -> None:
        self._time, self._up, self._down, self._target = time, up, down, target
        self.fate = fate
        self.blocked = False  # as a firewall would: nothing passes, and nobody is told
        self.ups = self.downs = 0  # datagrams that came
        self._transport: asyncio.DatagramTransport | None = None
        self._fars: dict[Any, asyncio.DatagramTransport | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> None:
        """Begins to listen on loopback."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", port))

    def rebind(self) -> None:
        """The clients come from other ports from here on, as behind a router that started again."""
        for far in self._fars.values():
            if far is not None:
                far.close()
        self._fars.clear()

    async def close(self) -> None:
        """Closes all sockets."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.rebind()
        if self._transport is not None:
            self._transport.close()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Of a client."""
        self.ups += 1
        far = self._fars.get(addr)
        if far is not None:
            self._carry(self._up, data, far.sendto)
        elif addr not in self._fars:
            self._fars[addr] = None
            task = asyncio.create_task(self._open(addr, data))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _open(self, addr: Any, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        far, _ = await loop.create_datagram_endpoint(lambda: _Far(self, addr), remote_addr=self._target)
        self._fars[addr] = far
        self._carry(self._up, data, far.sendto)

    def back(self, data: bytes, addr: Any) -> None:
        """The target's, for the client at ``addr``."""
        self.downs += 1
        if self._transport is not None:
            self._carry(self._down, data, partial(self._transport.sendto, addr=addr))

    def _carry(self, link: Link, data: bytes, deliver: Callable[[bytes], Any]) -> None:
        self._time.catch_up()
        at_ns = link.send(len(data) + _HEADERS_BYTES, self._time.loop.now_ns)
        if at_ns != LOST and not self.blocked:
            for one, later_ns in self.fate(data):
                self._time.loop.at(at_ns + later_ns, _deliver, (deliver, one))
        self._time.catch_up()


def _deliver(row: tuple[Callable[[bytes], Any], bytes]) -> None:
    deliver, data = row
    with suppress(OSError):
        deliver(data)


class _Far(asyncio.DatagramProtocol):
    """The proxy's socket towards the target, for one client."""

    def __init__(self, proxy: UdpProxy, addr: Any) -> None:
        self._proxy, self._addr = proxy, addr

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Of the target."""
        del addr
        self._proxy.back(data, self._addr)
