"""Values of an Open Inference request, read without parsing them one by one: as protobuf reads them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_server.doors.tensors import read_request, read_values
from edge_server.doors.wire import tagged
from protos.errors import HeadtailError, LimitError, ProtocolError
from protos.headtail.v1 import open_inference_pb2 as oip

Tensor = oip.ModelInferRequest.InferInputTensor
Contents = oip.InferTensorContents


def request(datatype: str, shape: list[int], contents: Contents, raw: list[bytes] | None = None) -> bytes:
    tensor = Tensor(name="x", datatype=datatype, shape=shape, contents=contents)
    return oip.ModelInferRequest(model_name="m", id="7", inputs=[tensor], raw_input_contents=raw or []).SerializeToString()


@given(st.lists(st.integers(0, 255), max_size=300))
def test_small_numbers_are_read_as_protobuf_writes_them(values: list[int]) -> None:
    read = read_request(request("UINT8", [len(values)], Contents(uint_contents=values)))
    assert (read.said.model_name, read.said.id, read.said.inputs[0].name) == ("m", "7", "x")
    assert not read.said.inputs[0].HasField("contents")
    assert read_values(read, 0, "UINT8", [len(values)]).tolist() == values


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_larger_numbers_are_refused(values: list[int]) -> None:
    read = read_request(request("UINT8", [len(values)], Contents(uint_contents=values)))
    if max(values) <= 255:
        assert read_values(read, 0, "UINT8", [len(values)]).tolist() == values
    else:
        with pytest.raises(ProtocolError, match="above 255"):
            read_values(read, 0, "UINT8", [len(values)])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=50))
def test_floats_are_read_typed_and_raw(values: list[float]) -> None:
    array = np.array(values, np.float32)
    typed = read_request(request("FP32", [len(values)], Contents(fp32_contents=values)))
    raw = read_request(request("FP32", [len(values)], Contents(), [array.tobytes()]))
    for read in (typed, raw):
        assert np.array_equal(read_values(read, 0, "FP32", [len(values)]), array)


def test_numbers_that_come_one_by_one_or_in_pieces_are_the_same() -> None:
    piece = b"\x22\x03\x01\xff\x01"  # packed: 1, 255
    one = b"\x20\x05"  # not packed: 5
    tensor = b"\x0a\x01x" + b"\x12\x05UINT8" + tagged(5, piece + one) + tagged(5, piece)
    assert read_values(read_request(tagged(5, tensor)), 0, "UINT8", [5]).tolist() == [1, 255, 5, 1, 255]


@pytest.mark.parametrize(
    ("datatype", "contents", "raw"),
    [
        ("UINT8", Contents(uint_contents=[1, 2]), None),
        ("UINT8", Contents(fp32_contents=[1, 2, 3]), None),
        ("FP32", Contents(fp32_contents=[1, 2, float("nan")]), None),
        ("FP32", Contents(), [b"12345"]),
        ("FP32", Contents(), [b"1234"]),
        ("UINT8", Contents(), None),
    ],
)
def test_values_that_are_not_what_the_tensor_says_are_refused(datatype: str, contents: Contents, raw: list[bytes] | None) -> None:
    with pytest.raises(ProtocolError):
        read_values(read_request(request(datatype, [3], contents, raw)), 0, datatype, [3])


def test_many_fields_are_refused() -> None:
    with pytest.raises(LimitError):
        read_request(b"\x2a\x00" * 2000)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_request_or_a_mapped_error(data: bytes) -> None:
    try:
        read = read_request(data)
    except HeadtailError:
        return
    assert len(read.typed) == len(read.said.inputs)
