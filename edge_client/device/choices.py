"""What the controller may choose from on this device: the bundle's table, with this device's own times.

``measure`` times every operating point once per device and bundle, in three seconds at most, and the figures are kept in the
cache; where frames show the device's pace to be another, what is kept follows (`DevicePace.lasting`). A table's ``head_ms``
measured elsewhere is only a prior.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from edge_client.control import ControlConfig, Decision, Local, LocalOption, Offload, Policy, Split
from edge_client.device.engine import Engine
from edge_client.extensions import POLICIES, make
from edge_client.frames import NS_PER_MS, NS_PER_S, Clock
from edge_client.gates.interest import read_promise
from protos.errors import BundleError
from protos.schema import read_json
from splitters.bundle import Bundle
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.tasks.preprocess import Frame

log = logging.getLogger(__name__)

# A measured device is optimistic about its link: what does not arrive in time, the local model answers.
_INITIAL_BPS = 20_000_000.0
_BUDGET_NS = 3 * NS_PER_S
_KEPT_TIMES = 64


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

    def scaled(self, factor: float) -> DeviceTimes:
        """On a device that is slower by a factor."""
        return DeviceTimes(
            head_ms={point: ms.scaled(factor) for point, ms in self.head_ms.items()},
            local_ms=self.local_ms.scaled(factor) if self.local_ms else None,
            offload_ms={name: ms.scaled(factor) for name, ms in self.offload_ms.items()},
        )

    def least(self, other: DeviceTimes) -> DeviceTimes:
        """Of two measurements of one device the shorter time for each choice: other work only ever adds to it."""

        def shorter(mine: Quantiles | None, theirs: Quantiles | None) -> Quantiles | None:
            return min((q for q in (mine, theirs) if q is not None), key=lambda q: q.p50, default=None)

        heads = {point: shorter(ms, other.head_ms.get(point)) or ms for point, ms in self.head_ms.items()}
        offloads = {name: shorter(ms, other.offload_ms.get(name)) or ms for name, ms in self.offload_ms.items()}
        return DeviceTimes(head_ms=heads, local_ms=shorter(self.local_ms, other.local_ms), offload_ms=offloads)

    def as_json(self) -> dict[str, object]:
        """As plain JSON types."""
        return asdict(self)


def measure(engine: Engine, *, clock: Clock = time.monotonic_ns) -> DeviceTimes:
    """Runs every graph of the engine once on a test picture, then times them.

    Raises:
        ModelError: a graph fails on a picture.
    """
    picture = _picture(engine)
    features = engine.features(picture, engine.inputs.blank())
    promise = read_promise(engine.bundle)
    # More are no fault: a prefilter's last score may be "anything else", for which nothing is promised.
    if promise is not None and len(engine.head.prefilter_scores(features.maps)) < promise.width:
        raise BundleError(f"the prefilter of {engine.model!r} gives fewer than the {promise.width} scores it promises")
    if engine.local is not None:
        engine.local.answer(engine.local.prepare(picture), (picture.shape[1], picture.shape[0]))
    for point in {p.graphs: p for p in engine.bundle.points}.values():
        engine.encode(features, point)
    return _measure(engine, clock)


def known_times(bundle: Bundle, *, threads: int, cache: Path) -> DeviceTimes | None:
    """What an earlier start measured of this bundle on this device."""
    try:
        return read_json(_times_file(bundle, threads, cache).read_bytes(), DeviceTimes, what="the device's times")
    except (OSError, BundleError):
        return None


def keep_times(times: DeviceTimes, bundle: Bundle, *, threads: int, cache: Path) -> None:
    """For the next start; of the bundles measured longest ago nothing is kept."""
    file = _times_file(bundle, threads, cache)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for old in sorted(cache.iterdir(), key=lambda p: p.stat().st_mtime_ns)[:-_KEPT_TIMES]:
            old.unlink(missing_ok=True)
        temporary.write_text(json.dumps(times.as_json()), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        log.debug("device times are not kept: %s", error)


def _times_file(bundle: Bundle, threads: int, cache: Path) -> Path:
    import onnxruntime

    device = f"{platform.machine()}-{os.cpu_count()}-{threads}t-ort{onnxruntime.__version__}"
    return cache / f"{bundle.sha256}-{device}.json"


def _picture(engine: Engine) -> Frame:
    height, width = engine.bundle.manifest.preprocess.size_px
    return np.random.default_rng(0).integers(0, 255, (height * 5 // 4, width * 5 // 4, 3)).astype(np.uint8)


def _measure(engine: Engine, clock: Clock) -> DeviceTimes:
    picture = _picture(engine)
    height, width = engine.bundle.manifest.preprocess.size_px
    until_ns = clock() + _BUDGET_NS
    heads = {p.graphs: p for p in engine.bundle.points}  # points with the same graphs cost the same
    samples: dict[tuple[str, ...], list[float]] = {graphs: [] for graphs in heads}
    offloads: dict[str, list[float]] = {name_of(o): [] for o in engine.offloads if not o.is_video}
    local: list[float] = []
    for turn in range(8):
        if engine.local is not None:
            _, elapsed_ms = engine.local.answer(engine.local.prepare(picture), (width, height))
            if turn:  # the first run warms up
                local.append(elapsed_ms)
        for graphs, point in heads.items():
            start_ns = clock()
            engine.encode(engine.features(picture, engine.inputs.blank()), point)
            if turn:
                samples[graphs].append((clock() - start_ns) / NS_PER_MS)
            if clock() > until_ns:
                break
        for o in (o for o in engine.offloads if not o.is_video):
            start_ns = clock()
            engine.compress(engine.picture(picture), o.format, o.quality, o.size_px)
            if turn:
                offloads[name_of(o)].append((clock() - start_ns) / NS_PER_MS)
        if clock() > until_ns:
            break
    offloads |= _measure_video(engine, clock)
    engine.inputs.forget()
    head = {p.id: undisturbed(samples[p.graphs]) for p in engine.bundle.points if samples[p.graphs]}
    return DeviceTimes(
        head_ms=head,
        local_ms=undisturbed(local) if local else None,
        offload_ms={name: undisturbed(values) for name, values in offloads.items() if values},
    )


def _measure_video(engine: Engine, clock: Clock) -> dict[str, list[float]]:
    """Milliseconds of predicted frames, by option; of each size one, since the quality hardly tells in time."""
    every = [o for o in engine.offloads if o.is_video]
    height, width = engine.bundle.manifest.preprocess.size_px
    coarse = np.random.default_rng(0).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
    scene = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8, copy=False)
    found: dict[str, list[float]] = {}
    for size_px in dict.fromkeys(o.size_px for o in every):
        same = [o for o in every if o.size_px == size_px]
        taken = []
        for turn in range(8):
            moved = np.roll(scene, 3 * turn, axis=1)
            start_ns = clock()
            engine.video(engine.picture(moved), same[len(same) // 2].quality, size_px, turn or None)
            if turn:
                taken.append((clock() - start_ns) / NS_PER_MS)
        found |= {name_of(o): taken for o in same}
    return found


def undisturbed(values: Sequence[float]) -> Quantiles:
    """What the work takes when nothing else wants the processor, from a few turns of it, some of them disturbed.

    Other work only ever adds time, so the least of the turns is the time itself. The 95 % quantile is taken as far from it as
    twice the median turn is, and at most at twice the time: the pace learnt later says what the device is really like.
    """
    ordered = sorted(values)
    least, middle = ordered[0], ordered[len(ordered) // 2]
    return Quantiles(p50=least, p95=min(least + 2 * (middle - least), 2 * least))


def name_of(o: OffloadOption) -> str:
    """The name of the controller's choice that an option is offered as."""
    return Offload(format=o.format, quality=o.quality, size_px=o.size_px).name


def make_controller(
    engine: Engine,
    times: DeviceTimes,
    *,
    fps: float,
    explain: bool = False,
    policy: str = "adaptive",
    learn_sizes: bool = True,
) -> Policy:
    """The policy of one bundle on this device, by name or as ``module:Class``.

    Raises:
        ConfigError: there is no such policy, or it does not take what it is given.
        BundleError: the bundle's operating points were not measured: nothing says which is better.
    """
    points = measured_points(engine)
    local = engine.bundle.manifest.local
    option = None
    if local is not None and engine.local is not None:
        option = LocalOption(accuracy=local.accuracy, ms=times.local_ms or Quantiles(p50=30.0, p95=60.0))
    config = ControlConfig(
        fps=min(max(fps, 1.0), 1000.0) if fps else 30.0, initial_bps=_INITIAL_BPS, learn_sizes=learn_sizes, explain=explain
    )
    offloads = [replace(o, encode_ms=times.offload_ms.get(name_of(o), o.encode_ms)) for o in engine.offloads]
    made: Policy = make(POLICIES, Policy, policy, config, points, local=option, offloads=offloads, head_ms=times.head_ms)
    return made


def measured_points(engine: Engine) -> tuple[OperatingPoint, ...]:
    """The bundle's table.

    Raises:
        BundleError: it was not measured.
    """
    points = engine.bundle.points
    if any(not p.measured for p in points):
        raise BundleError(
            f"the operating points of bundle {engine.model!r} were never measured, so none can be chosen: export it again with "
            "this release, or run `splitters evaluate` on it where it is served"
        )
    return points
