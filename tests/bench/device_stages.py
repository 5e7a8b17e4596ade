"""What one frame costs on the device, stage by stage: change gate, resizing, stem, prefilter, encoder, codec.

``python -m tests.bench.device_stages --data $HEADTAIL_DATA --bundle detector [--points 0 5]``

Frames of the car-park video, one ONNX Runtime thread, medians. The points default to the dearest and cheapest heads. A frame that
the gate stops pays for the gate; one that the prefilter stops for gate, resizing, stem and prefilter. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from edge_client.device.engine import Engine
from edge_client.gates.change import ChangeGate
from splitters.bundle import open_bundle
from splitters.bundle.operating_point import OperatingPoint
from splitters.evaluation.gating.scene import read_video
from splitters.zoo.defaults import ensure_exported


def default_points(points: tuple[OperatingPoint, ...]) -> list[OperatingPoint]:
    """The finest point of the dearest head and the coarsest of the cheapest."""
    dearest = max(points, key=lambda p: (p.head_ms.p50, p.payload_bytes.p50))
    return [dearest, min(points, key=lambda p: (p.head_ms.p50, p.payload_bytes.p50))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADTAIL_DATA"), required="HEADTAIL_DATA" not in os.environ)
    parser.add_argument("--bundle", default="detector")
    parser.add_argument("--points", type=int, nargs="+")
    parser.add_argument("--frames", type=int, default=60)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    bundle = open_bundle(Path(args.bundle) if Path(args.bundle).is_dir() else ensure_exported(args.bundle))
    points = [bundle.point(i) for i in args.points] if args.points else default_points(bundle.points)
    engine, gate = Engine(bundle, clock=time.perf_counter_ns, threads=1), ChangeGate()
    frames = list(islice(read_video(Path(args.data) / "video/person-bicycle-car-detection.mp4")[0], args.frames))
    taken: dict[str, list[float]] = {}

    def note(stage: str, ms: float) -> None:
        taken.setdefault(stage, []).append(ms)

    for frame in frames:
        start = time.perf_counter_ns()
        gate.changed(frame, start)
        note("gate", (time.perf_counter_ns() - start) / 1e6)
        features = engine.features(frame)
        note("resize", features.preprocess_ns / 1e6)
        note("stem", features.stem_ns / 1e6)
        if bundle.manifest.head.prefilter is not None:
            start = time.perf_counter_ns()
            engine.head.prefilter_scores(features.maps)
            note("prefilter", (time.perf_counter_ns() - start) / 1e6)
        for point in points:
            stages = engine.encode(features, point).stages_ms
            note(f"encoder, point {point.id}", stages["head"] - features.stem_ns / 1e6)
            note(f"codec, point {point.id}", stages["codec"])
    ms = {stage: float(np.median(values[5:])) for stage, values in taken.items()}
    shared = sum(v for stage, v in ms.items() if "point" not in stage)
    totals = {p.id: shared + ms[f"encoder, point {p.id}"] + ms[f"codec, point {p.id}"] for p in points}
    shares = {
        p.id: {
            s.split(",")[0]: round(v / totals[p.id], 4) for s, v in ms.items() if "point" not in s or s.endswith(f"point {p.id}")
        }
        for p in points
    }
    for stage, value in ms.items():
        print(f"{stage:22} {value:7.2f} ms")
    report = {
        "bench": "device_stages", "model": bundle.manifest.name, "ms_p50": {s: round(v, 3) for s, v in ms.items()},
        "total_ms": {i: round(v, 2) for i, v in totals.items()}, "share": shares,
        "stopped_by_prefilter_share": {i: round(shared / v, 4) for i, v in totals.items()},
        "graphs": {p.id: list(p.graphs) for p in points},
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
