"""Two replicas against one: how much more a second core brings, with the shares of the processor of everything that ran.

The bundle's tail should take at least 40 ms a frame on one thread, for instance

    splitters cut timm:efficientnet_b4 --weights random --size 320x320 --at blocks.3 --bits 8 4 --out heavy
    python -m tests.bench.replicas --model heavy [--seconds 6] [--rounds 3]

One Ray cluster is started; `edge-server --backend ray --replicas 2 --tail-cpus 0,1` serves with two replicas, each pinned to a
core of its own, and in turns with it another `edge-server` with one replica on core 0. Both are loaded by the same number of
streams with full windows. On a machine of two cores ingress, load and Ray's own processes have to share them with the
replicas; what they took is in ``cores``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edge_server.models import locate
from splitters.bundle import Bundle, open_bundle
from tests.bench.serving_systems import Replay
from tests.fakes.cpu_meter import CpuMeter
from tests.fakes.ray_cluster import cluster
from tests.fakes.server_client import Device, picture
from tests.fakes.server_load import write_frames
from tests.fakes.server_running import child

SHOTS = 4
_FIGURES = ("frames_per_s", "latency_ms_p50", "latency_ms_p99", "tail_ms_p50")


def copied(bundle: Bundle, to: Path) -> Bundle:
    """The same bundle under another name: an application, and replicas, of its own."""
    shutil.copytree(bundle.path, to)
    manifest = json.loads((to / "manifest.json").read_text(encoding="utf-8"))
    manifest["name"] += "-again"
    (to / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return open_bundle(to)


def measure(args: argparse.Namespace, tmp: Path) -> dict[str, Any]:
    """Both in turns."""
    bundles = {2: open_bundle(locate(args.model))}
    bundles[1] = copied(bundles[2], tmp / "again")
    device = Device(bundles[2])
    frames = tmp / "frames.bin"
    write_frames(frames, [device.layers(picture(s, 640, 480), 0) for s in range(SHOTS)])
    pulses: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    cores: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with cluster() as ray:
        common = ["--backend", "ray", "--ray-address", ray.address, "--max-batch", str(args.max_batch), "--cpus-per-replica", "0.5"]
        two = [*common, "--replicas", "2", "--tail-cpus", ",".join(map(str, args.cores))]
        one = [*common, "--replicas", "1", "--tail-cpus", str(args.cores[0])]
        with child(tmp, bundles[2].path, arguments=two) as double, child(tmp, bundles[1].path, arguments=one) as single:
            loads = {}
            for count, server in ((2, double), (1, single)):
                sha = bundles[count].sha256
                line = ["tests.fakes.server_load", server.address, str(frames), "--sha256", sha, "--streams", str(args.streams)]
                loads[count] = Replay([*line, "--window", "2"], ",".join(map(str, args.cores)))
                loads[count].pulse(args.seconds / 2)
            for _ in range(args.rounds):
                for count, load in loads.items():
                    meter = CpuMeter()
                    pulses[count].append(load.pulse(args.seconds))
                    cores[count].append(meter.lap())
            for load in loads.values():
                load.close()
    ratios = [b["frames_per_s"] / a["frames_per_s"] for a, b in zip(pulses[1], pulses[2], strict=True)]
    return {
        "bench": "replicas", "model": bundles[2].manifest.name, "streams": args.streams, "max_batch": args.max_batch,
        **{f"{count}_replica{'s' * (count > 1)}": {
            **{f: round(float(np.median([p[f] for p in pulses[count]])), 2) for f in _FIGURES},
            "errors": sum(sum(p["errors"].values()) for p in pulses[count]), "cores": _median(cores[count]),
        } for count in (1, 2)},
        "ratio": round(float(np.median(ratios)), 3), "ratios": [round(r, 3) for r in ratios],
    }  # fmt: skip


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for row in rows for name in row})
    return {name: round(float(np.median([row.get(name, 0.0) for row in rows])), 2) for name in names}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a bundle whose tail takes 40 ms a frame or more")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each pulse of load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=1, help="frames in one run of the tail; its time is then one frame's")
    parser.add_argument("--cores", type=int, nargs=2, default=sorted(os.sched_getaffinity(0))[:2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        result = measure(args, Path(tmp))
    for count in ("1_replica", "2_replicas"):
        print(count, "  ".join(f"{k} {v}" for k, v in result[count].items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
