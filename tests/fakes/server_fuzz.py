"""Hostile input by the hundred thousand: seeded mutations of valid payloads and messages, many of them sealed anew.

A mutation that keeps its old checksum dies at the checksum; a sealed one reaches the decoder behind it. Every input must
end in a value or in an error of the project's tree, quickly and within bounded memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import cv2
import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError

from edge_server.frames.decode import decode_image
from protos.errors import HeadtailError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer
from splitters.bundle import Bundle
from splitters.bundle.manifest import parse_manifest
from splitters.bundle.operating_point import load_points
from splitters.codec import LatentCodec, Symbols
from splitters.codec.envelope import Header, is_predicted, open_layers, open_predicted, seal, seal_predicted
from tests.fakes.server_client import Device, picture

SLOW_S = 2.0
_INTERESTING = bytes((0, 1, 2, 15, 16, 31, 32, 63, 64, 127, 128, 129, 191, 192, 254, 255))


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Flips, overwrites, cuts, repeats, inserts: one to four of them."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(6)
        at = rng.randrange(len(out)) if out else 0
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and out:
            out[at] = rng.choice(_INTERESTING)
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 16)]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        elif out:
            span = rng.randint(1, 8)
            out[at : at + span] = rng.randbytes(span)
    return bytes(out)


def resealed(rng: random.Random, layers: list[bytes], references: Mapping[int, Symbols] | None = None) -> list[bytes]:
    """Bodies or header changed, checksums right; a predicted frame's with the one of ``references`` that it may mean."""
    if is_predicted(layers[0]):
        return [_resealed_predicted(rng, layers[0], references or {})]
    header, bodies = open_layers(layers)
    if rng.random() < 0.8:
        at = rng.randrange(len(bodies))
        bodies[at] = mutate(rng, bodies[at])
    count, point = header.layer_count, header.point_index
    if rng.random() < 0.3:
        count = rng.choice((1, 2, 3, count + 1, 16))
    if rng.random() < 0.3:
        point = rng.choice((0, 1, 2, 3, 4, 255))
    kind = rng.choice(("plain", "learned")) if rng.random() < 0.05 else header.kind
    return seal(Header(kind=kind, point_index=point, layer_count=max(count, len(bodies))), bodies)


def _resealed_predicted(rng: random.Random, payload: bytes, references: Mapping[int, Symbols]) -> bytes:
    header, body = open_predicted(payload)
    if rng.random() < 0.8:
        body = mutate(rng, body)
    if rng.random() < 0.3:
        header = replace(header, point_index=rng.choice((0, 1, 2, 3, 4, 255)))
    if rng.random() < 0.3:
        header = replace(header, reference_byte=rng.randrange(256))
    if rng.random() < 0.3:
        header = replace(header, density=rng.randrange(128), scene=rng.random() < 0.1)
    held = list(references.values())
    return seal_predicted(header, body, rng.choice(held).crc32() if held else 0)


@dataclass(slots=True)
class Tally:
    """What became of the inputs."""

    inputs: int = 0
    sealed: int = 0
    accepted: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A codec with valid frames of it."""

    codec: LatentCodec
    frames: list[list[bytes]]
    references: dict[int, Symbols]


def subjects(bundle: Bundle) -> list[Subject]:
    """The plain codec of a tiny bundle and a small learned codec with predicted frames."""
    from tests.unit.codec.test_codec_learned import BEFORE, COMPILED, NOW

    device = Device(bundle)
    plain = [device.payloads(picture(i), point) for i in range(4) for point in range(len(device.codec.point_ids))]
    held = COMPILED.quantise([BEFORE[0]], "fine")
    learned = [COMPILED.encode(COMPILED.quantise([x], point)) for x in BEFORE for point in COMPILED.point_ids]
    learned += [COMPILED.encode(COMPILED.quantise([x], "fine"), held, 5) for x in NOW]
    return [
        Subject(codec=device.codec, frames=plain, references={}),
        Subject(codec=COMPILED, frames=learned, references={5: held}),
    ]


def decoders(bundle: Bundle) -> list[tuple[str, int, Callable[[random.Random], tuple[bool, Callable[[], object]]]]]:
    """(name, weight, make): ``make`` draws an input and returns whether it was sealed anew and the call to try."""
    made = [(f"codec {subject.codec.kind}", 8, _codec_case(subject)) for subject in subjects(bundle)]
    layer = Device(bundle).layers(picture(), 0)[0].SerializeToString()
    pictures = [cv2.imencode(suffix, picture(1, 32, 32))[1].tobytes() for suffix in (".jpg", ".webp")]
    manifest, points = (bundle.path / "manifest.json").read_bytes(), (bundle.path / "operating_points.json").read_bytes()

    def frame_layer(rng: random.Random) -> tuple[bool, Callable[[], object]]:
        data = mutate(rng, layer)
        return False, lambda: FrameLayer.from_proto(pb.FrameLayer.FromString(data), max_payload_bytes=4096)

    def image(rng: random.Random) -> tuple[bool, Callable[[], object]]:
        data = mutate(rng, rng.choice(pictures))
        return False, lambda: decode_image(data, (32, 32), 1 << 20)

    def text(source: bytes, read: Callable[[bytes], object]) -> Callable[[random.Random], tuple[bool, Callable[[], object]]]:
        def case(rng: random.Random) -> tuple[bool, Callable[[], object]]:
            data = mutate(rng, source)
            return False, lambda: read(data)

        return case

    made += [("message", 4, frame_layer), ("picture", 2, image)]
    made += [("manifest", 1, text(manifest, parse_manifest)), ("points", 1, text(points, load_points))]
    return made


def _codec_case(subject: Subject) -> Callable[[random.Random], tuple[bool, Callable[[], object]]]:
    def case(rng: random.Random) -> tuple[bool, Callable[[], object]]:
        layers = rng.choice(subject.frames)
        layers = layers[: rng.randint(1, len(layers))]
        sealed = rng.random() < 0.6
        if sealed:
            layers = resealed(rng, layers, subject.references)
        else:
            at = rng.randrange(len(layers))
            layers = [*layers[:at], mutate(rng, layers[at]), *layers[at + 1 :]]

        def decode() -> object:
            symbols = subject.codec.decode(layers, subject.references)
            latents = subject.codec.dequantise(symbols)
            assert all(np.isfinite(latent).all() for latent in latents)
            assert 1 <= symbols.layers <= symbols.layer_count
            return symbols.crc32()

        return sealed, decode

    return case


def run_decoders(bundle: Bundle, inputs: int, seed: int) -> Tally:
    """Raises AssertionError with the seed and number of an input that ended otherwise than it may."""
    cases = decoders(bundle)
    names, weights, makers = zip(*cases, strict=True)
    tally = Tally()
    rng = random.Random(seed)
    for number in range(inputs):
        at = rng.choices(range(len(cases)), weights)[0]
        sealed, call = makers[at](rng)
        tally.inputs += 1
        tally.sealed += sealed
        begun = time.thread_time()  # not wall time: a busy machine is no hang
        try:
            call()
            tally.accepted += 1
        except HeadtailError as error:
            tally.errors[error.code] += 1
        except DecodeError:
            tally.errors["protobuf"] += 1
        except Exception as error:
            raise AssertionError(f"{names[at]}, seed {seed}, input {number}: {type(error).__name__}: {error}") from error
        took = time.thread_time() - begun
        if took > tally.slowest_s:
            tally.slowest_s, tally.slowest = took, f"{names[at]}, input {number}"
        assert took < SLOW_S, f"{names[at]}, seed {seed}, input {number} took {took:.1f} s"
    return tally


def session_messages(bundle: Bundle) -> list[bytes]:
    """Valid messages of a session, serialised."""
    device = Device(bundle)
    layers = [pb.ClientMessage(layer=m) for i in range(4) for m in device.layers(picture(i), i, deadline_ns=10**9)]
    others = [pb.ClientMessage(ping=pb.Ping(sent_ns=5)), pb.ClientMessage(goodbye=pb.Goodbye())]
    others.append(pb.ClientMessage(hello=pb.Hello(protocol_version=1, bundle_sha256=bundle.sha256, max_in_flight=4, group="g")))
    return [m.SerializeToString() for m in (*layers, *others)]


def mutated_layer(rng: random.Random, bundle_frames: list[list[bytes]], frame_id: int) -> bytes:
    """A layer whose wire checksum is right, and often its codec's too: it gets as far as it can."""
    layers = rng.choice(bundle_frames)
    payload = resealed(rng, layers)[0] if rng.random() < 0.6 else mutate(rng, layers[0])
    message = FrameLayer(frame_id=frame_id, source_width_px=48, source_height_px=40, payload=payload).to_proto()
    return pb.ClientMessage(layer=message).SerializeToString()


def summary(tally: Tally) -> dict[str, object]:
    """As JSON types."""
    return {
        "inputs": tally.inputs, "sealed_share": round(tally.sealed / max(1, tally.inputs), 3), "accepted": tally.accepted,
        "errors": dict(tally.errors), "slowest_ms": round(tally.slowest_s * 1e3, 1), "slowest": tally.slowest,
    }  # fmt: skip


# ---------------------------------------------------------------- over a socket

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HANG_S = 20.0


def _raw(rng: random.Random) -> bytes:
    """What a port scanner, a broken proxy or an attacker might say."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(rng.randint(1, 2000))
    if kind == 1:
        return b"GET / HTTP/1.1\r\nHost: x\r\n" + rng.randbytes(50) + b"\r\n\r\n"
    frames = b""
    for _ in range(rng.randint(1, 5)):  # HTTP/2: length, type, flags, stream, body
        body = rng.randbytes(rng.randint(0, 40))
        length = len(body) if rng.random() < 0.8 else rng.randrange(1 << 24)
        stream = rng.choice((0, 1, 3, 2**31 - 1)).to_bytes(4, "big")
        frames += length.to_bytes(3, "big") + bytes((rng.randrange(12), rng.randrange(256))) + stream + body
    return mutate(rng, PREFACE) + frames if kind == 2 else PREFACE + bytes(9) + frames


async def _connection(address: str, data: bytes) -> None:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(0.02):
            while await reader.read(4096):
                pass
    writer.close()


async def _session(
    channel: grpc.aio.Channel, rng: random.Random, valid: list[bytes], frames: list[list[bytes]], tally: Tally
) -> None:
    call = channel.stream_stream(
        "/headtail.v1.Headtail/Session", request_serializer=bytes, response_deserializer=pb.ServerMessage.FromString
    )()
    hello = valid[-1]
    try:
        async with asyncio.timeout(HANG_S):
            await call.write(hello if rng.random() < 0.9 else mutate(rng, hello))
            for number in range(rng.randint(1, 40)):
                sealed = rng.random() < 0.7
                data = mutated_layer(rng, frames, number) if sealed else mutate(rng, rng.choice(valid))
                tally.inputs += 1
                tally.sealed += sealed
                await call.write(data)
            await call.done_writing()
            while (message := await call.read()) is not grpc.aio.EOF:
                if message.WhichOneof("content") == "result":
                    result = message.result
                    tally.accepted += result.WhichOneof("outcome") != "error"
                    tally.errors[result.error.code or "-"] += 1
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    code = dict(await call.trailing_metadata() or ()).get("headtail-code", "")
    status = await call.code()
    details = await call.details() or ""
    if "Internal error from Core" in details:  # gRPC's own client wrote to a stream that the server had just ended
        tally.errors["ended while writing"] += 1
        return
    tally.errors[f"{status.name} {code}".strip()] += 1
    assert code or status in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE), f"not a mapped error: {status} {details}"


async def run_socket(address: str, bundle: Bundle, inputs: int, seed: int, workers: int = 8) -> Tally:
    """Sessions of mutated messages, and connections of raw bytes, until that many inputs were sent."""
    valid, frames = session_messages(bundle), subjects(bundle)[0].frames
    tally = Tally()

    async def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while tally.inputs < inputs:
            async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                for _ in range(5):
                    await _session(channel, rng, valid, frames, tally)
            for _ in range(5):
                await _connection(address, _raw(rng))
                tally.inputs += 1

    await asyncio.gather(*(work(n) for n in range(workers)))
    return tally
