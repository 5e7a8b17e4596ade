"""What a simulated device can choose from: a bundle's measured table, offload settings, the local model, times."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deploy.testbed.clip import ClipSizes, measure_clip
from edge_client.control import LocalOption, OffloadOption
from edge_client.device.choices import DeviceTimes, keep_times, known_times, measure, measured_points, name_of
from edge_client.device.engine import Engine
from protos.errors import ConfigError
from splitters.bundle import cache_dir, open_bundle
from splitters.bundle.offload import offload_from_json
from splitters.bundle.operating_point import OperatingPoint, Quantiles


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTimes:
    """Milliseconds one frame takes on the server.

    Attributes:
        tail_ms: a split frame's tail, alone in its batch.
        whole_ms: the whole model, for offloaded frames.
        decode_ms: payload to latent, or JPEG to pixels.
        marginal: time of each further frame of a batch, as a share of the first one's.
        max_batch: frames.
    """

    tail_ms: Quantiles = field(default_factory=lambda: Quantiles(p50=8.0, p95=12.0))
    whole_ms: Quantiles = field(default_factory=lambda: Quantiles(p50=10.0, p95=15.0))
    decode_ms: float = 1.0
    marginal: float = 0.35
    max_batch: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One model: points, offload options and local model in one accuracy metric, and the times measured beside them.

    Device times are those of the machine that measured; ``slowed`` multiplies them. Where there is a
    ``clip``, payloads are as large as its frames' are; else their sizes are drawn from the table.
    """

    name: str
    points: tuple[OperatingPoint, ...]
    offloads: tuple[OffloadOption, ...] = ()
    local: LocalOption | None = None
    server: ServerTimes = field(default_factory=ServerTimes)
    result_bytes: int = 300
    clip: ClipSizes | None = None

    def slowed(self, factor: float) -> Workload:
        """The same on a device ``factor`` times slower."""
        if factor <= 0:
            raise ConfigError(f"device_slowdown must be above 0, got {factor}")
        return replace(
            self,
            points=tuple(replace(p, head_ms=p.head_ms.scaled(factor)) for p in self.points),
            offloads=tuple(replace(o, encode_ms=o.encode_ms.scaled(factor)) for o in self.offloads),
            local=replace(self.local, ms=self.local.ms.scaled(factor)) if self.local else None,
        )


def load_workload(path: Path) -> Workload:
    """Reads a workload: a bundle directory, or a JSON file of ``Workload``'s fields.

    A bundle's operating points, offload options and local model come with their measured bytes and accuracy; what each takes
    on this machine is measured now, as the client does at its start, in processor time. The shortest times of all such
    measurements are kept in a cache, and are what is taken.

    Raises:
        ConfigError: missing or malformed.
        BundleError: no bundle, or an altered one.
    """
    if path.is_dir():
        return _of_bundle(path)
    try:
        return parse_workload(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"workload {path} cannot be read: {type(error).__name__}: {error}") from error


def find_workload(name: str) -> Workload:
    """A workload by a default model's name (exported if need be), a bundle's directory or a workload's JSON file."""
    return load_workload(_bundle_path(name))


def _bundle_path(name: str) -> Path:
    path = Path(name)
    if not path.exists():
        from splitters.bundle import exported_path

        path = exported_path(name)
        if not path.exists():
            from splitters.zoo.defaults import ensure_exported

            path = ensure_exported(name)
    return path


def with_clip(workload: Workload, name: str, clip: Path, *, fps: float, frames: int) -> Workload:
    """The workload of a bundle with the sizes that a clip's frames have; ``name`` as for ``find_workload``.

    Raises:
        ConfigError: the workload is no bundle's.
        SourceError: the clip cannot be read.
    """
    path = _bundle_path(name)
    if not path.is_dir():
        raise ConfigError(f"a clip is encoded with a bundle; {name} is none")
    return replace(workload, clip=measure_clip(open_bundle(path, side="device"), clip, fps=fps, frames=frames))


def _of_bundle(path: Path) -> Workload:
    clock = time.thread_time_ns  # the thread's own processor time: what else this machine does is not the device's affair
    engine = Engine(open_bundle(path, side="device"), clock=clock)
    cache = cache_dir() / "testbed-times"
    times, known = measure(engine, clock=clock), known_times(engine.bundle, threads=1, cache=cache)
    times = times.least(known) if known is not None else times
    keep_times(times, engine.bundle, threads=1, cache=cache)
    return workload_of(engine, times)


def workload_of(engine: Engine, times: DeviceTimes) -> Workload:
    """What an opened bundle offers, with a device's times; the server's are the default ones."""
    bundle, points = engine.bundle, measured_points(engine)
    stills = [o for o in bundle.offloads if not o.is_video]  # simulation knows no frames that depend on each other but latents
    spec = bundle.manifest.local
    local = None
    if spec is not None and times.local_ms is not None:
        local = LocalOption(accuracy=spec.accuracy or 0.8 * min(p.accuracy for p in points), ms=times.local_ms)
    return Workload(
        name=bundle.manifest.name,
        points=tuple(replace(p, head_ms=times.head_ms.get(p.id, p.head_ms)) for p in points),
        offloads=tuple(replace(o, encode_ms=times.offload_ms.get(name_of(o), o.encode_ms)) for o in stills),
        local=local,
    )


def parse_workload(data: Mapping[str, Any]) -> Workload:
    """From plain JSON types; keys that start with an underscore are remarks."""
    server: dict[str, Any] = {k: Quantiles(**v) if isinstance(v, dict) else v for k, v in data.get("server", {}).items()}
    local = data.get("local")
    return Workload(
        name=data["name"],
        points=tuple(OperatingPoint.from_json(p) for p in data["points"]),
        offloads=tuple(offload_from_json(o) for o in data.get("offloads", ())),
        local=LocalOption(accuracy=local["accuracy"], ms=Quantiles(**local["ms"])) if local else None,
        server=ServerTimes(**server),
        result_bytes=int(data.get("result_bytes", 300)),
    )
