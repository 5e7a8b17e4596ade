"""The TCP model against the kernel's own TCP, over the relay. Needs root.

    python -m tests.bench.tcp_model [--seconds 15] [--repeats 4] [--parallel 2]

At three losses and two round trips: throughput of a flow that always has something to send, and the 95th percentile of
the one-way delay of 3.4 kB frames, 20 a second, each answered with 100 bytes. Both are asked to agree within 25 %. A flow of
15 s meets a few dozen losses, so every cell is measured several times, each time with other losses; the standard error of the
mean is printed beside it. Measurements during which the machine was so busy that the relay itself let packets leave late are
left out. Prints a table, then one JSON line.
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
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from deploy.testbed.link.loop import Loop
from deploy.testbed.link.model import Link, LinkConfig, LossModel
from deploy.testbed.link.path import Pipe
from deploy.testbed.link.tcp import MSS_BYTES, TcpFlow
from deploy.testbed.link.trace import constant
from deploy.testbed.real.relay import SERVER_ADDRESS, Relay, why_not
from deploy.testbed.simulate.report import quantile

PORT, REPLY_BYTES, FPS = 5201, 100, 20.0
FRAME_BYTES = 3400  # the finest operating point's; half a megabit a second, which every cell can carry
TCP_CONGESTION = getattr(socket, "TCP_CONGESTION", 13)
MBPS = 8.0
CELLS = [(rtt_ms, loss) for rtt_ms in (20.0, 80.0) for loss in (0.0, 0.01, 0.03)]
LATE_MS = 2.5  # a relay whose packets leave later than this (p95) adds an eighth to the shorter round trip


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Of one cell, over its runs."""

    mbps: float
    mbps_error: float
    delay_p50_ms: float
    delay_p95_ms: float
    delay_p95_error: float
    late_p95_ms: float


def link(rtt_ms: float, loss: float) -> LinkConfig:
    """8 Mbit/s with 100 ms of queue."""
    return LinkConfig(
        trace=constant(MBPS * 1e6), delay_ns=int(rtt_ms * 5e5), queue_bytes=int(MBPS * 1e6 / 8 * 0.1), loss=LossModel(loss=loss)
    )


# ---------------------------------------------------------------- the kernel's side


def serve() -> None:
    """At the far end: reads everything; answers frames."""
    with socket.create_server((SERVER_ADDRESS, PORT)) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_receive, args=(connection,), daemon=True).start()


def _receive(connection: socket.socket) -> None:
    answers = connection.recv(1) == b"f"
    left = FRAME_BYTES
    with suppress(ConnectionResetError), connection:
        while n := len(connection.recv(min(65_536, left) if answers else 65_536)):
            left -= n
            if answers and left == 0:
                connection.sendall(bytes(REPLY_BYTES))  # as a server would: it carries the acknowledgement at once
                left = FRAME_BYTES


def send(kind: str, seconds: float) -> None:
    """At the near end: a flow that always has something to send, or frames. Prints when each frame was written."""
    with socket.create_connection((SERVER_ADDRESS, PORT)) as s:
        used = s.getsockopt(socket.IPPROTO_TCP, TCP_CONGESTION, 16).rstrip(b"\0").decode()
        if used != "cubic":
            sys.exit(f"the kernel runs {used}, the model is of cubic")
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.sendall(kind.encode())
        begin = time.monotonic()
        sent_ns = []
        if kind == "b":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 1, 0))
            while time.monotonic() < begin + seconds:
                with suppress(BlockingIOError):
                    s.send(bytes(16_384))
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # the rest is not waited for
        else:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)  # a full buffer would hold the clock of the next frame
            replies = threading.Thread(target=_drain, args=(s, int(seconds * FPS) * REPLY_BYTES))
            replies.start()
            for i in range(int(seconds * FPS)):
                time.sleep(max(0.0, begin + i / FPS - time.monotonic()))
                sent_ns.append(time.monotonic_ns())
                s.sendall(bytes(FRAME_BYTES))
            replies.join(30)
            s.shutdown(socket.SHUT_WR)
    print(json.dumps(sent_ns))


def _drain(connection: socket.socket, n_bytes: int) -> None:
    while n_bytes > 0 and (data := connection.recv(65_536)):
        n_bytes -= len(data)


class Tap(Relay):
    """A relay that notes what it hands to the far end: receivers' own wake-ups then do not count."""

    def __init__(self, config: LinkConfig, seed: int) -> None:
        super().__init__(config, config, seed=seed)
        self.seen: list[tuple[int, bytes]] = []

    def delivered(self, packet: bytes) -> None:
        """Keeps the headers."""
        self.seen.append((time.monotonic_ns(), packet[:60] + struct.pack("!I", len(packet))))

    def in_order(self) -> list[tuple[int, int]]:
        """(stream bytes complete, when) of the newest connection to the far end, as a receiver would see it."""
        first = have = 0
        found: list[tuple[int, int]] = []
        ahead: dict[int, int] = {}
        for at_ns, head in self.seen:
            ip = (head[0] & 15) * 4
            _, port, seq = struct.unpack("!HHI", head[ip : ip + 8])
            if port != PORT or head[9] != socket.IPPROTO_TCP:
                continue
            (total,) = struct.unpack("!I", head[-4:])
            n = total - ip - (head[ip + 12] >> 4) * 4
            if head[ip + 13] & 2:  # SYN: a new connection
                first, have, found, ahead = seq + 1, 0, [], {}
                continue
            start = (seq - first) & 0xFFFFFFFF
            if n and start < 1 << 31:
                ahead[start] = max(ahead.get(start, 0), start + n)
                while any(s <= have < e for s, e in ahead.items()):
                    have = max(e for s, e in ahead.items() if s <= have)
                    ahead = {s: e for s, e in ahead.items() if e > have}
                if not found or have > found[-1][0]:
                    found.append((have, at_ns))
        return found


async def measure(config: LinkConfig, seconds: float, seed: int) -> dict[str, Any]:
    """Both flows over one relay."""
    me = [sys.executable, "-m", "tests.bench.tcp_model"]
    async with Tap(config, seed) as relay:
        pipe = asyncio.subprocess.PIPE
        server = await asyncio.create_subprocess_exec(*relay.command("server", [*me, "--role", "serve"]), stdout=pipe)
        assert server.stdout is not None
        await asyncio.wait_for(server.stdout.readline(), 60)
        rows: dict[str, list[tuple[int, int]]] = {}
        sent: list[int] = []
        for kind in "bf":
            relay.seen.clear()
            client = await asyncio.create_subprocess_exec(
                *relay.command("client", [*me, "--role", "send", "--kind", kind, "--seconds", str(seconds)]), stdout=pipe
            )
            out, _ = await asyncio.wait_for(client.communicate(), seconds + 90)
            if client.returncode:
                raise SystemExit("the sender failed")
            sent = json.loads(out)
            await asyncio.sleep(0.5)
            rows[kind] = relay.in_order()
        server.terminate()
        await server.wait()
        late = sorted(relay.late_ns)
    bulk, frames = rows["b"], rows["f"]
    rate = 8e3 * (bulk[-1][0] - bulk[0][0]) / (bulk[-1][1] - bulk[0][1])
    ends = [row[0] for row in frames]
    delays = [(frames[bisect_left(ends, 1 + FRAME_BYTES * (i + 1))][1] - at_ns) / 1e6 for i, at_ns in enumerate(sent)]
    return {"mbps": rate, "delays": delays, "late_p50_ms": quantile(late, 0.5) / 1e6, "late_p95_ms": quantile(late, 0.95) / 1e6}


async def kernel(cell: tuple[float, float], seconds: float, seed: int, gate: asyncio.Semaphore) -> dict[str, Any]:
    """One measurement in a process of its own: a relay has the event loop to itself."""
    async with gate:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.tcp_model", "--role", "cell", "--seconds", str(seconds), "--seed", str(seed)),
            *("--rtt-ms", str(cell[0]), "--loss", str(cell[1])), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit("a measurement failed; its message stands above")
    return dict(json.loads(out.splitlines()[-1]))


# ---------------------------------------------------------------- the model's side


def model(config: LinkConfig, seconds: float, seed: int) -> dict[str, Any]:
    """The same two flows in virtual time."""
    flow = TcpFlow(Link(config, seed), reverse_delay_ns=config.delay_ns, ack_loss=config.loss.loss, seed=seed)
    arrivals: list[int] = []
    now, end = 0, int(seconds * 1e9)
    while now < end:
        while flow.unsent_bytes < 100_000:
            flow.write(MSS_BYTES, now, arrivals.append)
        now = max(flow.wake_ns, now)
        flow.advance(now)
    last = bisect_right(arrivals, end)
    rate = 8e3 * MSS_BYTES * last / (arrivals[last - 1] - arrivals[0])
    loop, delays = Loop(), []
    pipe = Pipe(loop, Link(config, seed), reverse_delay_ns=config.delay_ns, ack_loss=config.loss.loss, seed=seed)

    def arrived(sent_ns: int) -> None:
        delays.append((loop.now_ns - sent_ns) / 1e6)

    for i in range(int(seconds * FPS)):
        at = int(i * 1e9 / FPS)
        loop.at(at, lambda at: pipe.send(FRAME_BYTES, arrived, at), at)
    loop.run(int((seconds + 30) * 1e9))
    return {"mbps": rate, "delays": delays}


def pooled(runs: Sequence[dict[str, Any]]) -> Found:
    """Mean bitrate and all delays together; standard errors from the scatter of the runs."""
    rates, p95s = [r["mbps"] for r in runs], [quantile(sorted(r["delays"]), 0.95) for r in runs]
    delays = sorted(d for r in runs for d in r["delays"])

    def error(xs: Sequence[float]) -> float:
        return stdev(xs) / len(xs) ** 0.5 if len(xs) > 1 else 0.0

    return Found(
        mbps=mean(rates), mbps_error=error(rates), delay_p50_ms=quantile(delays, 0.5), delay_p95_ms=quantile(delays, 0.95),
        delay_p95_error=error(p95s), late_p95_ms=max((r.get("late_p95_ms", 0.0) for r in runs), default=0.0),
    )  # fmt: skip


async def measured(
    runs: list[dict[str, Any]], seconds: float, seeds: Sequence[int], parallel: int, keep: Path | None, *, lossy: bool = False
) -> None:
    """Every cell (or only those that lose packets) once with each seed, added to ``runs`` as they come."""
    gate = asyncio.Semaphore(parallel)

    async def one(cell: tuple[float, float], seed: int) -> None:
        runs.append({"cell": cell, "seed": seed, **await kernel(cell, seconds, seed, gate)})
        if keep is not None:
            keep.write_text(json.dumps(runs))

    await asyncio.gather(*(one(c, seed) for seed in seeds for c in CELLS if c[1] or not lossy))


def table(runs: Sequence[dict[str, Any]], seconds: float, model_runs: int) -> list[dict[str, float]]:
    """Kernel and model, cell by cell."""
    rows = []
    print(f"{'RTT ms':>7}{'loss %':>8}{'kernel Mbit/s':>18}{'model':>8}{'off':>7}", end="")
    print(f"{'kernel p95 ms':>18}{'model':>8}{'off':>7}{'relay late':>12}")
    for cell in CELLS:
        rtt_ms, loss = cell
        mine = [r for r in runs if tuple(r["cell"]) == cell]
        if not mine:
            print(f"no punctual measurement at {rtt_ms:g} ms and {loss:.0%} loss: repeat on a quieter machine")
            continue
        real = pooled(mine)
        ours = pooled([model(link(rtt_ms, loss), seconds, 1000 + seed) for seed in range(model_runs)])
        row = {
            "rtt_ms": rtt_ms, "loss_percent": 100 * loss, "kernel_mbps": real.mbps, "model_mbps": ours.mbps,
            "kernel_mbps_error": real.mbps_error, "kernel_p95_ms": real.delay_p95_ms, "kernel_p95_error": real.delay_p95_error,
            "model_p95_ms": ours.delay_p95_ms, "kernel_p50_ms": real.delay_p50_ms, "model_p50_ms": ours.delay_p50_ms,
            "relay_late_p95_ms": real.late_p95_ms, "runs": len(mine), "mbps_off": ours.mbps / real.mbps - 1,
            "p95_off": ours.delay_p95_ms / real.delay_p95_ms - 1,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{rtt_ms:>7.0f}{100 * loss:>8.1f}{real.mbps:>11.2f} ± {real.mbps_error:4.2f}{ours.mbps:>8.2f}{row['mbps_off']:>7.0%}"
            f"{real.delay_p95_ms:>11.1f} ± {real.delay_p95_error:4.1f}{ours.delay_p95_ms:>8.1f}{row['p95_off']:>7.0%}"
            f"{real.late_p95_ms:>9.1f} ms",
            flush=True,
        )
    return rows


def main() -> None:
    """Parses and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="a measurement (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=4, help="measurements a cell (default %(default)s)")
    parser.add_argument("--parallel", type=int, default=2, help="relays at a time (default %(default)s)")
    parser.add_argument("--lossy", action="store_true", help="measure only the cells that lose packets, whose figures scatter")
    parser.add_argument("--model-runs", type=int, default=60, help="runs of the model a cell (default %(default)s)")
    parser.add_argument("--runs", type=Path, help="add the kernel's measurements to those in this file")
    parser.add_argument("--role", choices=("compare", "cell", "serve", "send"), default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="b", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rtt-ms", type=float, default=20.0, help=argparse.SUPPRESS)
    parser.add_argument("--loss", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "serve":
        serve()
    elif args.role == "send":
        send(args.kind, args.seconds)
    elif args.role == "cell":
        print(json.dumps(asyncio.run(measure(link(args.rtt_ms, args.loss), args.seconds, args.seed))))
    elif reason := why_not():
        print(json.dumps({"skipped": reason}))
    else:
        runs = json.loads(args.runs.read_text()) if args.runs and args.runs.exists() else []
        seen = max((r["seed"] + 1 for r in runs), default=0)
        asyncio.run(measured(runs, args.seconds, range(seen, seen + args.repeats), args.parallel, args.runs, lossy=args.lossy))
        punctual = [r for r in runs if r["late_p95_ms"] <= LATE_MS]
        print(f"{len(runs)} measurements, {len(runs) - len(punctual)} of them left out because the relay itself was late")
        rows = table(punctual, args.seconds, args.model_runs)
        within = len(rows) == len(CELLS) and all(abs(r["mbps_off"]) <= 0.25 and abs(r["p95_off"]) <= 0.25 for r in rows)
        print(json.dumps({"within_25_percent": within, "seconds": args.seconds, "repeats": args.repeats, "rows": rows}))


if __name__ == "__main__":
    main()
