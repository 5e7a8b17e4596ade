"""A scenario: one TOML file for all three ways of driving the testbed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from deploy.testbed.link.datagrams import TRANSPORTS
from deploy.testbed.link.model import LinkConfig, LossModel
from deploy.testbed.link.synthetic import KINDS, synthesise
from deploy.testbed.link.trace import Trace, constant, load_trace
from protos.errors import ConfigError
from protos.schema import checked, read_toml_file

_MOST_TAILS, _MOST_DOOR_MS = 1024, 1000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """One direction of the link, as a scenario file writes it.

    Attributes:
        mbps: constant capacity; used where ``trace`` is empty.
        trace: a file (relative to the scenario's folder), or ``synthetic:KIND:SEED``.
        scale: factor on the trace.
        delay_ms: propagation, one way.
        jitter_ms: standard deviation of the extra delay.
        queue_kb: drop-tail queue; 0: 200 ms of the mean capacity, at least 30 kB.
        loss_percent: packets lost.
        burst_packets: mean length of a run of losses; 1: independent.
        outages_s: [[begin, end], ...] without any capacity.
    """

    mbps: float = 10.0
    trace: str = ""
    scale: float = 1.0
    delay_ms: float = 20.0
    jitter_ms: float = 0.0
    queue_kb: float = 0.0
    loss_percent: float = 0.0
    burst_packets: float = 1.0
    outages_s: tuple[tuple[float, float], ...] = ()

    def capacity(self, duration_s: float, folder: Path = Path()) -> Trace:
        """The trace, outages cut out."""
        found = _trace(self.trace, self.mbps, duration_s, folder)
        if self.scale != 1.0:
            found = found.scaled(self.scale)
        if self.outages_s:
            outages = [(int(b * 1e9), int(e * 1e9)) for b, e in self.outages_s]
            found = found.with_outages(outages, int((duration_s + 60) * 1e9))
        return found

    def link(self, duration_s: float, folder: Path = Path()) -> LinkConfig:
        """For ``Link``."""
        return LinkConfig(
            trace=self.capacity(duration_s, folder),
            delay_ns=int(self.delay_ms * 1e6),
            jitter_ns=int(self.jitter_ms * 1e6),
            queue_bytes=int(self.queue_kb * 1000),
            loss=LossModel(loss=self.loss_percent / 100, burst_packets=self.burst_packets),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What happens.

    Attributes:
        device_slowdown: multiplies every device time of the workload: this host is no edge device.
        cameras: how many; on one shared link each way if ``shared_link``, else each on a link of its own.
        group: the name the cameras give their common bottleneck; empty: they give none.
        greedy: how many of the cameras are not told of grants and send all they can.
        start_spread_ms: cameras begin this far apart in all.
        grants: whether the server grants bitrates.
        transport: ``grpc``, ``quic`` (datagrams), or ``auto``: datagrams where the path loses packets.
        servers: how many; the cameras spread over them at random, each for the whole run. In simulation.
        tails: of each server: so many batches run at a time.
        door_ms: what a server's door takes for a frame, one after the other, before it may wait for a tail.
        folder: what relative trace paths start from.
    """

    name: str = "scenario"
    duration_s: float = 60.0
    seed: int = 0
    fps: float = 10.0
    deadline_ms: float = 200.0
    device_slowdown: float = 10.0
    cameras: int = 1
    shared_link: bool = False
    group: str = ""
    greedy: int = 0
    start_spread_ms: float = 1000.0
    grants: bool = True
    transport: str = "grpc"
    servers: int = 1
    tails: int = 1
    door_ms: float = 0.0
    uplink: Direction = field(default_factory=Direction)
    downlink: Direction = field(default_factory=lambda: Direction(mbps=20.0))
    folder: Path = field(default_factory=Path)

    def __post_init__(self) -> None:
        bounds = {"duration_s": 86_400, "fps": 1000, "deadline_ms": 3_600_000, "device_slowdown": 10_000}
        for name, most in bounds.items():
            if not 0 < getattr(self, name) <= most:  # nan is not
                raise ConfigError(f"duration_s, fps, deadline_ms and device_slowdown must be positive; {name} at most {most}")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.cameras < 1 or not 0 <= self.greedy <= self.cameras or self.start_spread_ms < 0:
            raise ConfigError("cameras must be at least 1, greedy 0..cameras, start_spread_ms not negative")
        if not (1 <= self.servers <= self.cameras and 1 <= self.tails <= _MOST_TAILS and 0 <= self.door_ms <= _MOST_DOOR_MS):
            raise ConfigError(f"servers must be 1..cameras, tails 1..{_MOST_TAILS} and door_ms 0..{_MOST_DOOR_MS:g}")
        if self.servers > 1 and (self.shared_link or self.greedy):
            raise ConfigError("several servers are simulated one by one: their cameras share no link, and none is greedy")


def _trace(name: str, mbps: float, duration_s: float, folder: Path) -> Trace:
    if not name:
        return constant(mbps * 1e6)
    kind, *rest = name.split(":")
    if kind == "synthetic":
        if not rest or rest[0] not in KINDS or (len(rest) > 1 and not rest[1].isdecimal()):
            raise ConfigError(f"trace {name!r}: write synthetic:KIND:SEED with KIND one of {', '.join(KINDS)}")
        return synthesise(rest[0], int(rest[1]) if len(rest) > 1 else 0, duration_s=duration_s)
    return load_trace(folder / name)


def load_scenario(path: Path) -> Scenario:
    """Reads a scenario file.

    Raises:
        ConfigError: unreadable, an unknown key, or a value out of range.
    """
    return parse_scenario({"name": path.stem, **read_toml_file(path, what=f"scenario {path}")}, path.parent)


def parse_scenario(data: Mapping[str, Any], folder: Path = Path()) -> Scenario:
    """From plain TOML types."""
    _refuse_unknown(data, {f.name for f in fields(Scenario)} - {"folder"}, "the scenario")
    for name in ("uplink", "downlink"):
        if isinstance(section := data.get(name), Mapping):
            _refuse_unknown(section, {f.name for f in fields(Direction)}, f"[{name}]")
    return replace(checked(dict(data), Scenario, what="the scenario", error=ConfigError), folder=folder)


def _refuse_unknown(data: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(f"{where} has no setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
