"""Base layer first, the rest only while there is time, and an answer at the deadline from what has arrived."""

from __future__ import annotations

from typing import Any

from edge_client.transport.grpc import GrpcLink, _Outgoing
from edge_client.transport.rpc import Endpoint
from edge_server.frames.assembly import ArrivedFrame, Assembler
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import FrameLayer, PayloadKind

MS = 1_000_000
RTT_MS, TAIL_MS = 80, 10


class Wire:
    """A call that keeps what is written to it."""

    def __init__(self) -> None:
        self.written: list[pb.FrameLayer] = []

    async def write(self, message: pb.ClientMessage) -> None:
        self.written.append(message.layer)


class Events:
    def __init__(self) -> None:
        self.sent: list[int] = []
        self.unsent: list[int] = []

    def on_sent(self, frame_id: int, layer: int, n_bytes: int, now_ns: int) -> None:
        del frame_id, n_bytes, now_ns
        self.sent.append(layer)

    def on_unsent(self, frame_id: int) -> None:
        self.unsent.append(frame_id)


class Clock:
    now_ns = 1_000 * MS

    def __call__(self) -> int:
        return self.now_ns


def session(clock: Clock) -> tuple[GrpcLink, Events]:
    events = Events()
    made = GrpcLink(Endpoint(address="127.0.0.1:1"), events, clock=clock)  # type: ignore[arg-type]  # no more of it is needed here
    made._note_round_trip((RTT_MS + 7) * MS)
    made._note_round_trip(RTT_MS * MS)
    made._note_round_trip((RTT_MS + 30) * MS)
    return made, events


def frame(deadline_ns: int | None, gate: Any = None) -> _Outgoing:
    layers = [
        FrameLayer(
            frame_id=3,
            layer=i,
            layer_count=3,
            kind=PayloadKind.LATENT,
            payload=bytes(100 * (i + 1)),
            source_width_px=4,
            source_height_px=4,
        )
        for i in range(3)
    ]
    return _Outgoing(layers, deadline_ns, gate)


async def test_layers_travel_as_messages_of_their_own_base_first() -> None:
    clock, wire = Clock(), Wire()
    client, events = session(clock)
    await client._write_frame(wire, frame(clock.now_ns + 200 * MS))  # type: ignore[arg-type]
    assert [(m.layer, m.layer_count, len(m.payload)) for m in wire.written] == [(0, 3, 100), (1, 3, 200), (2, 3, 300)]
    assert events.sent == [0, 1, 2]
    assert {m.deadline_remaining_ns for m in wire.written} == {(200 - RTT_MS) * MS}, "less the way there and back"


async def test_a_refused_refinement_leaves_the_base_on_its_way_and_a_refused_base_leaves_nothing() -> None:
    for refused, sent, unsent in ((1, [0], []), (2, [0, 1], []), (0, [], [3])):
        clock, wire = Clock(), Wire()
        client, events = session(clock)

        def gate(layer: int, n_bytes: int, refused: int = refused) -> bool:
            assert n_bytes == 100 * (layer + 1)
            return layer != refused

        await client._write_frame(wire, frame(clock.now_ns + 200 * MS, gate))  # type: ignore[arg-type]
        assert [m.layer for m in wire.written] == events.sent == sent
        assert events.unsent == unsent


async def test_no_deadline_stays_none_and_a_near_one_does_not_become_none() -> None:
    clock, wire = Clock(), Wire()
    client, _ = session(clock)
    await client._write_frame(wire, frame(None))  # type: ignore[arg-type]
    assert {m.deadline_remaining_ns for m in wire.written} == {0}
    wire.written.clear()
    await client._write_frame(wire, frame(clock.now_ns + 5 * MS))  # type: ignore[arg-type]
    assert {m.deadline_remaining_ns for m in wire.written} == {1}


async def test_what_the_server_answers_from_the_base_alone_is_back_before_the_deadline() -> None:
    """The link stalls after the base layer, which waited itself: no common clock, only what remains and what is usual."""
    waited_ns = 30 * MS
    clock, wire = Clock(), Wire()
    client, _ = session(clock)
    deadline_ns = clock.now_ns + 200 * MS
    await client._write_frame(wire, frame(deadline_ns))  # type: ignore[arg-type]
    skew_ns = 5_000_000 * MS
    assembler = Assembler(max_frame_bytes=10_000, wait_ns=2_000 * MS)
    read_ns = clock.now_ns + RTT_MS // 2 * MS + waited_ns + skew_ns
    assert assembler.add(FrameLayer.from_proto(wire.written[0], max_payload_bytes=10_000), read_ns, waited_ns) == []
    due_ns = assembler.due_ns(TAIL_MS * MS)
    assert due_ns is not None
    assert due_ns >= read_ns, "there was time to wait for the rest"
    (cut,) = assembler.flush()
    assert isinstance(cut, ArrivedFrame)
    assert [len(payload) for payload in cut.layers] == [100]
    back_ns = due_ns - skew_ns + TAIL_MS * MS + RTT_MS // 2 * MS
    assert deadline_ns - 1 * MS <= back_ns <= deadline_ns, "it waited as long as it could, and no longer"
    rest = FrameLayer.from_proto(wire.written[1], max_payload_bytes=10_000)
    assert assembler.add(rest, due_ns + 1) == [], "what comes later is left aside"
