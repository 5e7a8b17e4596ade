"""Head times in the committed tables of published files, measured again on this machine, which should do nothing else.

    HEADTAIL_WEIGHTS=DATA/weights python -m tests.bench.prepared_times [NAME…] [--rounds 300]

Bytes and accuracy do not depend on the machine and stay. The heads run in turns, as the device runs them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from splitters.bundle.operating_point import Quantiles, dump_points, load_points
from splitters.runtime.head import Head
from splitters.zoo.by_address import PREPARED, export_published


def main() -> None:
    """Measures, writes the tables, and prints what was and what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(p.name for p in PREPARED.iterdir()))
    parser.add_argument("--rounds", type=int, default=300)
    args = parser.parse_args()
    taken: dict[str, list[Quantiles]] = {name: [] for name in args.names}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {name: export_published(name, Path(folder) / name) for name in args.names}
        heads = {name: Head(bundle) for name, bundle in bundles.items()}
        for _ in range(5):
            for name, head in heads.items():
                size = bundles[name].manifest.preprocess.size_px
                noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
                taken[name] += head.times_ms(noise, [()], rounds=args.rounds // 5).values()
    for name, turns in taken.items():
        table = PREPARED / name / "operating_points.json"
        points = load_points(table.read_text(encoding="utf-8"))
        best = min(turns, key=lambda q: q.p50)  # what else the machine does only ever adds
        print(f"{name}: head {points[0].head_ms.p50:.2f} ms (p95 {points[0].head_ms.p95:.2f}) before, {best.p50:.2f} "
              f"({best.p95:.2f}) now; turns {', '.join(f'{q.p50:.2f}' for q in turns)}; load {os.getloadavg()[0]:.1f}")  # fmt: skip
        table.write_text(dump_points([replace(p, head_ms=best) for p in points]), encoding="utf-8")


if __name__ == "__main__":
    main()
