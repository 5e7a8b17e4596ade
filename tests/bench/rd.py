"""Bytes at equal accuracy on imagenette val: the default bundle's operating points beside JPEG, WebP and AVIF.

    python -m tests.bench.rd --data $HEADTAIL_DATA --plot docs/figures/rd_efficientnet_lite0.png

Top-1 is 1000-way. The image codecs' results are cached, so a second call takes minutes less. `--agreement DIR` adds top-1
agreement with the whole model on other photos, for three points: the most accurate, a middle one and the smallest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from splitters.bundle import Bundle, cache_dir, open_bundle, rewrite_points
from splitters.evaluation.plot import plot
from splitters.evaluation.run import EvaluateConfig, dump, evaluate
from splitters.zoo.defaults import ensure_exported


def imagenette_labels(folder: Path, index: Path) -> dict[str, int]:
    """File name to index among the 1,000 ImageNet classes, for photos that lie in one folder a class."""
    classes: dict[str, int] = json.loads(index.read_text(encoding="utf-8"))
    return {photo.name: classes[photo.parent.name] for photo in folder.rglob("*.JPEG")}


def agreement(bundle: Bundle, images: Path, ids: list[int]) -> dict[int, tuple[float, float]]:
    """Top-1 agreement with the whole model and mean bytes, of a few points."""
    few = replace(bundle, points=tuple(p for p in bundle.points if p.id in ids))
    report = evaluate(few, EvaluateConfig(images=images, against=()))
    return {p.id: (p.accuracy, p.payload_bytes.p50) for p in report.points}


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", default="efficientnet-lite0")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--agreement", type=Path, metavar="DIR")
    parser.add_argument("--write", action="store_true", help="rewrite the bundle's operating points")
    args = parser.parse_args()
    bundle = open_bundle(Path(args.bundle) if Path(args.bundle).is_dir() else ensure_exported(args.bundle))
    photos = args.data / "imagenette160" / "val"
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.json"
        labels.write_text(
            json.dumps(imagenette_labels(photos, args.data / "imagenette160" / "imagenet_class_index.json")), encoding="utf-8"
        )
        config = EvaluateConfig(images=photos, labels=labels, limit=args.limit, cache=cache_dir() / "evaluations")
        report = evaluate(bundle, config, tick=lambda what: print(" ", what, flush=True))
    frontier = sorted((p for p in report.points if p.pareto), key=lambda p: p.payload_bytes.p50)
    told = report.to_json()
    told["frontier"] = [[p.id, *p.graphs, p.payload_bytes.p50, p.head_ms.p50, p.accuracy] for p in frontier]
    if args.agreement is not None:
        ids = [max(frontier, key=lambda p: p.accuracy).id, frontier[len(frontier) // 2].id, frontier[0].id]
        told["agreement"] = agreement(bundle, args.agreement, ids)
    if args.plot is not None:
        plot(report, args.plot)
    if args.report is not None:
        dump(report, args.report)
    if args.write:
        rewrite_points(bundle, report.points)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
