"""The replayed load of `server_load`, over HTTP/1.1: each stream keeps a window of requests in flight, a connection each.

    python -m tests.fakes.http_load HOST:PORT FRAMES.bin --path /predict --format json --streams 16

``FRAMES.bin`` as `server_load.write_frames` wrote it; what is posted is a frame's payloads alone (`joined`), as bytes or, for
servers that take JSON, in base64. The answer is a JSON object with ``top``, ``batch_size`` and ``tail_ns``. Every line on
standard input is a number of seconds to keep all windows full for; one JSON object is printed for each.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import struct
import sys
import time
from pathlib import Path

from tests.fakes.server_load import Row, read_frames, summary


def joined(payloads: list[bytes]) -> bytes:
    """A frame's layers as one body, each behind its length."""
    return b"".join(struct.pack("<I", len(payload)) + payload for payload in payloads)


def parted(body: bytes) -> list[bytes]:
    """What `joined` joined."""
    payloads, at = [], 0
    while at < len(body):
        (size,) = struct.unpack_from("<I", body, at)
        payloads.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    return payloads


def request(host: str, path: str, payload: bytes, form: str) -> bytes:
    """One whole request."""
    body = payload if form == "bytes" else json.dumps({"payload": base64.b64encode(payload).decode()}).encode()
    kind = "application/octet-stream" if form == "bytes" else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection:
    """One kept-alive connection with one request in flight."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def post(self, whole: bytes) -> tuple[int, bytes]:
        """(status, body)."""
        self._writer.write(whole)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        if "transfer-encoding: chunked" not in head:
            return status, await self._reader.readexactly(int(head.split("content-length:", 1)[1].split("\r\n", 1)[0]))
        body = b""
        while size := int((await self._reader.readline()).strip(), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readline()
        await self._reader.readline()
        return status, body

    def close(self) -> None:
        """Hangs up."""
        self._writer.close()

    async def pulse(self, requests: list[bytes], number: int, until_s: float) -> list[Row]:
        """Asks without a pause until then."""
        rows, at = [], 0
        while (begun := time.perf_counter()) < until_s:
            status, body = await self.post(requests[(at + number) % len(requests)])
            now, at = time.perf_counter(), at + 1
            answer = json.loads(body) if status == 200 else {}
            rows.append(
                Row(now, (now - begun) * 1e3, answer.get("batch_size", 1), "" if status == 200 else str(status),
                    answer.get("tail_ns", 0) / 1e6)
            )  # fmt: skip
        return rows


async def run(args: argparse.Namespace) -> None:
    """Pulses until the input ends."""
    host, _, port = args.address.rpartition(":")
    bodies = [joined([layer.payload for layer in layers]) for layers in read_frames(args.frames)]
    requests = [request(args.address, args.path, body, args.format) for body in bodies]
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        # Anew for each pulse, ahead of its time: between two pulses a server may close what is idle.
        connections = [Connection(*await asyncio.open_connection(host, int(port))) for _ in range(args.streams * args.window)]
        until_s = time.perf_counter() + float(line)
        rows = await asyncio.gather(*(c.pulse(requests, n, until_s) for n, c in enumerate(connections)))
        sys.stdout.write(json.dumps(summary([row for some in rows for row in some], until_s)) + "\n")
        sys.stdout.flush()
        for connection in connections:
            connection.close()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("address")
    p.add_argument("frames", type=Path)
    p.add_argument("--path", default="/predict")
    p.add_argument("--format", choices=("bytes", "json"), default="bytes")
    p.add_argument("--streams", type=int, default=1)
    p.add_argument("--window", type=int, default=2)
    return p


if __name__ == "__main__":
    asyncio.run(run(parser().parse_args()))
