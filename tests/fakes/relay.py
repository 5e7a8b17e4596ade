"""A relay of TCP and UDP that can fall silent: connections stay open and nothing moves, as when a peer or a link vanishes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from deploy.testbed.link.model import Link, LinkConfig
from deploy.testbed.link.trace import constant
from deploy.testbed.real.realtime import RealTime
from deploy.testbed.real.udp import UdpProxy

_WIDE = LinkConfig(trace=constant(1e9), delay_ns=0)


class Relay:
    """Forwards connections and datagrams to a target.

    Args:
        target: host:port.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._open = asyncio.Event()
        self._time = RealTime()
        self._udp = UdpProxy(self._time, Link(_WIDE, "up"), Link(_WIDE, "down"), self._target)
        self.address = ""
        self.accepted = 0

    async def start(self) -> asyncio.Server:
        """Listens on a free loopback port, TCP and UDP."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        await self._udp.start(port)
        self.address = f"{host}:{port}"
        return server

    def freeze(self) -> None:
        """The connections that are open now carry nothing any more, nor do datagrams, and nobody is told; new ones pass."""
        self._open = asyncio.Event()
        self._udp.blocked = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; the link to it is there again, also for datagrams."""
        self.accepted += 1
        self._udp.blocked = False
        onward_reader, onward_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, onward_writer]
        self._open.set()
        mine = self._open
        for source, sink in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.create_task(self._carry(source, sink, mine))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, mine: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if mine is not self._open:
                    await asyncio.Event().wait()
                sink.write(data)
                await sink.drain()
        if mine is self._open:
            with suppress(OSError):
                sink.close()

    async def close(self) -> None:
        """Ends every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
        await self._udp.close()
        self._time.stop()


@asynccontextmanager
async def relay(target: str) -> AsyncIterator[Relay]:
    """A relay on a free loopback port."""
    it = Relay(target)
    server = await it.start()
    try:
        yield it
    finally:
        server.close()
        await it.close()
