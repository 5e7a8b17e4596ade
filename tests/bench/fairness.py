"""Datagrams beside others on one bottleneck: shares, the queue they add, a collapse of capacity, packets a server core takes.

    python -m tests.bench.fairness [--parts alone,cameras,collapse,core,cubic] [--seconds 60]      # cubic needs root; some minutes

``alone``, ``cameras`` (20 of ours) and ``collapse`` (10 to 1 Mbit/s) are two aioquic connections' real code over the testbed's
link in virtual time, so a busy machine changes nothing. ``cubic`` is our datagrams and a TCP flow of the kernel's CUBIC, both
saturating, ours a second earlier, through two network namespaces whose packets the testbed's relay delays, paces and drops.
``core`` is processor time of a server process on loopback, the kernel's part included. Links: 10 Mbit/s, round trip 40 ms,
drop-tail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from aioquic.asyncio.server import QuicServer
from aioquic.quic.connection import QuicConnection
from cryptography.hazmat.primitives import serialization

from deploy.testbed.link.model import Link, LinkConfig
from deploy.testbed.link.trace import Trace, constant
from deploy.testbed.real.relay import SERVER_ADDRESS, Relay
from edge_client.observe.fairness import jain
from edge_server.doors.quic import _certificate
from edge_server.frames.pieces import Gatherer
from protos.datagrams.channel import Channel, Item, client_configuration, configuration
from protos.datagrams.pieces import BODY_BYTES, cut, read_piece
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer
from tests.fakes.client_loop import VirtualLoop, run_virtual
from tests.fakes.lanes import Pair, joined

MBPS, DELAY_NS, CAMERAS, PORT = 10.0, 20_000_000, 20, 50661
STEP_S = 1e-6
_WAITING = 16  # pieces kept ready by a source that always has more
_WARM_S = 10.0
_ALONE_S = 1.0  # ours, before CUBIC joins


def link(queue_bytes: int = 0, trace: Trace | None = None) -> LinkConfig:
    """One direction."""
    return LinkConfig(trace=trace or constant(MBPS * 1e6), delay_ns=DELAY_NS, queue_bytes=queue_bytes)


def piece(number: int) -> bytes:
    """A frame of one piece, as a client sends it."""
    layer = FrameLayer(
        frame_id=number, source_width_px=4, source_height_px=4, payload=bytes(BODY_BYTES), deadline_remaining_ns=10**8, sent_ns=1
    )
    whole = cut(layer.payload, 0)
    said = layer.to_proto()
    said.payload = os.urandom(BODY_BYTES)
    return pb.Piece(frame=pb.FramePiece(layer=said, part=whole.part(0))).SerializeToString()


async def pour(channel: Channel, seconds: float) -> None:
    """A source that always has more to say."""
    loop = asyncio.get_running_loop()
    data, end_s = piece(0), loop.time() + seconds
    while loop.time() < end_s and not channel.ended:
        if channel.waiting < _WAITING:
            channel.offer([Item(data, end_s)] * (_WAITING - channel.waiting))
        await asyncio.sleep(0.005)
    channel.clear()


# ---------------------------------------------------------------- virtual time


def alone(seconds: float) -> dict[str, Any]:
    """One flow: the share of the link it gets, and the queue it builds."""

    async def main(loop: VirtualLoop) -> dict[str, Any]:
        pair = await joined(loop, Link(link(), "up"), Link(link(), "down"))
        await pour(pair.client, seconds)
        pair.close()
        waited = np.array([took for at, took in pair.up.delays_s if at > _WARM_S]) * 1e3 - DELAY_NS / 1e6
        carried = pair.up.link.bytes_carried * 8 / loop.time() / (MBPS * 1e6)
        return {"queue_ms": [round(float(q), 1) for q in np.quantile(waited, [0.5, 0.95, 1.0])], "used": round(carried, 3)}

    return run_virtual(main, limit_s=10 * seconds, step_s=STEP_S)


def cameras(seconds: float) -> dict[str, Any]:
    """Twenty flows that begin one after the other."""

    async def main(loop: VirtualLoop) -> dict[str, Any]:
        up, down = Link(link(), "up"), Link(link(), "down")
        pairs: list[Pair] = []
        tasks = []
        for number in range(CAMERAS):
            pairs.append(await joined(loop, up, down, number=number))
            tasks.append(asyncio.create_task(pour(pairs[-1].client, seconds)))
        await asyncio.sleep(_WARM_S)
        before = [pair.up.arrived_bytes for pair in pairs]
        await asyncio.sleep(seconds - 2 * _WARM_S)
        got = [pair.up.arrived_bytes - at for pair, at in zip(pairs, before, strict=True)]
        await asyncio.gather(*tasks)
        waited = np.array([took for pair in pairs for at, took in pair.up.delays_s if at > _WARM_S]) * 1e3 - DELAY_NS / 1e6
        for pair in pairs:
            pair.close()
        return {
            "jain": round(jain([float(x) for x in got]), 4), "queue_ms_p95": round(float(np.quantile(waited, 0.95)), 1),
            "used": round(sum(got) * 8 / (seconds - 2 * _WARM_S) / (MBPS * 1e6), 3), "dropped": up.dropped,
        }  # fmt: skip

    return run_virtual(main, limit_s=10 * seconds, step_s=STEP_S)


def collapse(seconds: float) -> dict[str, Any]:
    """A tenth of the capacity from one moment on: what is in flight, and when the queue is short again."""
    del seconds
    at_s, after_s = 10.0, 10.0
    trace = Trace([(0, MBPS * 1e6), (int(at_s * 1e9), MBPS * 1e5)], int((at_s + 20 * after_s) * 1e9))

    async def main(loop: VirtualLoop) -> dict[str, Any]:
        pair = await joined(loop, Link(link(trace=trace), "up"), Link(link(), "down"))
        control, most, window_bytes, shrinking = pair.client.control, 0.0, 0, 0.0

        async def watch() -> None:
            nonlocal most, window_bytes, shrinking
            while True:
                if loop.time() > at_s:
                    window_bytes = window_bytes or control.window_bytes
                    most = max(most, control.bytes_in_flight / window_bytes)
                    shrinking = max(shrinking, control.bytes_in_flight / control.window_bytes)
                await asyncio.sleep(0.005)

        task = asyncio.create_task(watch())
        await pour(pair.client, at_s + after_s)
        task.cancel()
        pair.close()
        late = [at for at, took in pair.up.delays_s if at >= at_s and took * 1e3 - DELAY_NS / 1e6 > 100]
        end = [took * 1e3 - DELAY_NS / 1e6 for at, took in pair.up.delays_s if at > at_s + 2]
        return {
            "recovered_s": round(max(late, default=at_s) - at_s, 2), "in_flight_of_the_window_at_the_collapse": round(most, 2),
            "in_flight_of_the_shrinking_window": round(shrinking, 2),
            "queue_ms_p95_after_2_s": round(float(np.quantile(end, 0.95)), 1),
        }  # fmt: skip

    return run_virtual(main, limit_s=200, step_s=STEP_S)


# ---------------------------------------------------------------- real processes


async def serve(listen: tuple[str, int], folder: Path, seconds: float) -> dict[str, Any]:
    """A server's end: bytes and processor time, from the first datagram on."""
    certificate, key = _certificate()
    config = configuration(is_client=False)
    config.certificate, config.private_key = certificate, key
    gatherer, count, seen = Gatherer(wait_ns=10**9), 0, 0
    cpu_s, begun_s, last_s = 0.0, 0.0, 0.0

    def take(data: bytes) -> None:
        nonlocal count, seen, cpu_s, begun_s, last_s
        if not count:
            cpu_s, begun_s = time.process_time(), time.monotonic()
        found = read_piece(data)
        found.frame.layer.frame_id = count & 0xFFFFFF
        gatherer.add(found.frame, time.monotonic_ns())
        count, seen, last_s = count + 1, seen + len(data), time.monotonic()

    def make(quic: QuicConnection, stream_handler: Any = None) -> Channel:
        channel = Channel(quic, stream_handler)
        channel.on_datagram = take
        return channel

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: QuicServer(configuration=config, create_protocol=make), local_addr=listen
    )
    (folder / "ready.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "ready").touch()
    end_s = time.monotonic() + seconds + 30
    while time.monotonic() < end_s and not (count and time.monotonic() - last_s > 2):
        await asyncio.sleep(0.1)
    transport.close()
    used_s = time.process_time() - cpu_s
    return {"datagrams": count, "bytes": seen, "seconds": round(last_s - begun_s, 2), "cpu_s": round(used_s, 3)}


async def blast(address: tuple[str, int], folder: Path, seconds: float) -> dict[str, Any]:
    """A client's end."""
    loop = asyncio.get_running_loop()
    quic = QuicConnection(configuration=client_configuration((folder / "ready.pem").read_bytes()))
    transport, channel = await loop.create_datagram_endpoint(lambda: Channel(quic), local_addr=("0.0.0.0", 0))
    ready, rtts = asyncio.Event(), []
    channel.on_ready = ready.set
    channel.connect(address)
    await asyncio.wait_for(ready.wait(), 20)
    (folder / "pouring").touch()
    pouring = asyncio.create_task(pour(channel, seconds))
    while not pouring.done():
        rtts.append(channel.control.rtt_s * 1e3)
        await asyncio.sleep(0.05)
    transport.close()
    return {"rtt_ms": [round(float(q), 1) for q in np.quantile(rtts, [0.5, 0.95])], "lost": round(channel.control.losses.seen, 4)}


def tcp_sink(listen: tuple[str, int], folder: Path, seconds: float) -> dict[str, Any]:
    """Takes what a TCP flow brings."""
    with socket.create_server(listen) as server:
        (folder / "tcp-ready").touch()
        server.settimeout(30 + seconds)
        connection, _ = server.accept()
        got, begun_s = 0, time.monotonic()
        with connection:
            while data := connection.recv(65_536):
                got += len(data)
    return {"bytes": got, "seconds": round(time.monotonic() - begun_s, 2)}


def tcp_pour(address: tuple[str, int], folder: Path, seconds: float) -> dict[str, Any]:
    """A TCP flow that always has more."""
    del folder
    with socket.create_connection(address, timeout=30) as connection:
        congestion = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
        end_s = time.monotonic() + seconds
        with suppress(OSError):
            connection.settimeout(5)
            while time.monotonic() < end_s:
                connection.sendall(bytes(16_384))
    return {"congestion": congestion}


ROLES = {"serve": serve, "blast": blast, "tcp-sink": tcp_sink, "tcp-pour": tcp_pour}


def role(name: str, host: str, port: int, folder: Path, seconds: float) -> list[str]:
    """The command line of one end."""
    words = ["--role", name, "--host", host, "--port", str(port), "--folder", str(folder), "--seconds", str(seconds)]
    return [sys.executable, "-m", "tests.bench.fairness", *words]


async def start(line: list[str]) -> asyncio.subprocess.Process:
    """A child whose last line is JSON."""
    return await asyncio.create_subprocess_exec(*line, stdout=asyncio.subprocess.PIPE)


async def told(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """What it said."""
    out, _ = await process.communicate()
    found: dict[str, Any] = json.loads(out.decode().strip().splitlines()[-1])
    return found


async def until(path: Path) -> None:
    """Until a child is ready."""
    async with asyncio.timeout(60):
        while not path.exists():
            await asyncio.sleep(0.05)


async def beside_cubic(seconds: float, queue_ms: float) -> dict[str, Any]:
    """Ours and the kernel's CUBIC, through one bottleneck with a queue of so long."""
    config = link(int(MBPS * 1e6 / 8 * queue_ms / 1e3))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with Relay(config, replace(config, queue_bytes=0)) as relay:
            ends = []
            for kind in ("serve", "tcp-sink"):
                port = PORT + (kind != "serve")
                ends.append(await start(relay.command("server", role(kind, SERVER_ADDRESS, port, folder, seconds))))
            await until(folder / "ready")
            await until(folder / "tcp-ready")
            sources = []
            for kind in ("blast", "tcp-pour"):
                port = PORT + (kind != "blast")
                if sources:  # ours has begun by then, and has seen the path without a queue
                    await until(folder / "pouring")
                    await asyncio.sleep(_ALONE_S)
                sources.append(await start(relay.command("client", role(kind, SERVER_ADDRESS, port, folder, seconds))))
            ours, tcp, sent, poured = await asyncio.gather(*map(told, [*ends, *sources]))
            late_ms = np.quantile(np.array(relay.late_ns) / 1e6, 0.95)
    each = {"ours": ours["bytes"] * 8 / seconds / 1e6, "cubic": tcp["bytes"] * 8 / seconds / 1e6}
    return {
        **{f"{name}_mbps": round(value, 2) for name, value in each.items()},
        "share_of_ours": round(each["ours"] / sum(each.values()), 3),
        **sent, **poured, "relay_late_ms_p95": round(float(late_ms), 2),
    }  # fmt: skip


def cubic(seconds: float) -> dict[str, Any]:
    """With three lengths of the queue."""
    return {f"queue {ms} ms": asyncio.run(beside_cubic(seconds, ms)) for ms in (25, 100, 200)}


def core(seconds: float) -> dict[str, Any]:
    """Datagrams that one core takes in a second."""

    async def main() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            server = await start(role("serve", "127.0.0.1", PORT + 5, folder, seconds))
            await until(folder / "ready")
            client = await start(role("blast", "127.0.0.1", PORT + 5, folder, seconds))
            found, _ = await asyncio.gather(told(server), told(client))
            return found

    found = asyncio.run(main())
    return {**found, "datagrams_per_core_s": round(found["datagrams"] / found["cpu_s"])}


PARTS = {"alone": alone, "cameras": cameras, "collapse": collapse, "core": core, "cubic": cubic}


def main() -> None:
    """Runs and prints; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seconds", type=float, default=60.0, help="of a flow (default %(default)s; core: at most 10)")
    for name, kind in (("role", str), ("host", str), ("port", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        found = ROLES[args.role]((args.host, args.port), args.folder, args.seconds)
        print(json.dumps(asyncio.run(found) if asyncio.iscoroutine(found) else found))
        return
    rows = {}
    for name in args.parts.split(","):
        rows[name] = PARTS[name](min(args.seconds, 10.0) if name == "core" else args.seconds)
        print(name, json.dumps(rows[name]), flush=True)
    print(json.dumps({"fairness": rows, "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
