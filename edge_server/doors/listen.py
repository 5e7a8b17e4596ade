"""Where the doors open: gRPC's server with its limits, interceptors and services, on an address of this machine."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_server import preflight
from edge_server.access.auth import TokenInterceptor, Tokens
from edge_server.config import SecurityConfig, ServerConfig, split_address
from edge_server.doors import wire
from edge_server.doors.gate import Gate
from edge_server.doors.grpc import Ingress
from edge_server.doors.open_inference import OpenInference
from edge_server.doors.operator import Operator
from protos.errors import ConfigError

OPERATOR_CALLS = frozenset(f"/{wire.SERVICE}/{name}" for name in wire.OPERATOR)


def channel_options(config: ServerConfig) -> list[tuple[str, Any]]:
    """GRPC's settings: explicit message limits, and pings permitted more often than clients send them."""
    limits = config.limits
    largest = max(limits.max_payload_bytes, limits.max_frame_bytes) + (64 << 10)
    return [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", 16 << 20),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 4_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1e3)),
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_s * 1e3 / 3)),
        # A ping of gRPC's own, under way when the peer vanished, stands in for keepalive's and would be waited for a minute.
        ("grpc.http2.ping_timeout_ms", int(limits.keepalive_s * 1e3 / 3)),
        ("grpc.max_connection_idle_ms", int(limits.idle_s * 1e3)),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1e3)),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.so_reuseport", int(config.reuse_port)),
    ]


def build(
    config: ServerConfig,
    ingress: Ingress,
    operator: Operator,
    gate: Gate,
    health_servicer: health.aio.HealthServicer,  # type: ignore[name-defined]  # set at import
    tokens: tuple[Tokens | None, Tokens | None],
) -> tuple[grpc.aio.Server, str]:
    """A server that has its address and does not answer yet.

    Args:
        config: address, certificates, limits.
        ingress: answers our own calls.
        operator: answers the operator's.
        gate: counts and times every call.
        health_servicer: answers health.
        tokens: of all who may call, and of operators.

    Raises:
        ConfigError: the address or a certificate cannot be used.
    """
    everyone, operators = tokens
    on_refused = ingress.services.metrics.on_refused
    guard = TokenInterceptor(everyone, on_refused, operators=operators, operator_calls=OPERATOR_CALLS)
    limits = config.limits
    server = grpc.aio.server(
        interceptors=[guard, gate],
        options=channel_options(config),
        maximum_concurrent_rpcs=limits.max_sessions + limits.max_calls + limits.max_health_calls,
    )
    server.add_generic_rpc_handlers(
        (
            wire.handler(wire.SERVICE, wire.HEADTAIL, ingress),
            wire.handler(wire.SERVICE, wire.OPERATOR, operator),
            wire.handler(wire.OPEN_INFERENCE_SERVICE, wire.OPEN_INFERENCE, OpenInference(ingress)),
        )
    )
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        (wire.SERVICE, wire.OPEN_INFERENCE_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    return server, _bind(server, config)


def _bind(server: grpc.aio.Server, config: ServerConfig) -> str:
    host, _ = split_address(config.listen)
    credentials = _credentials(config.security)
    try:
        port = (
            server.add_insecure_port(config.listen) if credentials is None else server.add_secure_port(config.listen, credentials)
        )
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"cannot listen on {config.listen}: the address is in use or not one of this machine's")
    return f"{host}:{port}"


def _credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    if security.tls_cert is None or security.tls_key is None:
        return None
    ca = preflight.read_pem(security.tls_client_ca) if security.tls_client_ca else None
    pair = (preflight.read_pem(security.tls_key), preflight.read_pem(security.tls_cert))
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)
