"""Encoder time of every tier beside the whole model, as the device runs them: ONNX Runtime, one thread, in turns.

    python -m tests.bench.encoder_ms --bundle efficientnet-lite0

Each round runs the whole model once and every tier's head (stem included) once, so a busy moment hits all alike; the
ratio is that of medians. `switch_ms` is what the first frame after a change of tier costs more than the next one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from splitters.bundle import open_bundle
from splitters.cutting.onnx_export import export_onnx
from splitters.runtime.head import Head
from splitters.runtime.sessions import open_graph
from splitters.zoo.defaults import ensure_exported
from splitters.zoo.efficientnet_lite0.network import load_efficientnet_lite0


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="efficientnet-lite0")
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    bundle = open_bundle(Path(args.bundle) if Path(args.bundle).is_dir() else ensure_exported(args.bundle))
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.onnx"
        export_onnx(load_efficientnet_lite0(), [torch.from_numpy(image)], path, inputs=["image"], outputs=["logits"])
        whole = open_graph(path)
    head = Head(bundle)
    tiers = {point.graphs: point for point in bundle.points}
    taken: dict[str, list[float]] = {"whole": [], "stem": []} | {"+".join(g): [] for g in tiers}
    switch: list[float] = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        whole([image])
        taken["whole"].append(time.perf_counter() - start)
        start = time.perf_counter()
        head.stem([image])
        taken["stem"].append(time.perf_counter() - start)
        for graphs, point in tiers.items():
            times = []
            for _ in range(2):
                start = time.perf_counter()
                head.latents(head.stem([image]), point.graphs)
                times.append(time.perf_counter() - start)
            taken["+".join(graphs)].append(times[1])
            switch.append(times[0] - times[1])
    ms = {name: float(np.median(values)) * 1e3 for name, values in taken.items()}
    least = {name: float(np.min(values)) * 1e3 for name, values in taken.items()}
    for name, value in ms.items():
        shares = 100 * value / ms["whole"], 100 * least[name] / least["whole"]
        print(f"{name:16s} {value:7.3f} ms  {shares[0]:5.1f} %   least {least[name]:.3f} ms {shares[1]:.1f} %")
    ratios = {name: value / ms["whole"] for name, value in ms.items()}
    print(json.dumps({"median_ms": ms, "least_ms": least, "of_whole": ratios, "switch_ms_p50": float(np.median(switch)) * 1e3}))


if __name__ == "__main__":
    main()
