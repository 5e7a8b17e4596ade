"""Pieces, parity, losses, the frames gathered from them, and which path a frame takes; and what we use of aioquic."""

from __future__ import annotations

import inspect
import itertools
import random

import numpy as np
import pytest

from edge_client.transport.choice import LaneChoice, probe_after_s
from edge_server.frames.pieces import Gatherer
from protos.datagrams.loss import PIECE_BYTES, Losses, Redundancy, extra_for
from protos.datagrams.parity import parity, restore
from protos.datagrams.pieces import BODY_BYTES, MAX_DATAGRAM_BYTES, Gathered, cut, read_piece
from protos.errors import ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import MAX_TRACEPARENT_CHARS, FrameLayer

MS = 1_000_000


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_any_k_pieces_restore_the_message(count: int) -> None:
    rng = np.random.default_rng(count)
    data = rng.integers(0, 256, (count, 37)).astype(np.uint8)
    pieces = [row.tobytes() for row in (*data, *parity(data, 4))]
    for kept in itertools.combinations(range(count + 4), count):
        assert restore({index: pieces[index] for index in kept}, count) == data.tobytes()
    assert restore({index: pieces[index] for index in range(count - 1)}, count) is None


def test_parity_of_a_long_message_restores_it_too() -> None:
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (100, 11)).astype(np.uint8)
    pieces = [row.tobytes() for row in (*data, *parity(data, 20))]
    kept = sorted(rng.permutation(120)[:100].tolist())
    assert restore({index: pieces[index] for index in kept}, 100) == data.tobytes()


@pytest.mark.parametrize("size", [0, 1, BODY_BYTES, BODY_BYTES + 1, 3 * BODY_BYTES - 7])
def test_a_message_comes_back_whole_whatever_order_its_pieces_come_in(size: int) -> None:
    message = random.Random(size).randbytes(size)
    whole = cut(message, 2)
    order = list(range(len(whole.bodies)))
    random.Random(1).shuffle(order)
    gathered, found = Gathered(whole.part(order[0]), 1 << 20), []
    for index in order + order:
        done = gathered.add(whole.part(index), whole.bodies[index])
        found += [done] if done is not None else []
    assert found == [message]


def test_the_largest_piece_fits_a_datagram() -> None:
    layer = FrameLayer(
        frame_id=2**63, layer=15, layer_count=16, operating_point=0xFFFF, deadline_remaining_ns=2**62, captured_unix_ns=2**62,
        source_width_px=32768, source_height_px=32768, payload=bytes(128 * BODY_BYTES), sent_ns=2**63,
        traceparent="x" * MAX_TRACEPARENT_CHARS,
    )  # fmt: skip
    whole, said = cut(layer.payload, 24), layer.to_proto()
    said.payload = whole.bodies[0]
    piece = pb.Piece(frame=pb.FramePiece(layer=said, part=whole.part(151)))
    assert len(piece.SerializeToString()) <= MAX_DATAGRAM_BYTES


@pytest.mark.parametrize("part", [(0, 0, 10), (129, 0, 10), (1, 0, 1 << 30)])
def test_impossible_messages_are_refused(part: tuple[int, int, int]) -> None:
    count, index, whole_bytes = part
    with pytest.raises(ProtocolError):
        Gathered(pb.Part(count=count, index=index, whole_bytes=whole_bytes), 1 << 20)


def test_a_piece_of_another_message_is_refused() -> None:
    whole = cut(bytes(range(100)), 1)
    gathered = Gathered(whole.part(0), 1 << 20)
    for part, body in (
        (pb.Part(count=2, whole_bytes=100), whole.bodies[0]),
        (whole.part(1), bytes(101)),
        (whole.part(200), whole.bodies[0]),
    ):
        with pytest.raises(ProtocolError):
            gathered.add(part, body)


def test_bytes_that_are_no_piece_are_refused() -> None:
    with pytest.raises(ProtocolError):
        read_piece(b"\xff\xff\xff")


# ---------------------------------------------------------------- losses


def test_no_more_parity_than_the_losses_ask_for_and_no_less() -> None:
    for share, run in ((0.05, 1.0), (0.3, 1.0), (0.1, 3.0)):
        for count in (1, 3):
            extra = extra_for(count, (share, run), 0.99)
            assert arrives(count, extra, share, run) >= 0.985
            assert extra == 0 or arrives(count, extra - 1, share, run) < 0.993


def arrives(count: int, extra: int, share: float, run: float) -> float:
    """How often ``count`` of ``count + extra`` packets arrive, tried out."""
    dice, whole, tries = random.Random(5), 0, 20_000
    leave = 1 / run if run > 1 else 1 - share
    enter = share * leave / (1 - share)
    for _ in range(tries):
        bad, lost = dice.random() < share, 0
        for _ in range(count + extra):
            lost += bad
            bad = dice.random() >= leave if bad else dice.random() < enter
        whole += lost <= extra
    return whole / tries


def test_bursts_are_told_from_chance() -> None:
    even, bursty = Losses(), Losses()
    dice = random.Random(2)
    for number in range(300):
        even.add(number, lost=dice.random() < 0.1)
        bursty.add(number, lost=number % 30 < 3)
    assert even.channel()[1] == 1.0
    assert bursty.channel()[1] == pytest.approx(3.0, abs=0.2)
    assert even.channel()[0] == pytest.approx(0.15, abs=0.05)


def test_bursts_are_seen_though_the_fates_of_packets_between_are_unknown() -> None:
    losses, dice, bad = Losses(), random.Random(3), False
    for number in range(2000):
        bad = dice.random() >= 1 / 3 if bad else dice.random() < 1 / 12
        if number % 5 < 3:  # the others are bare acknowledgements
            losses.add(number, lost=bad)
    assert 2.2 < losses.channel()[1] < 4.2


def test_a_path_that_begins_to_lose_is_known_within_a_dozen_packets() -> None:
    losses = Losses()
    for number in range(400):
        losses.add(number, lost=False)
    calm = extra_for(3, losses.channel(), 0.995)
    for number in range(400, 412):
        losses.add(number, lost=number % 6 < 3)
    assert calm <= 2
    assert extra_for(3, losses.channel(), 0.995) >= 12


def test_nothing_known_is_not_nothing_lost() -> None:
    assert extra_for(1, Losses().channel(), 0.995) >= 1


def test_where_there_is_no_room_parity_is_less_and_the_price_says_so() -> None:
    redundancy = Redundancy.of((0.2, 1.0))
    roomy_bytes, sure = redundancy.cost(4_500)
    tight_bytes, likely = redundancy.cost(4_500, 9_300)
    least_bytes, least = redundancy.cost(4_500, 1_000)
    assert sure >= 0.995 > likely >= least >= 0.9
    assert roomy_bytes > 9_300 >= tight_bytes > least_bytes > 5_100
    pieces = 5 + redundancy.parity(5, 4_500 / 5 + PIECE_BYTES)
    assert roomy_bytes == pytest.approx(pieces * (4_500 / 5 + PIECE_BYTES))


# ---------------------------------------------------------------- gathering


def frame_pieces(frame_id: int, sizes: list[int], *, extra: int = 0, remaining_ns: int = 100 * MS) -> list[pb.FramePiece]:
    found = []
    for number, size in enumerate(sizes):
        layer = FrameLayer(
            frame_id=frame_id, layer=number, layer_count=len(sizes), source_width_px=4, source_height_px=4,
            payload=random.Random(f"{frame_id}/{number}").randbytes(size), deadline_remaining_ns=remaining_ns, sent_ns=1,
        )  # fmt: skip
        whole = cut(layer.payload, extra)
        for index, body in enumerate(whole.bodies):
            said = layer.to_proto()
            said.payload = body
            found.append(pb.FramePiece(layer=said, part=whole.part(index)))
    return found


def test_a_frame_runs_once_when_it_is_whole() -> None:
    gatherer, pieces = Gatherer(wait_ns=10**9), frame_pieces(0, [2500, 300], extra=1)
    random.Random(0).shuffle(pieces)
    frames = [frame for piece in pieces + pieces for frame in gatherer.add(piece, 5 * MS)]
    assert [(f.frame_id, [len(layer) for layer in f.layers]) for f in frames] == [(0, [2500, 300])]
    assert gatherer.due_ns(0) is None


def test_at_the_last_moment_a_frame_runs_with_the_layers_that_are_there() -> None:
    gatherer = Gatherer(wait_ns=10**9)
    base, *rest = frame_pieces(3, [200, 300, 400])
    assert gatherer.add(base, 10 * MS) == []
    assert gatherer.add(rest[1], 12 * MS) == []  # layer 2, without layer 1
    assert gatherer.due_ns(30 * MS) == (10 + 100 - 30) * MS
    assert gatherer.overdue(79 * MS, 30 * MS) == []
    (frame,) = gatherer.overdue(80 * MS, 30 * MS)
    assert [len(layer) for layer in frame.layers] == [200]
    assert gatherer.add(rest[0], 90 * MS) == []  # too late


def test_a_frame_in_slices_runs_with_its_holes() -> None:
    gatherer, payload = Gatherer(wait_ns=10**9), bytes(range(1, 101))
    layer = FrameLayer(frame_id=1, source_width_px=4, source_height_px=4, payload=payload, deadline_remaining_ns=100 * MS, slices=4)
    whole = cut(payload, 0, 4)
    for index in (0, 1, 3):
        said = layer.to_proto()
        said.payload = whole.bodies[index]
        assert gatherer.add(pb.FramePiece(layer=said, part=whole.part(index)), MS) == []
    assert gatherer.due_ns(20 * MS) == 81 * MS
    (frame,) = gatherer.overdue(81 * MS, 20 * MS)
    assert frame.slices == 4
    assert frame.layers == (payload[:50] + bytes(25) + payload[75:],)


def test_a_frame_without_its_base_is_nobodys() -> None:
    gatherer = Gatherer(wait_ns=50 * MS)
    gatherer.add(frame_pieces(3, [200, 300])[1], 0)
    assert gatherer.overdue(200 * MS, 0) == []
    assert gatherer.due_ns(0) is None


def test_frames_in_the_making_are_few() -> None:
    gatherer = Gatherer(wait_ns=10**9)
    frames = [frame for n in range(9) for frame in gatherer.add(frame_pieces(n, [100, 100])[0], n)]
    assert [frame.frame_id for frame in frames] == [0, 1, 2, 3, 4]


def test_altered_and_contradicting_pieces_change_nothing() -> None:
    gatherer, (piece, *_) = Gatherer(wait_ns=10**9), frame_pieces(1, [500, 100])
    wrong = pb.FramePiece()
    wrong.CopyFrom(piece)
    wrong.layer.payload = bytes(len(piece.layer.payload))
    assert gatherer.add(wrong, 0) == []
    assert gatherer.refused == 1
    other = pb.FramePiece()
    other.CopyFrom(piece)
    other.layer.layer_count = 3
    gatherer.add(other, 0)
    gatherer.add(piece, 0)
    assert gatherer.refused >= 1


# ---------------------------------------------------------------- which path


def test_the_stream_carries_frames_until_packets_are_lost_and_again_when_they_long_are_not() -> None:
    choice = LaneChoice(always=False)
    second = 10**9
    assert not choice.beside(0.5, 10, 0)  # too few to say
    assert not choice.beside(0.002, 100, second)
    assert choice.beside(0.02, 100, 2 * second)
    assert choice.beside(0.005, 100, 10 * second)
    assert choice.beside(0.0, 100, 29 * second)
    assert not choice.beside(0.0, 100, 31 * second)
    assert LaneChoice(always=True).beside(0.0, 0, 0)


def test_a_path_that_lost_nothing_is_probed_once_a_second_and_an_unknown_one_often() -> None:
    assert probe_after_s(0.0, 100) == 0.01
    assert probe_after_s(0.01, 300) == 0.1
    assert probe_after_s(0.0, 300) == 1.0


# ---------------------------------------------------------------- aioquic


def test_what_we_use_of_aioquic_is_there() -> None:
    pytest.importorskip("aioquic")
    from aioquic.asyncio.protocol import QuicConnectionProtocol
    from aioquic.asyncio.server import QuicServer
    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control
    from aioquic.quic.connection import QuicConnection
    from aioquic.quic.packet_builder import QuicSentPacket

    from protos.datagrams import congestion
    from protos.datagrams.channel import Channel, configuration

    assert {"configuration", "create_protocol", "retry"} <= set(inspect.signature(QuicServer).parameters)
    for name in ("send_datagram_frame", "send_stream_data", "send_ping", "get_next_available_stream_id"):
        assert callable(getattr(QuicConnection, name))
    for name in ("transmit", "connect", "datagram_received", "quic_event_received", "close"):
        assert callable(getattr(QuicConnectionProtocol, name))
    assert QuicCongestionControl.__abstractmethods__ <= set(vars(congestion.DelayControl))
    assert {"packet_number", "sent_bytes", "sent_time", "is_ack_eliciting"} <= set(QuicSentPacket.__dataclass_fields__)
    assert {"certificate", "private_key", "cadata", "verify_mode", "server_name", "max_datagram_frame_size"} <= set(
        QuicConfiguration.__dataclass_fields__
    )
    assert inspect.signature(register_congestion_control).parameters.keys() == {"name", "factory"}
    connection = QuicConnection(configuration=configuration(is_client=True))
    made = congestion.latest()
    assert isinstance(made, congestion.DelayControl)
    assert connection._loss._cc is made
    assert Channel.datagram_received is not QuicConnectionProtocol.datagram_received
