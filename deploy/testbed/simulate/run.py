"""Simulate mode: a scenario in virtual time, with the real controller, estimator and grants."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from deploy.testbed.link.datagrams import Datagrams, TwoWays
from deploy.testbed.link.layering import Layers, checked
from deploy.testbed.link.loop import Loop
from deploy.testbed.link.model import Link
from deploy.testbed.link.path import Path, Pipe
from deploy.testbed.scenario import Scenario
from deploy.testbed.simulate.camera import Camera, CameraConfig
from deploy.testbed.simulate.policies import make_policy
from deploy.testbed.simulate.report import Summary, summarise
from deploy.testbed.simulate.server import Server
from deploy.testbed.workload import Workload
from edge_client.control import ControlConfig
from edge_server.bandwidth.grants import BandwidthManager

_DRAIN_NS = 3_000_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A finished simulation."""

    scenario: Scenario
    policy: str
    cameras: tuple[Camera, ...]
    uplinks: tuple[Link, ...]
    server: Server

    def summary(self) -> Summary:
        """Over all cameras."""
        return summarise([f for c in self.cameras for f in c.frames])

    def explanations(self) -> Iterator[dict[str, Any]]:
        """Every decision's record, camera by camera; empty unless ``explain`` was asked for."""
        for number, camera in enumerate(self.cameras):
            for record in camera.explanations:
                yield {"camera": number, **asdict(record)}


def simulate(
    scenario: Scenario, workload: Workload, policy: str = "ours", *, explain: bool = False, layers: Layers | None = None
) -> Run:
    """Runs a scenario on one server (for several see `fleet`). The same arguments give the same result, to the byte.

    Args:
        scenario: what happens.
        workload: what the cameras can choose from.
        policy: who decides.
        explain: keep a record of every decision.
        layers: of the choices whose frames travel in several.

    Raises:
        ConfigError: the workload lacks what the policy needs, or the layers are none.
    """
    layers = checked(layers or {})
    loop = Loop()
    duration_ns = int(scenario.duration_s * 1e9)
    server = Server(
        loop,
        workload.server,
        seed=str(scenario.seed),
        bandwidth=BandwidthManager() if scenario.grants else None,
        tails=scenario.tails,
        door_ms=scenario.door_ms,
    )
    slowed = workload.slowed(scenario.device_slowdown)
    up_config = scenario.uplink.link(scenario.duration_s, scenario.folder)
    down_config = scenario.downlink.link(scenario.duration_s, scenario.folder)
    control = ControlConfig(fps=scenario.fps, explain=explain)
    utility = [(float(p.payload_bytes.p95), p.accuracy) for p in workload.points if p.pareto]
    cameras: list[Camera] = []
    ups: list[Link] = []
    up = down = None
    for i in range(scenario.cameras):
        seed = f"{scenario.seed}/{i}"
        if up is None or down is None or not scenario.shared_link:
            up, down = Link(up_config, f"up/{seed}"), Link(down_config, f"down/{seed}")
            ups.append(up)
        greedy = i < scenario.greedy
        there = _path(loop, scenario, up, down, f"up/{seed}")
        camera = Camera(
            loop,
            CameraConfig(
                fps=scenario.fps,
                deadline_ns=int(scenario.deadline_ms * 1e6),
                start_ns=int(i * scenario.start_spread_ms * 1e6 / scenario.cameras),
                stop_ns=duration_ns,
                seed=seed,
                base_rtt_ns=up.delay_ns + down.delay_ns,
            ),
            slowed,
            make_policy("split_fixed" if greedy else policy, slowed, control),
            there,
            _path(loop, scenario, down, up, f"down/{seed}", there),
            server,
            layers,
        )
        server.open(camera, str(i), scenario.group, camera.config.fps, utility)
        cameras.append(camera)
    with _no_collector():
        loop.run(duration_ns + _DRAIN_NS)
    for camera in cameras:
        camera.finish()
    return Run(scenario=scenario, policy=policy, cameras=tuple(cameras), uplinks=tuple(ups), server=server)


def _path(loop: Loop, scenario: Scenario, forward: Link, reverse: Link, seed: str, there: Path | None = None) -> Path:
    """One direction of a camera's connection; ``there``: the other, where this is the way back."""
    stream = Pipe(loop, forward, reverse_delay_ns=reverse.delay_ns, ack_loss=reverse.loss, seed=seed)
    if scenario.transport == "grpc":
        return stream
    datagrams = Datagrams(loop, forward, reverse_delay_ns=reverse.delay_ns)
    until_ns = int(scenario.duration_s * 1e9)
    after = there if isinstance(there, TwoWays) else None
    return TwoWays(loop, stream, datagrams, always=scenario.transport == "quic", until_ns=until_ns, after=after)


@contextmanager
def _no_collector() -> Iterator[None]:
    """A run makes many objects and no garbage cycles; looking for them would cost a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
