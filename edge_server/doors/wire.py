"""The service's handlers, with readers that never raise: bytes that are no message become `MALFORMED`.

gRPC would otherwise end such a call with a bare UNKNOWN, or leave a stream's reader dead.

Fields are counted before anything is parsed. Two bytes make an empty entry of a repeated field, a parsed one takes up to a
hundred: 8 MiB of them would become half a gigabyte and hold up every session for seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message

from protos.errors import HeadtailError, LimitError, ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import open_inference_pb2 as oip

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Headtail"].full_name
OPEN_INFERENCE_SERVICE: Final = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


Descriptor = Any  # each of protobuf's implementations has a class of its own

# More than any request of the kind needs; a fetch names the parts that the client holds already.
_MAX_FIELDS: Final = 1024
_MAX_FETCH_FIELDS: Final = 4096 + 16


class Malformed:
    """Bytes that are no message of the schema, or none that is parsed."""

    def __init__(self, kind: type[HeadtailError], text: str) -> None:
        self.kind, self.text = kind, text


MALFORMED: Final = Malformed(ProtocolError, "the request is no message of this protocol")
CROWDED: Final = Malformed(LimitError, "the request has more fields than any of its kind needs")


def _reader(kind: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def read(data: bytes) -> Message | Malformed:
        if is_crowded(data, kind):
            return CROWDED
        try:
            return kind.FromString(data)
        except (DecodeError, UnicodeDecodeError, ValueError):
            return MALFORMED

    return read


def is_crowded(data: bytes, kind: type[Message]) -> bool:
    """Whether a message has more fields than any of its kind needs."""
    allowed = _MAX_FETCH_FIELDS if kind is pb.FetchBundleRequest else _MAX_FIELDS
    return _left(data, 0, len(data), kind.DESCRIPTOR, allowed) < 0


def fields(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """A message's fields one level deep, unparsed: (tag, value, the whole field with its tag).

    Raises:
        ProtocolError: the bytes are no message.
    """
    at, end = 0, len(data)
    while at < end:
        begin = at
        tag, at = _varint(data, at, end)
        value = at
        match tag & 7:
            case 0:
                _, at = _varint(data, at, end)
            case 1:
                at += 8
            case 2:
                size, value = _varint(data, at, end)
                at = value + size
            case 5:
                at += 4
            case _:
                raise ProtocolError(MALFORMED.text)
        if at > end or tag < 8:
            raise ProtocolError(MALFORMED.text)
        yield tag, data[value:at], data[begin:at]


def length_tag(number: int) -> int:
    """The tag of a field of bytes, of a message or of packed numbers."""
    return number << 3 | 2


def tagged(number: int, value: bytes | bytearray) -> bytes:
    """A field of bytes, or of a message, with its tag."""
    out = bytearray()
    for part in (length_tag(number), len(value)):
        left = part
        while left > 0x7F:
            out.append(left & 0x7F | 0x80)
            left >>= 7
        out.append(left)
    return bytes(out) + value


def _left(data: bytes, at: int, end: int, kind: Descriptor, left: int) -> int:
    """``left`` less the fields of a message and of what grows below it; negative: there are more.

    Where the bytes make no sense the count ends, and the parser says so. Values that are packed, and fields of messages that hold
    neither lists nor messages, are not looked at: they take little more room parsed than they did on the wire.
    """
    while at < end and left >= 0:
        left -= 1
        tag, at = _varint(data, at, end)
        match tag & 7:
            case 0:
                _, at = _varint(data, at, end)
            case 1:
                at += 8
            case 2:
                size, at = _varint(data, at, end)
                field = kind.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None and _grows(field.message_type):
                    left = _left(data, at, min(end, at + size), field.message_type, left)
                at += size
            case 5:
                at += 4
    return left


def _varint(data: bytes | memoryview, at: int, end: int) -> tuple[int, int]:
    """A varint and where it ends; ``end`` where it does not, or is longer than one may be."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, end


@cache
def _grows(kind: Descriptor) -> bool:
    return any(field.is_repeated or field.message_type is not None for field in kind.fields)


def _writer(message: Message) -> bytes:
    return message.SerializeToString()


def checked(request: Any) -> Any:
    """The request itself.

    Raises:
        ProtocolError: it could not be read.
        LimitError: it has too many fields.
    """
    if isinstance(request, Malformed):
        raise request.kind(request.text)
    return request


Call = tuple[Callable[..., Any], type[Message]]

HEADTAIL: Final[Mapping[str, Call]] = {
    "ListModels": (grpc.unary_unary_rpc_method_handler, pb.ListModelsRequest),
    "FetchBundle": (grpc.unary_stream_rpc_method_handler, pb.FetchBundleRequest),
    "Infer": (grpc.unary_unary_rpc_method_handler, pb.InferRequest),
    "Session": (grpc.stream_stream_rpc_method_handler, pb.ClientMessage),
}
OPERATOR: Final[Mapping[str, Call]] = {
    name: (grpc.unary_unary_rpc_method_handler, getattr(pb, f"{name}Request")) for name in ("LoadModel", "UnloadModel")
}
OPEN_INFERENCE: Final[Mapping[str, Call]] = {
    name: (grpc.unary_unary_rpc_method_handler, getattr(oip, f"{name}Request"))
    for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
}


def handler(service: str, calls: Mapping[str, Call], servicer: Any) -> grpc.GenericRpcHandler[Any, Any]:
    """All calls of a service, for ``add_generic_rpc_handlers``.

    A request to infer is handed on as bytes: it is parsed once it is admitted, outside the event loop.
    """

    def reader(kind: type[Message]) -> Callable[[bytes], Any]:
        return bytes if kind is oip.ModelInferRequest else _reader(kind)

    return grpc.method_handlers_generic_handler(
        service,
        {
            name: make(
                getattr(servicer, name),
                request_deserializer=bytes if kind is oip.ModelInferRequest else _reader(kind),
                response_serializer=_writer,
            )
            for name, (make, kind) in calls.items()
        },
    )
