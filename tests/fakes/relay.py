"""A TCP relay that can fall silent: connections stay open and nothing moves any more, as when a peer or a link vanishes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Relay:
    """Forwards connections to a target.

    Args:
        target: host:port.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self._open = asyncio.Event()
        self.address = ""
        self.accepted = 0

    def freeze(self) -> None:
        """The connections that are open now carry nothing any more, and nobody is told; new ones pass."""
        self._open = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.accepted += 1
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


@asynccontextmanager
async def relay(target: str) -> AsyncIterator[Relay]:
    """A relay on a free loopback port."""
    it = Relay(target)
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    it.address = f"{host}:{port}"
    try:
        yield it
    finally:
        server.close()
        await it.close()
