"""The server's settings, one frozen dataclass a component, bounds checked once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protos.errors import ConfigError
from protos.messages import MAX_PAYLOAD_BYTES
from protos.web.address import page_address, token_for

DEFAULT_LISTEN = "127.0.0.1:50051"
DEFAULT_MODEL = "efficientnet-lite0"
MAX_FRAME_BYTES = 64 << 20


_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")
_MANY = 1 << 20
_DAY_S = 86_400.0
_CPUS = 4096


def _check(settings: Any, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Every named field of ``settings`` lies within its bounds; what is no number (nan) lies nowhere.

    Raises:
        ConfigError: one does not.
    """
    for name, (lowest, highest) in bounds.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
            raise ConfigError(f"{name} must be {lowest}..{highest}, got {value!r}")


def split_address(text: str) -> tuple[str, int]:
    """``host:port`` as a pair; IPv6 hosts in brackets.

    Raises:
        ConfigError: no port, or one outside 0..65535.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not _HOST.fullmatch(host) or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ConfigError(f"{text!r} is no address; give host:port, for instance 0.0.0.0:50051 or [::]:50051")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the server takes at most; each is checked before memory is spent on it.

    Attributes:
        max_payload_bytes: of one layer.
        max_frame_bytes: of all layers of one frame.
        max_pending_bytes: payloads of all sessions that wait for an answer.
        max_pixels: of an offloaded image, read from its header before it is decoded.
        max_video_streams: sessions that offload H.264 at once, each with a decoder of its own; 0: none may.
        max_sessions: open at once.
        max_connections: open at once, those that have not said anything yet included; further ones are closed.
        max_in_flight: frames one session may have unanswered.
        max_unary_in_flight: frames of unary calls one client may have unanswered: one token's holders, or, where there are
            no tokens, all callers together.
        max_calls: calls beside sessions and health, open at once.
        max_health_calls: health checks and watches open at once; they need no token.
        max_health_calls_per_host: of them, from one address, so that no stranger can starve whoever probes.
        max_fetches: bundle downloads at once; further ones wait.
        max_fetches_per_client: of them, by one token's holders, or from one host where there are no tokens.
        min_fetch_bytes_per_s: how fast a download must go on, beyond its first ``write_s``, while others wait for its place.
        hello_s: a session that says nothing for this long after opening is closed, and a call whose request is not complete.
        write_s: a client that does not read for this long is let go.
        handshake_s: a connection that has not said what HTTP/2 and TLS begin with by then is closed.
        keepalive_s: a silent connection is asked for a sign of life after so long; one that gives none for a third of it more
            is closed, and with it the sessions of a device that vanished.
        idle_s: a connection without any call is closed after so long.
        layer_wait_ns: a frame without deadline runs with the layers that arrived after this long.
    """

    max_payload_bytes: int = 4 << 20
    max_frame_bytes: int = 8 << 20
    max_pending_bytes: int = 256 << 20
    max_pixels: int = 16 << 20
    max_video_streams: int = 256
    max_sessions: int = 2048
    max_connections: int = 8192
    max_in_flight: int = 64
    max_unary_in_flight: int = 256
    max_calls: int = 1024
    max_health_calls: int = 256
    max_health_calls_per_host: int = 32
    max_fetches: int = 16
    max_fetches_per_client: int = 4
    min_fetch_bytes_per_s: int = 8192
    hello_s: float = 10.0
    write_s: float = 30.0
    handshake_s: float = 10.0
    keepalive_s: float = 30.0
    idle_s: float = 300.0
    layer_wait_ns: int = 2_000_000_000

    def __post_init__(self) -> None:
        counts = (
            "max_pixels", "max_sessions", "max_connections", "max_in_flight", "max_unary_in_flight", "max_calls",
            "max_health_calls", "max_health_calls_per_host", "max_fetches", "max_fetches_per_client", "min_fetch_bytes_per_s",
        )  # fmt: skip
        durations = ("hello_s", "write_s", "handshake_s", "keepalive_s", "idle_s")
        _check(
            self,
            dict.fromkeys(counts, (1, 1 << 24))
            | dict.fromkeys(durations, (0.001, _DAY_S))
            | {
                "max_video_streams": (0, 1 << 16),
                "max_payload_bytes": (1024, MAX_PAYLOAD_BYTES),
                "max_frame_bytes": (1024, MAX_FRAME_BYTES),
                "max_pending_bytes": (1024, 1 << 40),
                "layer_wait_ns": (1, int(_DAY_S * 1e9)),
            },
        )
        if self.max_frame_bytes < self.max_payload_bytes or self.max_pending_bytes < self.max_frame_bytes:
            raise ConfigError("max_pending_bytes >= max_frame_bytes >= max_payload_bytes is required")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How frames wait for the tail.

    Attributes:
        max_batch: frames in one run of the tail.
        max_delay_ns: how long a lone frame may be held back so that others join it; 0: never.
        max_queue: frames that may wait; further ones are refused.
        margin_ns: what an answer needs after the tail; a deadline nearer than tail time and margin is refused.
    """

    max_batch: int = 16
    max_delay_ns: int = 0
    max_queue: int = 1024
    margin_ns: int = 1_000_000

    def __post_init__(self) -> None:
        second_ns = 1_000_000_000
        bounds = {"max_batch": (1, 1024), "max_queue": (1, _MANY), "max_delay_ns": (0, second_ns), "margin_ns": (0, second_ns)}
        _check(self, bounds)


@dataclass(frozen=True, kw_only=True, slots=True)
class TailConfig:
    """Where and how the tail runs.

    Attributes:
        threads: of the tail's math library; 0: left to it.
        device: a torch device.
        cpus: cores the tail's thread is pinned to; empty: any.
        decode_threads: of the executor that decodes payloads.
    """

    threads: int = 0
    device: str = "cpu"
    cpus: tuple[int, ...] = ()
    decode_threads: int = 2

    def __post_init__(self) -> None:
        _check(self, {"threads": (0, 1024), "decode_threads": (1, 64)})
        if not all(0 <= cpu < _CPUS for cpu in self.cpus):
            raise ConfigError(f"--tail-cpus must be core numbers below {_CPUS}, for instance 0,1, got {self.cpus}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    """Tails on a Ray cluster.

    Attributes:
        address: of the cluster, e.g. ``auto`` or ``ray://head:10001``; empty: one is started on this machine.
        replicas: (fewest, most) of each bundle's tail; Serve scales between them with the frames in progress.
        cpus_per_replica, gpus_per_replica: what Ray sets aside for each; fractions share a card.
        tails_per_replica: tails each replica keeps in memory, whichever bundles' they are; 0: every bundle has replicas of its
            own, an application each.
        cpus: of the cluster started here; None: all cores.
        deploy_s: how long the start of an application may take, waiting for free cores included.
    """

    address: str = ""
    replicas: tuple[int, int] = (1, 1)
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    tails_per_replica: int = 0
    cpus: int | None = None
    deploy_s: float = 300.0

    def __post_init__(self) -> None:
        lowest, highest = self.replicas
        if not 1 <= lowest <= highest <= 1000:
            raise ConfigError("--replicas must be N or MIN:MAX with 1 <= MIN <= MAX <= 1000")
        _check(
            self,
            {
                "cpus_per_replica": (0, _CPUS),
                "gpus_per_replica": (0, _CPUS),
                "tails_per_replica": (0, _MANY),
                "deploy_s": (1, _DAY_S),
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SecurityConfig:
    """TLS, tokens and quotas; all off by default.

    Attributes:
        tls_cert, tls_key: PEM files of the server; both or neither.
        tls_client_ca: PEM file; clients must show a certificate it signed (mTLS).
        token_file: bearer tokens, one ``name token`` a line; read again when it changes.
        operator_token_file: the same of those who may load and unload models; None: nobody may.
        max_sessions_per_token, frames_per_s_per_token, bytes_per_s_per_token: quotas shared by all who hold a token;
            0: none.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    operator_token_file: Path | None = None
    max_sessions_per_token: int = 0
    frames_per_s_per_token: float = 0.0
    bytes_per_s_per_token: float = 0.0

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together; give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key")
        quotas = (self.max_sessions_per_token, self.frames_per_s_per_token, self.bytes_per_s_per_token)
        _check(
            self,
            {
                "max_sessions_per_token": (0, _MANY), "frames_per_s_per_token": (0, _MANY), "bytes_per_s_per_token": (0, 1 << 40),
            },
        )  # fmt: skip
        if any(quotas) and self.token_file is None:
            raise ConfigError("quotas count per token; give --token-file as well")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Everything ``edge-server`` is told.

    Attributes:
        listen: host:port; port 0 picks a free one.
        models: bundle names or directories, the default first; empty: none until one is added.
        models_dir: bundles below it may be loaded by an operator's call; None: none may.
        backend: ``embedded``, ``ray``, one that a package registered, or ``module:function``.
        grace_s: how long work in flight may take at shutdown.
        linger_s: how long sessions stay open after they were told of the shutdown, so that frames already on their way get
            a plain refusal.
        port_file: where the bound address is written, for the program that started the server.
        parent_pid: the server ends when this process does.
        metrics_port: Prometheus; None: off.
        web: host:port of the page; None: there is none.
        otel_endpoint: an OTLP collector for traces; None: as OpenTelemetry's own variables say.
        reuse_port: several ingress processes may share the address.
        adapt_dir: bundles are fitted to what the cameras show, and the fitted copies lie there; None: they stay as they are.
        adapt_every_s: between two fits.
        quic: a UDP port beside the TCP one takes frames as datagrams, where the extra ``quic`` is installed.
    """

    listen: str = DEFAULT_LISTEN
    models: tuple[str, ...] = ()
    models_dir: Path | None = None
    backend: str = "embedded"
    grace_s: float = 10.0
    linger_s: float = 0.3
    port_file: Path | None = None
    parent_pid: int | None = None
    metrics_port: int | None = None
    web: str | None = None
    otel_endpoint: str | None = None
    reuse_port: bool = False
    adapt_dir: Path | None = None
    adapt_every_s: float = 3600.0
    quic: bool = True
    limits: Limits = field(default_factory=Limits)
    batch: BatchConfig = field(default_factory=BatchConfig)
    tail: TailConfig = field(default_factory=TailConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        split_address(self.listen)
        if not all(self.models):
            raise ConfigError("--model must be a model's name or a bundle's directory, got an empty text")
        _check(self, {"grace_s": (0, 3600), "linger_s": (0, 3600), "adapt_every_s": (1, 1e9)})
        if self.metrics_port is not None:
            _check(self, {"metrics_port": (0, 65535)})
        if self.web is not None:
            token_for(page_address(self.web)[0])
        if self.parent_pid is not None:
            _check(self, {"parent_pid": (1, 1 << 22)})
        if self.models_dir is not None and self.security.operator_token_file is None:
            raise ConfigError("--models-dir is for operators' calls; give --operator-token-file as well")

    @property
    def exposed(self) -> bool:
        """Open beyond this machine without TLS or token."""
        return not is_loopback(split_address(self.listen)[0]) and not (self.security.tls_cert or self.security.token_file)

    @property
    def operators_exposed(self) -> bool:
        """Operators may call from other machines without TLS."""
        security = self.security
        return not is_loopback(split_address(self.listen)[0]) and not security.tls_cert and security.operator_token_file is not None
