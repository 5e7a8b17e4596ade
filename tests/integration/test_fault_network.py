"""Peers that are slow, silent, gone or hostile to the connection itself; beside each, someone who is served as ever."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest
from aioquic.quic.connection import QuicConnection

from deploy.testbed.link.model import Link
from edge_server.config import Limits, SecurityConfig
from edge_server.server import Server
from protos.datagrams.channel import Channel, configuration
from protos.headtail.v1 import headtail_pb2 as pb
from splitters.bundle import Bundle
from tests.fakes.client_process import ON_BOTH_TRANSPORTS, client, counted, over
from tests.fakes.links import linked, path
from tests.fakes.relay import relay
from tests.fakes.server_client import Device, hello, opened, picture, session
from tests.fakes.server_running import environment, running

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
HALF_HEADERS = b"\x00\x00\x04\x01\x00\x00\x00\x00\x01\x82\x86\x84\x41"  # HEADERS without END_HEADERS, and then nothing
PATIENCE = Limits(handshake_s=1.0, keepalive_s=1.5, idle_s=1.0, write_s=1.5, hello_s=1.0)


@pytest.fixture(scope="module")
def device(bundle: Bundle) -> Device:
    return Device(bundle)


@pytest.fixture(scope="module")
async def server(bundle: Bundle) -> AsyncIterator[Server]:
    async with running(bundle.path, limits=PATIENCE) as server:
        yield server


async def served(server: Server, bundle: Bundle, device: Device) -> None:
    """Someone else gets an answer."""
    async with session(server.address, bundle.sha256) as stream:
        assert (await stream.frame(device.layers(picture(), 0))).error is None


async def until(true: Callable[[], bool], what: str, *, within_s: float = 40.0) -> float:
    """Waits; how long it took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < within_s, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.05)
    return time.monotonic() - begun


# ---------------------------------------------------------------- slow-loris


async def linger(address: str, data: bytes, *, each_s: float, within_s: float) -> float:
    """Connects, sends ``data`` byte by byte, then stays; how long the server bears it."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    begun = time.monotonic()

    async def trickle() -> None:
        with suppress(OSError):
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                if each_s:
                    await asyncio.sleep(each_s)

    sender = asyncio.create_task(trickle())
    try:
        async with asyncio.timeout(within_s):
            with suppress(ConnectionError):
                while await reader.read(4096):
                    pass
        return time.monotonic() - begun
    except TimeoutError:
        raise AssertionError(f"the connection is still open after {within_s} s") from None
    finally:
        sender.cancel()
        writer.close()


@asynccontextmanager
async def stranger(address: str, said: bytes | None) -> AsyncIterator[None]:
    """A QUIC connection of somebody without a ticket, which says so much and no more; None: not even its whole handshake."""
    host, _, port = address.rpartition(":")
    config = configuration(is_client=True)
    config.verify_mode = ssl.CERT_NONE
    loop = asyncio.get_running_loop()
    transport, channel = await loop.create_datagram_endpoint(lambda: Channel(QuicConnection(configuration=config)), ("0.0.0.0", 0))
    ready = asyncio.Event()
    channel.on_ready = ready.set
    if said is None:
        heard = channel.datagram_received

        def first_only(data: bytes, addr: object) -> None:
            if not ready.is_set():  # a Retry, which is answered from the address that was asked about; then silence
                ready.set()
                heard(data, addr)

        channel.datagram_received = first_only
    channel.connect((host, int(port)))
    await asyncio.wait_for(ready.wait(), 60)
    if said is not None:
        channel._quic.send_stream_data(0, said)
        channel.transmit()
    try:
        yield
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("data", "each_s"),
    [
        (b"", 0.0),
        (PREFACE[:12], 0.0),
        (PREFACE + SETTINGS, 0.1),
        (PREFACE, 0.0),
        (PREFACE + SETTINGS, 0.0),
        (PREFACE + SETTINGS + HALF_HEADERS, 0.0),
    ],
    ids=["nothing", "half-preface", "trickle", "no-settings", "idle", "half-headers"],
)
async def test_a_connection_that_does_not_get_to_the_point_is_closed(
    server: Server, bundle: Bundle, device: Device, data: bytes, each_s: float
) -> None:
    many = [asyncio.create_task(linger(server.address, data, each_s=each_s, within_s=8.0)) for _ in range(30)]
    await asyncio.sleep(0.3)
    await served(server, bundle, device)
    assert max(await asyncio.gather(*many)) < 8.0


@pytest.mark.parametrize("said", [None, b"", bytes(16)], ids=["half-handshake", "no-ticket", "half-ticket"])
async def test_a_connection_for_datagrams_that_does_not_get_to_the_point_is_closed(
    bundle: Bundle, device: Device, said: bytes | None
) -> None:
    async with running(bundle.path, limits=Limits(hello_s=5.0)) as server, AsyncExitStack() as stack:
        door = server._quic
        assert door is not None
        for _ in range(8):
            await stack.enter_async_context(stranger(server.address, said))
        await until(lambda: door.connections > 0, "the last of them are there")  # a busy machine has closed the first ones by now
        async with linked(server.address, bundle.sha256) as it:
            await it.opened()
            assert (await it.frame(device.layers(picture(), 0))).error is None
        await until(lambda: door.connections == 0, "they are closed")


async def test_a_tls_handshake_that_stalls_is_closed(bundle: Bundle, tmp_path: Path) -> None:
    cert, key = tmp_path / "c.pem", tmp_path / "k.pem"
    line = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=x",
    ]
    try:
        subprocess.run([*line, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    async with running(bundle.path, limits=PATIENCE, security=SecurityConfig(tls_cert=cert, tls_key=key)) as server:
        hellos = (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40))
        await asyncio.gather(*(linger(server.address, data, each_s=0.0, within_s=8.0) for data in hellos for _ in range(10)))


async def test_a_session_that_says_nothing_and_a_request_that_never_ends_are_closed(server: Server) -> None:
    async with opened(server.address) as silent:
        await silent.call.wait_for_connection()
        assert await silent.status() == (grpc.StatusCode.INVALID_ARGUMENT, "protocol")
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.stream_stream("/headtail.v1.Headtail/Infer")()
        await call.wait_for_connection()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_no_more_connections_than_allowed(bundle: Bundle, device: Device) -> None:
    async with running(bundle.path, limits=Limits(max_connections=20, handshake_s=2.0)) as server:
        host, _, port = server.address.rpartition(":")
        taken = [await asyncio.open_connection(host, int(port)) for _ in range(60)]
        await asyncio.sleep(0.5)
        turned_away = sum(reader.at_eof() for reader, _ in taken)
        assert turned_away >= 35
        for _, writer in taken:
            writer.close()
        async with asyncio.timeout(60):
            while True:
                with suppress(grpc.aio.AioRpcError, AssertionError):
                    await served(server, bundle, device)
                    break
                await asyncio.sleep(0.1)


# ---------------------------------------------------------------- slow readers


def http2_frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


HEADERS = {":method": "POST", ":scheme": "http", ":authority": "x", "te": "trailers", "content-type": "application/grpc"}


def call_without_window(stream: int, path: str) -> bytes:
    """A whole unary call with an empty message, headers spelt out."""
    fields = [(name.encode(), value.encode()) for name, value in {**HEADERS, ":path": path}.items()]
    fields.sort(key=lambda pair: not pair[0].startswith(b":"))
    block = b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    return http2_frame(1, 0x4, stream, block) + http2_frame(0, 0x1, stream, bytes(5))


NO_WINDOW = PREFACE + http2_frame(4, 0, 0, b"\x00\x04" + bytes(4))  # SETTINGS_INITIAL_WINDOW_SIZE = 0


@pytest.mark.parametrize("path", ["/grpc.health.v1.Health/Check", "/headtail.v1.Headtail/ListModels"])
async def test_answers_that_nobody_takes_hold_no_place_for_long(
    bundle: Bundle, device: Device, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that opens no window at all: gRPC would hold its answers, and their places among the calls, for ever."""
    limits = Limits(
        write_s=1.5, max_sessions=2, max_calls=20, max_unary_in_flight=20, max_health_calls=40, max_health_calls_per_host=10
    )  # 62 calls at a time in gRPC's own count
    async with running(bundle.path, limits=limits) as server:
        host, _, port = server.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        gate = server.gate
        assert gate is not None
        writer.write(NO_WINDOW)
        for batch in range(12):
            writer.write(b"".join(call_without_window(2 * i + 1, path) for i in range(10 * batch, 10 * batch + 10)))
            if not batch:
                await until(lambda: gate.health_calls + gate.other_calls >= 10, "the calls are there")
            assert gate.health_calls <= 10
            assert gate.other_calls <= 20
            await asyncio.sleep(0.3)
        await served(server, bundle, device)
        await until(lambda: gate.health_calls + gate.other_calls == 0, "their places are free again")
        async with grpc.aio.insecure_channel(server.address) as channel:
            await asyncio.wait_for(channel.unary_unary(path)(b""), 30)
        writer.close()
    assert "Traceback" not in caplog.text


async def test_a_request_that_is_none_is_a_mapped_error_and_no_traceback(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        for path in ("/grpc.health.v1.Health/Check", "/headtail.v1.Headtail/Infer"):
            for sent in (b"\xff\xff\xff", None):
                call = channel.stream_stream(path)()
                if sent is not None:
                    await call.write(sent)
                await call.done_writing()
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (path, sent)
    assert "Traceback" not in caplog.text


async def test_a_client_that_asks_and_does_not_read_is_let_go(
    server: Server, bundle: Bundle, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    """Pings are the cheapest way to make the server talk: none of its answers may pile up without bound."""
    # A window of 64 kB that does not grow: what the server cannot send stays with the server.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)]
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        call = channel.stream_stream(
            "/headtail.v1.Headtail/Session",
            request_serializer=pb.ClientMessage.SerializeToString, response_deserializer=pb.ServerMessage.FromString,
        )()  # fmt: skip
        await call.write(pb.ClientMessage(hello=hello(bundle.sha256)))
        await call.read()
        most = 0

        async def ask() -> None:
            nonlocal most
            ping = pb.ClientMessage(ping=pb.Ping(sent_ns=1 << 62))
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                while True:
                    await call.write(ping)
                    most = max(most, *(facts["unsent"] for facts in server.sessions), 0)

        asking = asyncio.create_task(ask())
        took_s = await until(lambda: not server.sessions, "the slow reader is gone", within_s=60)
        await served(server, bundle, device)
        assert most <= 4 * PATIENCE.max_in_flight + 65, took_s
        assert most > 100  # else it was not slow
        with suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        await asking
        assert await call.code() is not grpc.StatusCode.OK  # behind a write that waits gRPC takes no status: a reset says it
        assert "Traceback" not in caplog.text


async def test_a_client_that_takes_no_datagrams_holds_none_back(server: Server, bundle: Bundle, device: Device) -> None:
    """It sends on whatever its window says, and acknowledges nothing: answers wait a second at most, and nobody else notices."""
    assert server._quic is not None
    async with linked(server.address, bundle.sha256) as it:
        await it.opened()
        lane, layers = it.link._lane, device.layers(picture(), 0)
        assert lane is not None
        (mine,) = server._quic._channels
        ours = lane._channel
        assert it.shaper.udp is not None
        assert ours is not None
        it.shaper.udp._down = Link(path(0.999), "nothing/down")
        lane._watch = lambda: None  # it takes no notice of the silence
        most = 0
        for _ in range(400):
            ours.control.bytes_in_flight = 0
            await it.send(layers)
            await asyncio.sleep(0.01)
            most = max(most, mine.waiting)
        assert most > 20  # else nothing was held up
        assert most < 300
        await served(server, bundle, device)
        await until(lambda: mine.waiting == 0, "what nobody takes is dropped")
    await until(lambda: not server.sessions, "its session ends with it")


# ---------------------------------------------------------------- peers that vanish

_DIES = """
import asyncio, os, signal, sys
import grpc.aio
from protos.headtail.v1 import headtail_pb2 as pb
from tests.fakes.server_client import hello, session

async def main(address, sha256, base):
    async with session(address, sha256) as stream:
        layer = pb.FrameLayer.FromString(bytes.fromhex(base))
        layer.layer_count = 3
        await stream.send(layer=layer)
        rest = pb.FrameLayer(frame_id=layer.frame_id, layer=1, layer_count=3, kind=1, payload=bytes(3 << 20))
        asyncio.create_task(stream.send(layer=rest))
        await asyncio.sleep(float(sys.argv[4]))
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:4]))
"""


async def test_a_client_killed_in_the_middle_of_a_frame_leaves_nothing_behind(
    server: Server, bundle: Bundle, device: Device
) -> None:
    base = device.layers(picture(), 0)[0].SerializeToString().hex()
    env = {**environment(), "PYTHONPATH": str(Path(__file__).parents[2])}
    for wait_s in ("0.0", "0.001", "0.05"):
        line = [sys.executable, "-c", _DIES, server.address, bundle.sha256, base, wait_s]
        process = await asyncio.create_subprocess_exec(*line, env=env, stderr=subprocess.DEVNULL)
        assert await process.wait() == -signal.SIGKILL
        await until(lambda: not server.sessions, "the dead client's session is gone")
    assert server.counts["pending_bytes"] == 0
    await served(server, bundle, device)


async def test_a_client_that_sends_datagrams_and_is_killed_leaves_nothing_behind(
    server: Server, bundle: Bundle, device: Device, tmp_path: Path
) -> None:
    camera = ("--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off", "--frames", "9000", "--operating-point", "0")
    with client(tmp_path, *camera, *over("quic"), "--server", server.address) as edge:
        await asyncio.to_thread(edge.wait_frame, 20)
        assert server.counts["datagram_connections"] == 1
        edge.kill()
    await until(lambda: not server.sessions, "the dead client's session is gone")
    await until(lambda: server.counts["datagram_connections"] == 0, "and its connection")
    await until(lambda: server.counts["pending_bytes"] == 0, "and its bytes")
    await served(server, bundle, device)


@ON_BOTH_TRANSPORTS
async def test_both_ends_leave_a_connection_that_died_without_a_word(server: Server, tmp_path: Path, transport: str) -> None:
    """Half-open: the client answers locally meanwhile and comes back over a new connection; the server drops the old session."""
    camera = ("--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off", "--operating-point", "0")
    async with relay(server.address) as wire:
        with client(tmp_path, *camera, *over(transport), "--server", wire.address, "--json") as edge:
            await asyncio.to_thread(edge.wait_frame, 59)
            (old,) = (facts["id"] for facts in server.sessions)
            wire.freeze()
            frozen = max(line["frame"] for line in edge.lines())
            before = wire.accepted
            await until(lambda: wire.accepted > before, "the client dials again")
            again = max(line["frame"] for line in edge.lines())
            await asyncio.to_thread(edge.wait_for, counted("result", 30, after=again), "results over the new connection")
            done = await asyncio.to_thread(edge.interrupt)
        await until(lambda: all(facts["id"] != old for facts in server.sessions), "the session of the dead connection is gone")
    assert done.code == 0, done.err
    assert done.went_over(transport), done.err
    assert done.summary["balanced"]
    assert sum(done.outcomes().values()) == done.summary["frames"]
    assert done.outcomes(first=frozen + 3, last=again).get("local", 0) >= 10, done.outcomes(frozen, again)
    assert done.summary["reconnects"] >= 1
    assert "silent" in done.err or "down" in done.err


@ON_BOTH_TRANSPORTS
async def test_a_client_stopped_for_a_while_finds_its_way_back(server: Server, tmp_path: Path, transport: str) -> None:
    """A device that sleeps: its process stands still longer than the server's patience, and goes on."""
    camera = ("--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off", "--operating-point", "0")
    with client(tmp_path, *camera, *over(transport), "--server", server.address, "--json") as edge:
        await asyncio.to_thread(edge.wait_frame, 40)
        os.kill(edge.process.pid, signal.SIGSTOP)
        before = len(edge.lines())
        await asyncio.sleep(2 * PATIENCE.keepalive_s + 1)
        os.kill(edge.process.pid, signal.SIGCONT)
        while sum(line["outcome"] == "result" for line in edge.lines()[before:]) < 5:  # the test's own limit is the end of it
            assert edge.process.poll() is None
            await asyncio.sleep(0.1)
        edge.process.send_signal(signal.SIGINT)
        done = await asyncio.to_thread(edge.finish)
    assert done.code == 0, done.err
    assert done.went_over(transport), done.err
    assert done.summary["balanced"]
    assert sum(done.outcomes().values()) == done.summary["frames"]
