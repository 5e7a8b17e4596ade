"""What a program may ask of a ``Client`` beyond a server and a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_client.gates.floor import ScoreFloor, read_floor
from edge_client.transport.rpc import Endpoint, token_from_environment
from protos.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientOptions:
    """Settings of a ``Client``.

    Attributes:
        deadline_ms: from the frame to its answer; then the local model answers, or the frame expires. None: 500 for cameras,
            else there is none. 0: none.
        operating_point: always this one; None: chosen frame by frame.
        max_in_flight: frames unanswered at a time; 0: as many as the network is ready for.
        wait_for_server_s: how long a server is waited for: at the beginning, and where there is no deadline for every frame.
        threads: of the head.
        h264_encoder: FFmpeg's name of the encoder for offloaded video; ``auto``: the device's own, else libx264; ``off``: none.
        score_min: from which score on a box counts, ``"0.4"`` or ``"0.4,person=0.6"``; empty: the bundle's.
        change_gate: reuse the last answer where nothing moved.
        interest: classes the prefilter looks for; None: no prefilter; empty: those the bundle was exported for.
        recall: the prefilter's; None: the bundle's.
        fps: how many frames a second ``infer`` is going to be given; with a deadline the controller paces itself by it.
        group: clients with the same name share a link; the server divides it among them.
        policy: who chooses: a registered name, or ``module:Class``. It is asked for frames of cameras, of ``run`` with
            ``realtime``, and of ``infer`` with a deadline; all others take the most accurate operating point.
        transport: what carries the frames: the same.
        cache: where bundles are kept; None: ``HEADTAIL_CACHE``, or ``~/.cache/headtail``.
        tls, tls_ca, tls_cert, tls_key: see ``rpc.Endpoint``.
        token: the server's bearer token; None: that of ``HEADTAIL_TOKEN``.
    """

    deadline_ms: float | None = None
    operating_point: int | None = None
    max_in_flight: int = 0
    wait_for_server_s: float = 10.0
    threads: int = 1
    h264_encoder: str = "auto"
    score_min: str = ""
    change_gate: bool = False
    interest: tuple[str, ...] | None = None
    recall: float | None = None
    fps: float = 10.0
    group: str = ""
    policy: str = "adaptive"
    transport: str = "auto"
    cache: Path | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("deadline_ms", 0, 3_600_000), ("max_in_flight", 0, 1024), ("fps", 0.01, 1000), ("wait_for_server_s", 0, 86_400),
            ("threads", 1, 256), ("operating_point", 0, 65_535), ("recall", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # false for NaN, too
                raise ConfigError(f"{name} must be {low}..{high}, got {value}")
        self.floor()

    def floor(self) -> ScoreFloor:
        """From which score on a box counts."""
        return read_floor(self.score_min)

    def endpoint(self, address: str) -> Endpoint:
        """The server at ``address``, with these certificates and this token."""
        token = self.token if self.token is not None else token_from_environment()
        return Endpoint(
            address=address, tls=self.tls, tls_ca=self.tls_ca, tls_cert=self.tls_cert, tls_key=self.tls_key, token=token
        )
