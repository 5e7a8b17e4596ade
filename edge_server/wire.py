"""The service's handlers, with readers that never raise: bytes that are no message become `MALFORMED`.

gRPC would otherwise end such a call with a bare UNKNOWN, or leave a stream's reader dead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message

from protos.errors import ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.headtail.v1 import open_inference_pb2 as oip

SERVICE: Final = pb.DESCRIPTOR.services_by_name["Headtail"].full_name
OPEN_INFERENCE_SERVICE: Final = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


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


Call = tuple[Callable[..., Any], type[Message]]

HEADTAIL: Final[Mapping[str, Call]] = {
    "ListModels": (grpc.unary_unary_rpc_method_handler, pb.ListModelsRequest),
    "FetchBundle": (grpc.unary_stream_rpc_method_handler, pb.FetchBundleRequest),
    "Infer": (grpc.unary_unary_rpc_method_handler, pb.InferRequest),
    "Session": (grpc.stream_stream_rpc_method_handler, pb.ClientMessage),
}
OPEN_INFERENCE: Final[Mapping[str, Call]] = {
    name: (grpc.unary_unary_rpc_method_handler, getattr(oip, f"{name}Request"))
    for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
}


def handler(service: str, calls: Mapping[str, Call], servicer: Any) -> grpc.GenericRpcHandler[Any, Any]:
    """All calls of a service, for ``add_generic_rpc_handlers``."""
    return grpc.method_handlers_generic_handler(
        service,
        {
            name: make(getattr(servicer, name), request_deserializer=_reader(kind), response_serializer=_writer)
            for name, (make, kind) in calls.items()
        },
    )
