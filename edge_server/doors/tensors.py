"""A request of the Open Inference Protocol, read in two steps: what it says of itself, then its values.

A tensor's values may come as a list of numbers. Parsed as such, eight megabytes of them become millions of Python objects, and
hold Python's lock for most of a second. So values are cut out of the message before it is parsed, and read with NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from edge_server.doors import wire
from protos.errors import LimitError, ProtocolError
from protos.headtail.v1 import open_inference_pb2 as oip

_REQUEST: Final = oip.ModelInferRequest.DESCRIPTOR
_INPUTS: Final = _REQUEST.fields_by_name["inputs"].number
_RAW: Final = _REQUEST.fields_by_name["raw_input_contents"].number
_CONTENTS: Final = _REQUEST.nested_types_by_name["InferInputTensor"].fields_by_name["contents"].number
_VALUES: Final = {
    "UINT8": oip.InferTensorContents.DESCRIPTOR.fields_by_name["uint_contents"].number,
    "FP32": oip.InferTensorContents.DESCRIPTOR.fields_by_name["fp32_contents"].number,
}
_DTYPES: Final[dict[str, np.dtype[Any]]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}

Bytes = memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A request whose values have not been looked at.

    Attributes:
        said: the message without any values.
        raw: its raw contents, in the order of the inputs.
        typed: of each input, the pieces of its typed contents by field number.
    """

    said: oip.ModelInferRequest
    raw: list[Bytes]
    typed: list[dict[int, list[Bytes]]]


def read_request(data: bytes) -> Request:
    """Cuts the values out of a request and parses the rest.

    Raises:
        ProtocolError: it is no such message.
        LimitError: it has too many fields.
    """
    if wire.is_crowded(data, oip.ModelInferRequest):
        raise LimitError("the request has more fields than any of its kind needs")
    rest, raw, typed = bytearray(), [], []
    for tag, body, whole in wire.fields(Bytes(data)):
        if tag == wire.length_tag(_RAW):
            raw.append(body)
        elif tag == wire.length_tag(_INPUTS):
            pieces: dict[int, list[Bytes]] = {}
            kept = bytearray()
            for inner, inner_body, inner_whole in wire.fields(body):
                if inner != wire.length_tag(_CONTENTS):
                    kept += inner_whole
                    continue
                for value, value_body, _ in wire.fields(inner_body):
                    pieces.setdefault(value >> 3, []).append(value_body)
            typed.append(pieces)
            rest += wire.tagged(_INPUTS, kept)
        else:
            rest += whole
    try:
        said = oip.ModelInferRequest.FromString(bytes(rest))
    except (DecodeError, UnicodeDecodeError, ValueError):
        raise ProtocolError("the request is no message of this protocol") from None
    return Request(said=said, raw=raw, typed=typed)


def read_values(request: Request, index: int, datatype: str, shape: Sequence[int]) -> NDArray[Any]:
    """The values of one input, in its shape.

    Raises:
        ProtocolError: they are not as many as the shape says, or not of the type.
    """
    name, count = request.said.inputs[index].name, int(np.prod(shape))
    dtype = _DTYPES[datatype]
    pieces = [request.raw[index]] if request.raw else request.typed[index].get(_VALUES[datatype], [])
    packed = datatype == "UINT8" and not request.raw
    found: list[NDArray[Any]] = [_small_numbers(piece, name) if packed else _array(piece, dtype, name) for piece in pieces]
    array = found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, dtype)])
    if len(array) != count:
        raise ProtocolError(f"input {name[:64]!r} has {len(array)} values, which is not {tuple(shape)} of {datatype}")
    if datatype == "FP32" and not np.isfinite(array).all():
        raise ProtocolError(f"input {name[:64]!r} holds numbers that are not finite")
    return array.reshape(shape)


def _array(data: Bytes, dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise ProtocolError(f"input {name[:64]!r} has {len(data)} bytes, which are no whole values of {dtype}")
    return np.frombuffer(data, dtype)


def _small_numbers(data: Bytes, name: str) -> NDArray[np.uint8]:
    """Packed varints of 0..255: one byte each up to 127, else two, of which the second is 1."""
    octets = np.frombuffer(data, np.uint8)
    goes_on = octets >= 0x80
    second = np.zeros_like(goes_on)
    second[1:] = goes_on[:-1]
    if (goes_on & second).any() or (len(octets) and goes_on[-1]) or (octets[second] != 1).any():
        raise ProtocolError(f"input {name[:64]!r} holds values above 255, or none that are numbers")
    return octets[~second]  # of two bytes the first holds the lower seven bits, with the eighth set as it must be in the value
