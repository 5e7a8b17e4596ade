"""The door's readers: what is counted before it is parsed."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from edge_server.doors import wire
from edge_server.doors.wire import CROWDED, MALFORMED, Malformed, checked
from protos.errors import LimitError, ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import open_inference_pb2 as oip

KINDS = [kind for calls in (wire.HEADTAIL, wire.OPEN_INFERENCE) for _, kind in calls.values()]
Tensor = oip.ModelInferRequest.InferInputTensor


def read(kind: type[Message], data: bytes) -> Message | Malformed:
    return wire._reader(kind)(data)


def entry(kind: type[Message], name: str, body: bytes = b"") -> bytes:
    """One occurrence of a field, as it travels."""
    return bytes([kind.DESCRIPTOR.fields_by_name[name].number << 3 | 2, len(body)]) + body


@pytest.mark.parametrize(
    "message",
    [
        pb.FetchBundleRequest(model="m", bundle_sha256="0" * 64, have=[pb.PartOffset(path=f"p{i}", offset=i) for i in range(4096)]),
        pb.InferRequest(protocol_version=1, layers=[pb.FrameLayer(frame_id=1, layer=i, payload=bytes(1000)) for i in range(16)]),
        pb.ClientMessage(layer=pb.FrameLayer(frame_id=2**63, payload=bytes(2**20), traceparent="t", deadline_remaining_ns=7)),
        oip.ModelInferRequest(
            inputs=[
                Tensor(name="image", shape=[2, 3, 4, 5], contents=oip.InferTensorContents(uint_contents=range(2**16))),
                Tensor(name="x", parameters={"p": oip.InferParameter(int64_param=-1)}),
            ],
            parameters={f"p{i}": oip.InferParameter(string_param="s") for i in range(50)}, raw_input_contents=[bytes(2**20)] * 4,
        ),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_what_clients_send_is_read(message: Message) -> None:
    assert read(type(message), message.SerializeToString()) == message


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        (pb.FetchBundleRequest, entry(pb.FetchBundleRequest, "have")),
        (pb.InferRequest, entry(pb.InferRequest, "layers")),
        (pb.ClientMessage, entry(pb.ClientMessage, "hello") + entry(pb.ClientMessage, "layer")),
        (oip.ModelInferRequest, entry(oip.ModelInferRequest, "inputs")),
        (oip.ModelInferRequest, entry(oip.ModelInferRequest, "raw_input_contents")),
        (oip.ModelInferRequest, entry(oip.ModelInferRequest, "parameters", b"\x0a\x01a")),
        (oip.ModelInferRequest, entry(oip.ModelInferRequest, "inputs", entry(Tensor, "parameters", b"\x0a\x01a") * 20)),
        (
            oip.ModelInferRequest,
            entry(
                oip.ModelInferRequest, "inputs", entry(Tensor, "contents", entry(oip.InferTensorContents, "bytes_contents") * 50)
            ),
        ),
        (pb.ListModelsRequest, b"\x0b\x0c"),  # groups nobody knows
    ],
)
def test_a_million_small_fields_are_refused(kind: type[Message], unit: bytes) -> None:
    data = unit * (1 + (2 << 20) // len(unit))
    allowed = 4096 + 16 if kind is pb.FetchBundleRequest else 1024
    assert isinstance(read(kind, unit * (allowed // len(unit))), kind)  # every field has at least two bytes: these are fewer
    assert read(kind, data) is CROWDED
    with pytest.raises(LimitError, match="more fields"):
        checked(read(kind, data))


def test_the_allowance_is_exact() -> None:
    unit = entry(pb.InferRequest, "layers")
    assert isinstance(read(pb.InferRequest, unit * 1024), pb.InferRequest)
    assert read(pb.InferRequest, unit * 1025) is CROWDED
    nested = entry(oip.ModelInferRequest, "inputs", entry(Tensor, "contents") * 50) * 20  # 51 fields each
    empty = entry(oip.ModelInferRequest, "inputs")
    assert isinstance(read(oip.ModelInferRequest, nested + empty * 4), oip.ModelInferRequest)
    assert read(oip.ModelInferRequest, nested + empty * 5) is CROWDED


@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_the_count_changes_nothing_else(kind: type[Message], data: bytes) -> None:
    try:
        expected: Message | Malformed = kind.FromString(data)
    except (DecodeError, ValueError):
        expected = MALFORMED
    assert read(kind, data) == expected
    if expected is MALFORMED:
        with pytest.raises(ProtocolError):
            checked(expected)
