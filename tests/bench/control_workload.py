"""Measures what the control bench needs of a bundle, and writes it as one workload file.

    splitters evaluate BUNDLE --images PHOTOS --labels LABELS.json        # points, offload options, local model: into the bundle
    python -m tests.bench.control_workload --bundle BUNDLE --images PHOTOS --out tests/bench/workloads/NAME.json

Bytes and accuracies are the bundle's own measurements. Measured here, on one thread and in turns so that disturbances hit all
alike, is time: every choice of the device through the client's own code, captured frame to payload or answer, and the server's
decoding, tail and whole model, one frame at a time. It is processor time of the lower decile, so that other work on the machine
counts as little as may be; it still fights for caches and for the other half of a core. Where the bundle's table was measured on
a quieter machine, the device's times are scaled to it: the heads alone are clocked beside the rest, and tell the factor. For two
workloads to share a machine, measure them one after the other and give the second the first one's factor (``--factor``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np

from edge_client.device.choices import measured_points
from edge_client.device.engine import Engine
from edge_server.frames.decode import decode_image
from protos.errors import ConfigError
from splitters.bundle import Bundle, open_bundle
from splitters.bundle.operating_point import OperatingPoint
from splitters.tasks.preprocess import Frame, normalise

_WARM, _ROUNDS = 3, 2
_ALONE = " alone"


def quantiles(ms: list[float]) -> dict[str, float]:
    """What an undisturbed run takes, and p95 in proportion, in milliseconds."""
    undisturbed, p50, p95 = np.quantile(ms, [0.1, 0.5, 0.95])
    return {"p50": round(float(undisturbed), 3), "p95": round(float(undisturbed * p95 / p50), 3)}


def clocked(jobs: dict[str, Callable[[Frame], object]], frames: list[Frame]) -> dict[str, dict[str, float]]:
    """Every job on every frame, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for i, frame in enumerate(frames * _ROUNDS):
        for name, job in jobs.items():
            begin = time.thread_time()
            job(frame)
            if i >= _WARM:
                taken[name].append((time.thread_time() - begin) * 1e3)
    return {name: quantiles(ms) for name, ms in taken.items()}


def device_jobs(engine: Engine) -> dict[str, Callable[[Frame], object]]:
    """What the device may have to do with a frame, by the controller's names; points with the same graphs cost the same."""
    jobs: dict[str, Callable[[Frame], object]] = {}
    image = normalise(np.zeros((*engine.bundle.manifest.preprocess.size_px, 3), np.uint8), engine.bundle.manifest.preprocess)
    for point in {p.graphs: p for p in engine.bundle.points}.values():
        jobs["+".join(point.graphs) + _ALONE] = lambda _, p=point: engine.head.latents(engine.head.stem([image]), p.graphs)  # type: ignore[misc]
        jobs["+".join(point.graphs)] = lambda f, p=point: engine.encode(engine.features(f), p)  # type: ignore[misc]
    for o in engine.bundle.offloads:
        jobs[f"{o.format} {o.quality} {o.size_px}"] = lambda f, o=o: engine.compress(  # type: ignore[misc]
            engine.picture(f), o.format, o.quality, o.size_px
        )
    local = engine.local
    if local is not None:
        jobs["local"] = lambda f: local.answer(local.prepare(f), (f.shape[1], f.shape[0]))
    return jobs


def scaled(
    times: dict[str, dict[str, float]], points: tuple[OperatingPoint, ...], given: float | None = None
) -> tuple[dict[str, dict[str, float]], float]:
    """Times as on the machine that measured the table, and the median's factor; each quantile has its own, the heads' median.

    With a factor ``given`` both quantiles have that.
    """
    factors = {}
    for quantile in ("p50", "p95"):
        heads = [(getattr(p.head_ms, quantile), times["+".join(p.graphs) + _ALONE][quantile]) for p in points]
        factors[quantile] = min(1.0, float(np.median([told / found for told, found in heads]))) if heads[0][0] > 0 else 1.0
        factors[quantile] = factors[quantile] if given is None else given
    rows = {
        name: {quantile: round(ms * factors[quantile], 3) for quantile, ms in q.items()}
        for name, q in times.items()
        if not name.endswith(_ALONE)
    }
    return {name: {"p50": q["p50"], "p95": max(q.values())} for name, q in rows.items()}, factors["p50"]


def server_times(bundle: Bundle, engine: Engine, frames: list[Frame]) -> dict[str, object]:
    """Decoding, tail and whole model."""
    import torch

    from splitters.runtime.tail import load_tail  # torch: only when it is needed

    torch.set_num_threads(1)
    tail = load_tail(bundle)
    size = bundle.manifest.preprocess.size_px
    point = max(bundle.points, key=lambda p: p.payload_bytes.p50)
    payloads = {id(f): engine.encode(engine.features(f), point).payloads for f in frames}
    symbols = {id(f): engine.codec.decode(list(payloads[id(f)])) for f in frames}
    jpegs = {id(f): engine.compress(engine.picture(f), "jpeg", 80).payloads[0] for f in frames}
    jobs: dict[str, Callable[[Frame], object]] = {
        "decode": lambda f: engine.codec.dequantise(engine.codec.decode(list(payloads[id(f)]))),
        "tail": lambda f: tail.run([t[None] for t in engine.codec.dequantise(symbols[id(f)])], [(f.shape[1], f.shape[0])]),
    }
    if tail.takes_images:
        jobs["whole"] = lambda f: tail.run_images([engine.input_image(f)], [(f.shape[1], f.shape[0])])
        jobs["decode image"] = lambda f: decode_image(jpegs[id(f)], size, 1 << 24)
    found = clocked(jobs, frames)
    return {"tail_ms": found["tail"], "whole_ms": found.get("whole", found["tail"]), "decode_ms": found["decode"]["p50"]}


def _point(p: OperatingPoint, times: dict[str, dict[str, float]]) -> dict[str, object]:
    return {**p.to_json(), "head_ms": times["+".join(p.graphs)]}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of photos, used for their sizes and for timing")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--factor", type=float, help="of the device's times, another workload's; default: this bundle's own")
    parser.add_argument("--result-bytes", type=int, default=180, help="of one answer on the wire")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    bundle = open_bundle(args.bundle)
    engine = Engine(bundle, clock=time.monotonic_ns)
    if any(p.accuracy <= 0 for p in bundle.points):
        raise ConfigError(f"{args.bundle} was never measured: run `splitters evaluate` on it")
    files = sorted(f for f in args.images.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = [files[i * len(files) // args.frames] for i in range(min(args.frames, len(files)))]
    frames = [f.astype(np.uint8, copy=False) for c in chosen if (f := cv2.imread(str(c))) is not None]
    times, factor = scaled(clocked(device_jobs(engine), frames), bundle.points, args.factor)
    local = bundle.manifest.local
    workload = {
        "name": bundle.manifest.name,
        "_measured": {
            "bundle_sha256": bundle.sha256,
            "command": "python -m tests.bench.control_workload",
            "frames": len(frames),
            "device_factor": round(factor, 3),
        },
        "points": [_point(p, times) for p in measured_points(engine)],
        "offloads": [{**asdict(o), "encode_ms": times[f"{o.format} {o.quality} {o.size_px}"]} for o in bundle.offloads],
        "local": {"accuracy": local.accuracy, "ms": times["local"]} if local is not None and local.accuracy > 0 else None,
        "server": server_times(bundle, engine, frames),
        "result_bytes": args.result_bytes,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(workload, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"points": len(bundle.points), "offloads": len(bundle.offloads), "device_ms": times,
                      "local": workload["local"], "server": workload["server"]}))  # fmt: skip


if __name__ == "__main__":
    main()
