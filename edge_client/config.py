"""The client's settings, checked once; from the command line, and a TOML file for what stays the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_client.events.rules import EventRule
from edge_client.gates.floor import ScoreFloor, read_floor
from edge_client.transport.rpc import Endpoint, is_port, token_from_environment
from protos.errors import ConfigError
from protos.schema import checked, read_toml_file
from protos.web.address import page_address, token_for

LIVE_DEADLINE_MS = 500.0
FILE_PATIENCE_S = 30.0
EMBEDDED = "embedded"
_MAX_NAME_CHARS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """Everything ``edge-client`` can be told. None: depends on whether the source is live.

    Attributes:
        camera: what ``sources.parse_source`` understands.
        server: ``host:port``, or ``embedded``.
        model: a name the server knows; with ``embedded`` a bundle's name or directory; empty: the server's first.
        deadline_ms: from capture to answer; 0: none. None: 500 live, none for files.
        max_in_flight: frames unanswered at a time; 0: as many as the network is ready for.
        frames: end after this many captured frames; 0: no limit.
        fps: pace of ``realtime``; 0: the file's own.
        camera_id: what results call the camera; empty: the source as people may see it.
        output: where results go; ``-``: standard output; None: nowhere.
        append: results are added at the end of ``output``, which is otherwise written from its start.
        output_max_mb: ``output`` is rotated when it is larger (megabytes); 0: it grows.
        strict: a source that is not whole is an error at the end.
        wait_for_server_s: None: 0 live, 30 for files.
        operating_point: always this one; None: chosen frame by frame.
        threads: of the head.
        h264_encoder: FFmpeg's name of the encoder for offloaded video; ``auto``: the device's own, else libx264; ``off``: none.
        change_gate: ``on``, ``off`` or ``auto`` (on for cameras, off for files).
        prefilter: the same; where the bundle has one.
        interest: comma-separated class names the prefilter looks for; empty: those the bundle was exported for.
        recall: the prefilter's; None: the bundle's.
        score_min: ``0.4``, or ``0.4,person=0.6``: boxes below are neither reported, drawn nor tracked; empty: the bundle's.
        track: carry the last boxes along on frames that have no answer of their own.
        group: cameras with the same name share a link; the server divides it among them.
        policy: who chooses, frame by frame: a registered name, or ``module:Class``.
        transport: what carries the frames: the same.
        sink: further places where answers go, each ``NAME`` or ``NAME=WHERE``: the same.
        web: host:port of the live page; None: off. Others than this machine need the token of ``HEADTAIL_WEB_TOKEN``.
        events: the tables ``[[events]]``: which objects are told of, and to whom; see docs/guides/camera.md.
        frigate: answer Frigate's detector protocol at this ZMQ address, instead of a camera of one's own; None: no.
        metrics_listen: host:port for Prometheus; None: off.
        otel_endpoint: an OTLP collector for traces; None: as OpenTelemetry's own variables say.
        tls_ca, tls_cert, tls_key, tls: see ``rpc.Endpoint``.
    """

    camera: str
    server: str = "127.0.0.1:50051"
    model: str = ""
    deadline_ms: float | None = None
    max_in_flight: int = 0
    frames: int = 0
    loop: bool = False
    realtime: bool = False
    fps: float = 0.0
    camera_id: str = ""
    output: str | None = None
    append: bool = False
    output_max_mb: float = 0.0
    strict: bool = False
    wait_for_server_s: float | None = None
    display: bool = False
    save_video: str | None = None
    operating_point: int | None = None
    threads: int = 1
    h264_encoder: str = "auto"
    change_gate: str = "auto"
    prefilter: str = "auto"
    interest: str = ""
    recall: float | None = None
    score_min: str | float = ""
    track: bool = False
    group: str = ""
    policy: str = "adaptive"
    transport: str = "auto"
    sink: tuple[str, ...] = ()
    web: str | None = None
    events: tuple[EventRule, ...] = ()
    frigate: str | None = None
    metrics_listen: str | None = None
    otel_endpoint: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    explain: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("deadline_ms", 0, 3_600_000), ("max_in_flight", 0, 1024), ("frames", 0, 2**53), ("fps", 0, 1000),
            ("wait_for_server_s", 0, 86_400), ("output_max_mb", 0, 1e6), ("threads", 1, 256), ("operating_point", 0, 65_535),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # false for NaN, too
                raise ConfigError(f"--{name.replace('_', '-')} must be {low}..{high}, got {value}")
        for name in ("change_gate", "prefilter"):
            if getattr(self, name) not in ("on", "off", "auto"):
                raise ConfigError(f"--{name.replace('_', '-')} must be on, off or auto, got {getattr(self, name)!r}")
        if self.prefilter == "off" and (self.interest or self.recall is not None):
            raise ConfigError("--interest and --recall are for the prefilter, which --prefilter off switches off")
        self.floor()
        if self.recall is not None and not 0 < self.recall < 1:
            raise ConfigError(f"--recall must lie between 0 and 1, got {self.recall}")
        for name in ("model", "group", "interest", "h264_encoder"):
            text = getattr(self, name)
            if not text.isprintable() or len(text) > _MAX_NAME_CHARS:
                raise ConfigError(f"--{name.replace('_', '-')} takes at most {_MAX_NAME_CHARS} printable characters, got {text!r}")
        self._check_addresses()

    def _check_addresses(self) -> None:
        if self.web is not None:
            token_for(page_address(self.web)[0])
        if self.frigate is not None and not re.fullmatch(r"(tcp://[^/]+:[0-9*]+|ipc:///?.+)", self.frigate):
            raise ConfigError(f"--frigate must be tcp://host:port or ipc://path, got {self.frigate!r}")
        if self.metrics_listen is not None:
            self.metrics_address()
        if self.server != EMBEDDED:
            self.endpoint(self.server)

    def endpoint(self, address: str) -> Endpoint:
        """The server at ``address`` with this configuration's certificates and token."""
        ca, cert, key = (Path(v) if v else None for v in (self.tls_ca, self.tls_cert, self.tls_key))
        if self.server == EMBEDDED:
            return Endpoint(address=address)
        return Endpoint(address=address, tls=self.tls, token=token_from_environment(), tls_ca=ca, tls_cert=cert, tls_key=key)

    def floor(self) -> ScoreFloor:
        """From which score on a box counts.

        Raises:
            ConfigError: ``score_min`` cannot be read.
        """
        return read_floor(str(self.score_min))

    def metrics_address(self) -> tuple[str, int]:
        """Host and port of the metrics' endpoint.

        Raises:
            ConfigError: it is no address.
        """
        host, _, port = (self.metrics_listen or "").rpartition(":")
        if not host or not is_port(port):
            raise ConfigError(f"--metrics-listen must be host:port, for instance 127.0.0.1:9465, got {self.metrics_listen!r}")
        return host.strip("[]"), int(port)

    @property
    def shows_pictures(self) -> bool:
        """Whether anybody wants a frame's picture after it was answered."""
        wanted = (self.display, self.track, self.save_video is not None, self.web is not None)
        return any(wanted) or any(rule.snapshot for rule in self.events)

    def effective_deadline_ms(self, *, live: bool) -> float:
        """The deadline in force; 0: none."""
        return self.deadline_ms if self.deadline_ms is not None else LIVE_DEADLINE_MS if live else 0.0

    def effective_wait_s(self, *, live: bool) -> float:
        """How long a server is waited for."""
        return self.wait_for_server_s if self.wait_for_server_s is not None else 0.0 if live else FILE_PATIENCE_S


def read_config(path: Path | None, given: Mapping[str, Any]) -> ClientConfig:
    """Settings of a TOML file, if any, and of the command line, which wins.

    Args:
        path: the file; its keys are the options' names, with ``_`` or ``-``.
        given: the command line's, by name.

    Raises:
        ConfigError: unreadable, not TOML, a key that is no option, or a value of another type or out of range.
    """
    what, from_file = read_settings(path)
    return make_config({**from_file, **given}, what=what)


def read_settings(path: Path | None) -> tuple[str, dict[str, Any]]:
    """What the settings are called in an error, and those of the file.

    Raises:
        ConfigError: unreadable, or not TOML.
    """
    what = f"--config {path}" if path else "the command line"
    return what, read_toml_file(path, what=what) if path else {}


def make_config(settings: Mapping[str, Any], *, what: str) -> ClientConfig:
    """Checked settings of one camera.

    Raises:
        ConfigError: no camera, a name that is no option, or a value of another type or out of range.
    """
    if settings.get("frigate") is not None:
        if "camera" in settings:
            raise ConfigError("--frigate answers Frigate's pictures and takes no --camera")
        settings = {**settings, "camera": "frigate"}
    if "camera" not in settings:
        raise ConfigError("--camera is required: what frames come from; --help tells more")
    return checked(settings, ClientConfig, what=what, error=ConfigError)
