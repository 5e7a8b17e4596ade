"""What the controller may choose from on this device: the bundle's table, with this device's own times.

``measure`` times every operating point once per device and bundle (three seconds at most) and keeps the figures in the
cache; a table's ``head_ms`` measured elsewhere is only a prior.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edge_client.control import ControlConfig, Controller, Decision, Local, LocalOption, Offload, Split
from edge_client.engine import Engine
from edge_client.frames import NS_PER_MS, NS_PER_S, Clock
from protos.errors import BundleError
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.tasks.preprocess import Frame

log = logging.getLogger(__name__)

# A measured device is optimistic about its link: what does not arrive in time, the local model answers.
_INITIAL_BPS = 20_000_000.0
_BUDGET_NS = 3 * NS_PER_S


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTimes:
    """Milliseconds on this device: head to payload by operating point id, offload by its name, and the local model."""

    head_ms: Mapping[int, Quantiles] = field(default_factory=dict)
    local_ms: Quantiles | None = None
    offload_ms: Mapping[str, Quantiles] = field(default_factory=dict)

    def choices(self) -> dict[Decision, Quantiles]:
        """The same by the controller's choices."""
        local: dict[Decision, Quantiles] = {Local(): self.local_ms} if self.local_ms else {}
        offloads: dict[Decision, Quantiles] = {Offload.named(name): ms for name, ms in self.offload_ms.items()}
        return {**{Split(point_id=i): ms for i, ms in self.head_ms.items()}, **offloads, **local}


def measure(engine: Engine, *, clock: Clock = time.monotonic_ns, cache: Path | None = None) -> DeviceTimes:
    """Times the engine on a test picture, or reads what an earlier start measured."""
    file = cache / f"{engine.sha256[:32]}-{_device_id()}.json" if cache is not None else None
    if file is not None and (known := _read(file)) is not None:
        return known
    times = _measure(engine, clock)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(_to_json(times)), encoding="utf-8")
        except OSError as error:
            log.debug("device times are not kept: %s", error)
    return times


def _measure(engine: Engine, clock: Clock) -> DeviceTimes:
    height, width = engine.bundle.manifest.preprocess.size_px
    picture: Frame = np.random.default_rng(0).integers(0, 255, (height * 5 // 4, width * 5 // 4, 3)).astype(np.uint8)
    until_ns = clock() + _BUDGET_NS
    heads = {p.graphs: p for p in engine.bundle.points}  # points with the same graphs cost the same
    samples: dict[tuple[str, ...], list[float]] = {graphs: [] for graphs in heads}
    offloads: dict[str, list[float]] = {name_of(o): [] for o in engine.bundle.offloads}
    local: list[float] = []
    for turn in range(8):
        if engine.local is not None:
            _, elapsed_ms = engine.local.answer(engine.local.prepare(picture), (width, height))
            if turn:  # the first run warms up
                local.append(elapsed_ms)
        for graphs, point in heads.items():
            start_ns = clock()
            engine.encode(engine.features(picture), point)
            if turn:
                samples[graphs].append((clock() - start_ns) / NS_PER_MS)
            if clock() > until_ns:
                break
        for o in engine.bundle.offloads:
            start_ns = clock()
            engine.compress(engine.picture(picture), o.format, o.quality, o.size_px)
            if turn:
                offloads[name_of(o)].append((clock() - start_ns) / NS_PER_MS)
        if clock() > until_ns:
            break
    head = {p.id: _quantiles(samples[p.graphs]) for p in engine.bundle.points if samples[p.graphs]}
    return DeviceTimes(
        head_ms=head,
        local_ms=_quantiles(local) if local else None,
        offload_ms={name: _quantiles(values) for name, values in offloads.items() if values},
    )


def name_of(o: OffloadOption) -> str:
    """The name of the controller's choice that an option is offered as."""
    return Offload(format=o.format, quality=o.quality, size_px=o.size_px).name


def _quantiles(values: list[float]) -> Quantiles:
    return Quantiles(p50=float(np.median(values)), p95=float(np.quantile(values, 0.95)))


def _device_id() -> str:
    return f"{platform.machine()}-{os.cpu_count()}"


def _to_json(times: DeviceTimes) -> dict[str, object]:
    local = [times.local_ms.p50, times.local_ms.p95] if times.local_ms else None
    return {
        "head_ms": {str(i): [q.p50, q.p95] for i, q in times.head_ms.items()},
        "offload_ms": {name: [q.p50, q.p95] for name, q in times.offload_ms.items()},
        "local_ms": local,
    }


def _read(file: Path) -> DeviceTimes | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        head = {int(i): Quantiles(p50=a, p95=b) for i, (a, b) in data["head_ms"].items()}
        offload = {str(name): Quantiles(p50=a, p95=b) for name, (a, b) in data["offload_ms"].items()}
        local = Quantiles(p50=data["local_ms"][0], p95=data["local_ms"][1]) if data["local_ms"] else None
    except (OSError, ValueError, KeyError, TypeError, BundleError):
        return None
    return DeviceTimes(head_ms=head, local_ms=local, offload_ms=offload)


def make_controller(engine: Engine, times: DeviceTimes, *, fps: float, explain: bool = False) -> Controller:
    """The controller of one bundle on this device."""
    points = believable(engine.bundle.points, engine)
    local = engine.bundle.manifest.local
    option = None
    if local is not None and engine.local is not None:
        worst = min(p.accuracy for p in points)
        option = LocalOption(accuracy=local.accuracy or 0.8 * worst, ms=times.local_ms or Quantiles(p50=30.0, p95=60.0))
    config = ControlConfig(fps=min(max(fps, 1.0), 1000.0) if fps else 30.0, initial_bps=_INITIAL_BPS, explain=explain)
    offloads = [replace(o, encode_ms=times.offload_ms.get(name_of(o), o.encode_ms)) for o in engine.bundle.offloads]
    return Controller(config, points, local=option, offloads=offloads, head_ms=times.head_ms)


def believable(points: tuple[OperatingPoint, ...], engine: Engine) -> list[OperatingPoint]:
    """The table with stand-ins where nothing was measured.

    More bits are taken to be a little more accurate, and a payload to be three quarters of its symbols.
    """
    elements = sum(math.prod(shape) for shape in engine.bundle.manifest.latent_shape)
    unmeasured = all(p.accuracy == 0 for p in points)
    order = {p.id: rank for rank, p in enumerate(sorted(points, key=lambda p: (p.bits, p.channels, p.encoders, p.width)))}
    table = []
    for point in points:
        if unmeasured:
            point = replace(point, accuracy=0.7 + 0.01 * min(order[point.id], 25), pareto=True)  # noqa: PLW2901
        if point.payload_bytes.p95 <= 0:
            guess = 0.75 * elements * point.bits / 8 + 32
            point = replace(point, payload_bytes=Quantiles(p50=guess, p95=guess))  # noqa: PLW2901
        table.append(point)
    return table
