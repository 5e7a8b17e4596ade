import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import HeadtailError, LimitError, OverloadedError, PayloadError, ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import (
    MAX_LAYERS,
    MAX_SIDE_PX,
    Box,
    Classification,
    ClassScore,
    Detection,
    FrameLayer,
    Grant,
    PayloadKind,
    Result,
    ServerTimings,
    Tensors,
)

U64 = st.integers(0, 2**64 - 1)


@given(
    st.builds(
        FrameLayer, frame_id=U64, layer=st.integers(0, 3), layer_count=st.integers(4, MAX_LAYERS),
        kind=st.sampled_from(PayloadKind),
        operating_point=st.integers(0, 0xFFFF), deadline_remaining_ns=U64, captured_unix_ns=U64,
        source_width_px=st.integers(1, MAX_SIDE_PX), source_height_px=st.integers(1, MAX_SIDE_PX),
        payload=st.binary(max_size=64), sent_ns=U64, traceparent=st.text(max_size=55),
    )
)  # fmt: skip
def test_layers_survive_the_wire(layer: FrameLayer) -> None:
    assert FrameLayer.from_proto(pb.FrameLayer.FromString(layer.to_proto().SerializeToString())) == layer


def proto(**changes: object) -> pb.FrameLayer:
    message = FrameLayer(frame_id=1, source_width_px=4, source_height_px=3, payload=b"abc").to_proto()
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"payload": b"abd"}, PayloadError),
        ({"payload_crc32": 0}, PayloadError),
        ({"layer": 1}, ProtocolError),
        ({"layer_count": 0}, ProtocolError),
        ({"layer_count": MAX_LAYERS + 1}, ProtocolError),
        ({"kind": 0}, ProtocolError),
        ({"kind": 9}, ProtocolError),
        ({"source_width_px": 0}, ProtocolError),
        ({"source_height_px": MAX_SIDE_PX + 1}, ProtocolError),
        ({"operating_point": 0x10000}, ProtocolError),
    ],
)
def test_layers_out_of_range_are_refused(changes: dict, error: type[HeadtailError]) -> None:
    with pytest.raises(error):
        FrameLayer.from_proto(proto(**changes))


def test_a_payload_over_the_limit_is_refused() -> None:
    with pytest.raises(LimitError, match="3 bytes"):
        FrameLayer.from_proto(proto(), max_payload_bytes=2)


RESULTS = [
    Result(frame_id=3, answer=Classification(top=(ClassScore(class_id=7, score=0.5), ClassScore(class_id=1, score=0.25)))),
    Result(
        frame_id=4,
        answer=Detection(boxes=(Box(class_id=18, score=0.5, box_px=(1.0, 2.0, 3.5, 4.25)),)),
        layers_decoded=2,
        symbols_crc32=9,
    ),
    Result(
        frame_id=5, answer=Detection(boxes=()), timings=ServerTimings(decode_ns=1, queue_ns=2, tail_ns=3, total_ns=4, batch_size=5)
    ),
]


@pytest.mark.parametrize("result", RESULTS)
def test_results_survive_the_wire(result: Result) -> None:
    assert Result.from_proto(pb.Result.FromString(result.to_proto().SerializeToString())) == result


def test_errors_travel_in_results() -> None:
    back = Result.from_proto(Result(frame_id=1, error=OverloadedError("too much"), echo_sent_ns=4).to_proto())
    assert isinstance(back.error, OverloadedError)
    assert (back.error.message, back.error.retryable, back.answer, back.echo_sent_ns) == ("too much", True, None, 4)


def test_a_result_without_outcome_is_refused_on_both_sides() -> None:
    with pytest.raises(ProtocolError):
        Result(frame_id=1).to_proto()
    assert isinstance(Result.from_proto(pb.Result(frame_id=1)).error, ProtocolError)


def _box(x1: float = 0, y1: float = 0, x2: float = 1, y2: float = 1, score: float = 0.5, class_id: int = 1) -> pb.Result:
    return pb.Result(detection=pb.Detection(boxes=[pb.Box(class_id=class_id, score=score, x1_px=x1, y1_px=y1, x2_px=x2, y2_px=y2)]))


IMPOSSIBLE = [
    *(_box(x1=v) for v in (math.nan, math.inf, -math.inf, 3e9, -3e9, 2.0)),
    *(_box(y2=v) for v in (math.nan, 1e38, -1.0)),
    *(_box(score=v) for v in (math.nan, -5, 1e30, 1.1)),
    _box(class_id=2**32 - 1),
    pb.Result(detection=pb.Detection(boxes=[pb.Box()] * 5001)),
    pb.Result(classification=pb.Classification(top=[pb.ClassScore(score=math.nan)])),
    pb.Result(classification=pb.Classification(top=[pb.ClassScore(score=0.1)] * 1001)),
    pb.Result(classification=pb.Classification(), layers_decoded=2**32 - 1),
    pb.Result(classification=pb.Classification(), timings=pb.ServerTimings(tail_ns=2**64 - 1)),
    pb.Result(classification=pb.Classification(), timings=pb.ServerTimings(total_ns=2**63)),
    pb.Result(classification=pb.Classification(), timings=pb.ServerTimings(batch_size=2**32 - 1)),
]


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_an_answer_with_impossible_numbers_is_a_protocol_error_of_its_frame(message: pb.Result) -> None:
    message.frame_id = 7
    result = Result.from_proto(message)
    assert (result.frame_id, result.answer) == (7, None)
    assert isinstance(result.error, ProtocolError)


def test_a_score_that_is_rounded_past_one_is_one() -> None:
    assert Result.from_proto(_box(score=1.0000001)).answer == Detection(boxes=(Box(class_id=1, score=1.0, box_px=(0, 0, 1, 1)),))


GRANTS = [
    {"delay_trend": math.nan},
    {"delivery_bps": -1.0},
    {"delivery_bps": math.inf},
    {"bitrate_bps": 2**64 - 1},
    {"tail_ns": 2**63},
]


@pytest.mark.parametrize("numbers", GRANTS)
def test_a_grant_with_impossible_numbers_is_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ProtocolError):
        Grant.from_proto(pb.Grant(**numbers))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_mapped_error(data: bytes) -> None:
    from google.protobuf.message import DecodeError

    with contextlib.suppress(HeadtailError, DecodeError):
        FrameLayer.from_proto(pb.FrameLayer.FromString(data))


def test_grants_survive_the_wire() -> None:
    grant = Grant(bitrate_bps=5, max_in_flight=2, queue_ns=3, tail_ns=4, delivery_bps=1.5, delay_trend=-0.5)
    assert Grant.from_proto(grant.to_proto()) == grant


TENSORS = Tensors(
    task="depth",
    arrays={
        "map": np.arange(6, dtype=np.float32).reshape(2, 3), "mask": np.array([[True], [False]]),
        "none": np.zeros((0, 4), np.int64),
        "scalar": np.array(2.5, np.float16), "big_endian": np.array([1, 2], ">u2"),
    },
)  # fmt: skip


def test_tensors_survive_the_wire() -> None:
    back = Result.from_proto(pb.Result.FromString(Result(frame_id=3, answer=TENSORS).to_proto().SerializeToString()))
    assert back.error is None
    assert isinstance(back.answer, Tensors)
    assert back.answer.task == "depth"
    for name, array in TENSORS.arrays.items():
        got = back.answer.arrays[name]
        assert (got.shape, got.dtype.name) == (array.shape, array.dtype.name)
        assert np.array_equal(got, array)


@pytest.mark.parametrize(
    "tensors",
    [
        [pb.Tensor(name="a", dtype="float32", shape=[2], data=b"1234")],
        [pb.Tensor(name="a", dtype="object", shape=[1], data=b"12345678")],
        [pb.Tensor(name="a", dtype="float32", shape=[0, 2**31, 2**31, 2**31], data=b"")],
        [pb.Tensor(name="a", dtype="uint8", shape=[1] * 9, data=b"1")],
        [pb.Tensor(name="a", dtype="uint8", shape=[1], data=b"1")] * 2,
        [pb.Tensor(name=str(i), dtype="uint8", shape=[1], data=b"1") for i in range(65)],
        [pb.Tensor(name="a", dtype="uint8", shape=[7 << 20], data=bytes(7 << 20))],
    ],
    ids=["shape", "dtype", "impossible", "axes", "names", "many", "large"],
)
def test_tensors_that_cannot_be_are_their_frames_error(tensors: list[pb.Tensor]) -> None:
    back = Result.from_proto(pb.Result(frame_id=3, tensors=pb.Tensors(task="depth", tensors=tensors)))
    assert isinstance(back.error, ProtocolError)


def test_an_answer_too_large_to_send_is_refused_where_it_is_made() -> None:
    with pytest.raises(LimitError, match="too large"):
        Tensors(task="depth", arrays={"a": np.zeros(7 << 20, np.uint8)})
    with pytest.raises(LimitError, match="numbers"):
        Tensors(task="depth", arrays={"a": np.array(["text"])})
