"""The ZMQ socket: every request is answered in time, with boxes or with zeros.

A ROUTER socket speaks to Frigate's REQ sockets, one for each of its detectors, and keeps them apart. A request that cannot be
read is answered with zeros, as Frigate itself would do, since a REQ socket without an answer is stuck.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import numpy as np
import zmq
import zmq.asyncio

from edge_client.frames import NS_PER_MS, FrameReport, Outcome
from edge_client.frigate.protocol import ROWS, model_reply, read_request, reply, rows_of
from protos.errors import ConfigError, HeadtailError, ProtocolError
from protos.messages import Detection
from splitters.tasks.preprocess import Frame

log = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20
_AT_A_TIME = 16

Infer = Callable[[Frame], Awaitable[FrameReport]]


class Door:
    """Answers Frigate.

    Args:
        address: what ZMQ binds to, ``tcp://127.0.0.1:5555`` or ``ipc:///path``.
        infer: answers a frame.
        limit_ms: from a request's arrival to its answer; what comes later is answered with zeros.

    Attributes:
        outcomes: requests by outcome; ``zeros``: nothing could be said in time, ``refused``: it could not be read.
        payload_bytes: sent to the server in all. tensor_bytes: received.
    """

    def __init__(self, address: str, infer: Infer, *, limit_ms: float) -> None:
        self.outcomes: Counter[str] = Counter()
        self.payload_bytes = 0
        self.tensor_bytes = 0
        self.latencies_ms: list[float] = []
        self._infer, self._limit_s = infer, limit_ms / 1e3
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_BYTES)
        self._jobs: set[asyncio.Task[None]] = set()
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ConfigError(f"--frigate {address}: cannot listen there: {error}") from error

    @property
    def address(self) -> str:
        """Where it listens."""
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    async def serve(self) -> None:
        """Answers until cancelled."""
        while True:
            parts = await self._socket.recv_multipart()
            if b"" not in parts[1:2]:
                continue  # no REQ socket's: there is nobody to answer
            if len(self._jobs) >= _AT_A_TIME:
                await self._answer(parts[:2], reply(rows_of(None, 1, 1)), "zeros")
                continue
            job = asyncio.create_task(self._request(parts[:2], parts[2:]))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)

    async def _request(self, to: list[bytes], parts: list[bytes]) -> None:
        begin_ns = time.monotonic_ns()
        rows = np.zeros((ROWS, 6), np.float32)
        try:
            asked = read_request(parts)
            if asked.image is None:
                await self._answer(to, model_reply(), "about model")
                return
            self.tensor_bytes += len(parts[1])
            async with asyncio.timeout(self._limit_s):
                report = await self._infer(asked.image)
            self.payload_bytes += report.payload_bytes
            outcome = report.outcome.value if report.outcome in (Outcome.RESULT, Outcome.LOCAL, Outcome.UNCHANGED) else "zeros"
            height_px, width_px = asked.image.shape[:2]
            if isinstance(report.answer, Detection):
                rows = rows_of(report.answer, width_px, height_px)
        except TimeoutError:
            outcome = "zeros"
        except ProtocolError as error:
            log.warning("a request of Frigate's cannot be read: %s", error.message)
            outcome = "refused"
        except HeadtailError as error:
            log.warning("no detections: %s", error.message)
            outcome = "zeros"
        self.latencies_ms.append((time.monotonic_ns() - begin_ns) / NS_PER_MS)
        await self._answer(to, reply(rows), outcome)

    async def _answer(self, to: list[bytes], parts: list[bytes], outcome: str) -> None:
        self.outcomes[outcome] += 1
        await self._socket.send_multipart([*to, *parts])

    async def close(self) -> None:
        """Ends it."""
        for job in tuple(self._jobs):
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        self._socket.close()
        self._context.term()
