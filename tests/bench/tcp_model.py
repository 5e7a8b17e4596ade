"""The TCP model against the kernel's own TCP, over the relay. Needs root.

    python -m tests.bench.tcp_model [--seconds 15]

At three losses and two round trips: throughput of a flow that always has something to send, and the 95th percentile of
the one-way delay of 6 kB frames, 20 a second. Both are asked to agree within 25 %. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from deploy.testbed.link import Link, LinkConfig, LossModel
from deploy.testbed.loop import Loop
from deploy.testbed.path import Pipe
from deploy.testbed.relay import SERVER_ADDRESS, Relay, why_not
from deploy.testbed.report import quantile
from deploy.testbed.tcp import TcpFlow
from deploy.testbed.trace import constant

PORT, FRAME_BYTES, REPLY_BYTES, FPS = 5201, 6000, 100, 20.0
TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)
MBPS = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    mbps: float
    delay_p50_ms: float
    delay_p95_ms: float


def link(rtt_ms: float, loss: float) -> LinkConfig:
    return LinkConfig(
        trace=constant(MBPS * 1e6), delay_ns=int(rtt_ms * 5e5), queue_bytes=int(MBPS * 1e6 / 8 * 0.1), loss=LossModel(loss=loss)
    )


# ---------------------------------------------------------------- the kernel's side


def serve() -> None:
    """At the far end: counts bytes, or answers each frame's header with its one-way delay (one clock: one machine)."""
    with socket.create_server((SERVER_ADDRESS, PORT)) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_receive, args=(connection,), daemon=True).start()


def _receive(connection: socket.socket) -> None:
    kind = connection.recv(1)
    if kind == b"b":
        total, first = 0, 0.0
        with suppress(ConnectionResetError):
            while data := connection.recv(65_536):
                total += len(data)
                first = first or time.monotonic()
        print(json.dumps({"mbps": total * 8 / 1e6 / (time.monotonic() - first)}), flush=True)
        return
    delays: list[float] = []
    buffer = b""
    while True:
        while len(buffer) < FRAME_BYTES:
            data = connection.recv(65_536)
            if not data:
                print(json.dumps({"delays": delays}), flush=True)
                return
            buffer += data
        (sent_ns,) = struct.unpack("!q", buffer[:8])
        delays.append((time.monotonic_ns() - sent_ns) / 1e6)
        connection.sendall(bytes(REPLY_BYTES))  # as a server would: it carries the acknowledgement at once
        buffer = buffer[FRAME_BYTES:]


def send(kind: str, seconds: float) -> None:
    with socket.create_connection((SERVER_ADDRESS, PORT)) as s:
        s.setsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, b"cubic")
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.sendall(kind.encode())
        begin = time.monotonic()
        if kind == "b":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 1, 0))
            while time.monotonic() < begin + seconds:
                with suppress(BlockingIOError):
                    s.send(bytes(16_384))
            # What the kernel still holds is not waited for: the receiver's clock ends with the reset.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        for i in range(int(seconds * FPS)):
            time.sleep(max(0.0, begin + i / FPS - time.monotonic()))
            s.sendall(struct.pack("!q", time.monotonic_ns()) + bytes(FRAME_BYTES - 8))
        time.sleep(1.0)


async def kernel(config: LinkConfig, seconds: float) -> Found:
    me = [sys.executable, "-m", "tests.bench.tcp_model"]
    async with Relay(config, config) as relay:
        pipe = asyncio.subprocess.PIPE
        server = await asyncio.create_subprocess_exec(*relay.command("server", [*me, "--role", "serve"]), stdout=pipe)
        assert server.stdout is not None
        await asyncio.wait_for(server.stdout.readline(), 60)
        found = {}
        for kind in "bf":
            client = await asyncio.create_subprocess_exec(
                *relay.command("client", [*me, "--role", "send", "--kind", kind, "--seconds", str(seconds)])
            )
            await asyncio.wait_for(client.wait(), seconds + 60)
            line = await asyncio.wait_for(server.stdout.readline(), 60)
            found |= json.loads(line)
        server.terminate()
        await server.wait()
    delays = sorted(found["delays"])
    return Found(mbps=found["mbps"], delay_p50_ms=quantile(delays, 0.5), delay_p95_ms=quantile(delays, 0.95))


# ---------------------------------------------------------------- the model's side


def model(config: LinkConfig, seconds: float, seeds: int = 12) -> Found:
    rates, delays = [], []
    for seed in range(seeds):
        flow = TcpFlow(Link(config, seed), reverse_delay_ns=config.delay_ns, ack_loss=config.loss.loss, seed=seed)
        got, now = [0], 0
        while now < seconds * 1e9:
            while flow.unsent_bytes < 100_000:
                flow.write(14_480, now, lambda _at, got=got: got.__setitem__(0, got[0] + 14_480))  # type: ignore[misc]
            now = max(flow.wake_ns, now)
            flow.advance(now)
        rates.append(got[0] * 8 / seconds / 1e6)
        loop = Loop()
        pipe = Pipe(loop, Link(config, seed), reverse_delay_ns=config.delay_ns, ack_loss=config.loss.loss, seed=seed)

        def arrived(sent_ns: int, loop: Loop = loop) -> None:
            delays.append((loop.now_ns - sent_ns) / 1e6)

        for i in range(int(seconds * FPS)):
            at = int(i * 1e9 / FPS)
            loop.at(at, lambda at, pipe=pipe, arrived=arrived: pipe.send(FRAME_BYTES, arrived, at), at)  # type: ignore[misc]
        loop.run(int((seconds + 30) * 1e9))
    delays.sort()
    return Found(mbps=sum(rates) / len(rates), delay_p50_ms=quantile(delays, 0.5), delay_p95_ms=quantile(delays, 0.95))


async def compare(seconds: float) -> list[dict[str, float]]:
    rows = []
    print(f"{'RTT ms':>7}{'loss %':>8}{'kernel Mbit/s':>15}{'model':>8}{'':>7}{'kernel p95 ms':>15}{'model':>8}")
    for rtt_ms in (20.0, 80.0):
        for loss in (0.0, 0.01, 0.03):
            config = link(rtt_ms, loss)
            real, ours = await kernel(config, seconds), model(config, seconds)
            row = {
                "rtt_ms": rtt_ms, "loss_percent": 100 * loss, "kernel_mbps": real.mbps, "model_mbps": ours.mbps,
                "kernel_p95_ms": real.delay_p95_ms, "model_p95_ms": ours.delay_p95_ms, "kernel_p50_ms": real.delay_p50_ms,
                "model_p50_ms": ours.delay_p50_ms, "mbps_off": ours.mbps / real.mbps - 1,
                "p95_off": ours.delay_p95_ms / real.delay_p95_ms - 1,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{rtt_ms:>7.0f}{100 * loss:>8.1f}{real.mbps:>15.2f}{ours.mbps:>8.2f}{row['mbps_off']:>7.0%}"
                f"{real.delay_p95_ms:>15.1f}{ours.delay_p95_ms:>8.1f}{row['p95_off']:>7.0%}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="a measurement (default %(default)s)")
    parser.add_argument("--role", choices=("compare", "serve", "send"), default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="b", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "serve":
        serve()
    elif args.role == "send":
        send(args.kind, args.seconds)
    elif reason := why_not():
        print(json.dumps({"skipped": reason}))
    else:
        rows = asyncio.run(compare(args.seconds))
        within = all(abs(r["mbps_off"]) <= 0.25 and abs(r["p95_off"]) <= 0.25 for r in rows)
        print(json.dumps({"within_25_percent": within, "rows": rows}))


if __name__ == "__main__":
    main()
