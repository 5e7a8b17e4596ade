"""The transports that carry frames as datagrams: always, or where the path loses packets. gRPC keeps everything else."""

from __future__ import annotations

from importlib.util import find_spec

from edge_client.frames import Clock
from edge_client.transport.base import SessionEvents
from edge_client.transport.grpc import GrpcLink
from edge_client.transport.rpc import Endpoint
from protos.errors import MissingDependencyError


def _has_quic() -> bool:
    return find_spec("aioquic") is not None


class QuicLink(GrpcLink):
    """Frames go as datagrams whenever the server and the network let them."""

    def __init__(self, endpoint: Endpoint, events: SessionEvents, *, clock: Clock) -> None:
        """As `GrpcLink`.

        Raises:
            MissingDependencyError: the package aioquic is not installed.
        """
        if not _has_quic():
            raise MissingDependencyError("--transport quic needs another package: pip install 'headtail[quic]'")
        super().__init__(endpoint, events, clock=clock, datagrams="always")


class AutoLink(GrpcLink):
    """Frames go by the stream, which lets each be predicted from the one before, and as datagrams where packets are lost."""

    def __init__(self, endpoint: Endpoint, events: SessionEvents, *, clock: Clock) -> None:
        super().__init__(endpoint, events, clock=clock, datagrams="lossy" if _has_quic() else "never")
