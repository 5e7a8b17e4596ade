"""Shape mode: a TCP proxy on loopback whose bytes travel the same link and TCP model as in simulate mode.

Real processes, no privileges. Loss cannot be seen through a proxied connection as loss; what an application notices of
it can: bytes come later, in order, after the repair the model computes, and the sender is held back when the modelled
socket buffer is full. Datagrams to the same port travel the same link, and what is lost of them is lost.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from deploy.testbed.link.model import Link, LinkConfig
from deploy.testbed.link.path import Pipe
from deploy.testbed.link.tcp import MSS_BYTES
from deploy.testbed.real.realtime import RealTime
from deploy.testbed.real.udp import UdpProxy

log = logging.getLogger(__name__)

# What a kernel would take from the application before it blocks.
_SOCKET_BUFFER_BYTES = 256 * 1024
_CHUNK_BYTES = 16 * 1024


class Shaper:
    """Listens, connects on, and lets the bytes of both directions travel a link. Connections share the link.

    Args:
        up: from the client to the server.
        down: back.
        seed: of loss and jitter.
    """

    def __init__(self, up: LinkConfig, down: LinkConfig, *, seed: int = 0) -> None:
        self.time = RealTime()
        self.up, self.down = Link(up, f"up/{seed}"), Link(down, f"down/{seed}")
        self._loss = (up.loss.loss, down.loss.loss)
        self._seed = seed
        self._target = ("", 0)
        self._server: asyncio.Server | None = None
        self.udp: UdpProxy | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.up_bytes = self.down_bytes = 0
        self._ups: list[_Direction] = []

    @property
    def queued_bytes(self) -> int:
        """What clients have written and the far ends have not got yet, of all connections that still stand."""
        return sum(up.under_way for up in self._ups)

    async def start(self, host: str, port: int, *, listen: int = 0) -> int:
        """Begins to listen on loopback for connections to ``host:port``; returns the port."""
        self._target = (host, port)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", listen, limit=_CHUNK_BYTES)
        found: int = self._server.sockets[0].getsockname()[1]
        self.udp = UdpProxy(self.time, self.up, self.down, self._target)
        await self.udp.start(found)
        return found

    async def close(self) -> None:
        """Closes every connection."""
        if self._server is not None:
            self._server.close()
        if self.udp is not None:
            await self.udp.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.time.stop()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a callback of start_server is a task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        number, self.connections = self.connections, self.connections + 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target, limit=_CHUNK_BYTES)
        except OSError as error:
            log.info("the target does not answer: %s", error)
            writer.close()
            return
        seed = f"{self._seed}/{number}"
        up = _Direction(self.time, Pipe(
            self.time.loop, self.up, reverse_delay_ns=self.down.delay_ns, ack_loss=self._loss[1], seed=f"up/{seed}"
        ), far_writer)  # fmt: skip
        down = _Direction(self.time, Pipe(
            self.time.loop, self.down, reverse_delay_ns=self.up.delay_ns, ack_loss=self._loss[0], seed=f"down/{seed}"
        ), writer)  # fmt: skip
        self._ups.append(up)
        try:
            await asyncio.gather(up.carry(reader), down.carry(far_reader))
        except asyncio.CancelledError:
            log.debug("a connection was closed with bytes under way")
        finally:
            self._ups.remove(up)
            self.up_bytes += up.carried_bytes
            self.down_bytes += down.carried_bytes
            for end in (writer, far_writer):
                end.close()
                with suppress(OSError, asyncio.CancelledError):
                    await end.wait_closed()


class _Direction:
    """One direction of one connection."""

    def __init__(self, real: RealTime, pipe: Pipe, out: asyncio.StreamWriter) -> None:
        self._real = real
        self._pipe = pipe
        self._out = out
        self.under_way = 0
        self._room = asyncio.Event()
        self.carried_bytes = 0

    async def carry(self, reader: asyncio.StreamReader) -> None:
        """Until the sender closes; what is under way is still delivered."""
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                self._real.catch_up()
                for i in range(0, len(data), MSS_BYTES):
                    piece = data[i : i + MSS_BYTES]
                    self.under_way += len(piece)
                    self._pipe.send(len(piece), self._arrived, piece)
                self._real.catch_up()
                while self.under_way >= _SOCKET_BUFFER_BYTES:
                    self._room.clear()
                    await self._room.wait()
        while self.under_way:
            self._room.clear()
            await self._room.wait()
        with suppress(OSError, RuntimeError):
            self._out.write_eof()

    def _arrived(self, piece: bytes) -> None:
        self.under_way -= len(piece)
        self.carried_bytes += len(piece)
        self._room.set()
        if not self._out.is_closing():
            self._out.write(piece)
