"""The service's handlers, with readers that never raise: bytes that are no message become `MALFORMED`.

gRPC would otherwise end such a call with a bare UNKNOWN, or leave a stream's reader dead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message

from protos.errors import ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Headtail"].full_name


class Malformed:
    """Bytes that are no message of the schema."""


MALFORMED: Final = Malformed()


def _reader(kind: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def read(data: bytes) -> Message | Malformed:
        try:
            return kind.FromString(data)
        except (DecodeError, UnicodeDecodeError, ValueError):
            return MALFORMED

    return read


def _writer(message: Message) -> bytes:
    return message.SerializeToString()


def checked(request: Any) -> Any:
    """The request itself.

    Raises:
        ProtocolError: it could not be read.
    """
    if isinstance(request, Malformed):
        raise ProtocolError("the request is no message of this protocol")
    return request


def handler(servicer: Any) -> grpc.GenericRpcHandler[Any, Any]:
    """All calls of the service, for ``add_generic_rpc_handlers``."""
    methods = {
        "ListModels": (grpc.unary_unary_rpc_method_handler, pb.ListModelsRequest),
        "FetchBundle": (grpc.unary_stream_rpc_method_handler, pb.FetchBundleRequest),
        "Infer": (grpc.unary_unary_rpc_method_handler, pb.InferRequest),
        "Session": (grpc.stream_stream_rpc_method_handler, pb.ClientMessage),
    }
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: make(getattr(servicer, name), request_deserializer=_reader(kind), response_serializer=_writer)
            for name, (make, kind) in methods.items()
        },
    )
