"""What slimmability costs: one checkpoint for every operating point against the same recipe trained for a single one.

    python -m tests.bench.penalty --data $HEADTAIL_DATA --start WEIGHTS --out RUNS --steps 300 --points own:3 s:3

All arms go on from the same weights for the same number of equally large steps, once for all points, once for each single point;
what is trained already in RUNS is not trained again. Each is exported with its own tables and judged on the held-out photos of the
training (agreement with the whole model, real payload bytes). A single arm's bytes never quite equal the slimmable one's, so the
latter's accuracy is read at them between its own neighbouring points. `penalty` is single minus slimmable, with the paired 95 %
bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from protos.errors import ConfigError, HeadtailError
from splitters.bundle import Bundle, open_bundle
from splitters.commands.export import measured
from splitters.evaluation.bdrate import Curve, front, interval
from splitters.evaluation.run import EvaluateConfig, evaluate
from splitters.exporting.learned import RECIPE_FILE, tier_graphs
from splitters.training.config import TrainConfig
from splitters.training.recipes import recipe
from splitters.training.run import run_training
from splitters.training.single import parse_point
from splitters.zoo.efficientnet_lite0.export import export_learned
from splitters.zoo.efficientnet_lite0.split import TIERS


def train(config: TrainConfig, data: Path, out: Path, cache: Path) -> None:
    """Trains an arm to its end unless it is there already."""
    done = out / RECIPE_FILE
    if not done.exists() or json.loads(done.read_text(encoding="utf-8"))["steps"] < config.steps:
        run_training(config, data, out, cache=cache, fit=100)


def dev_curve(bundle: Bundle, arm: Path, tier: int) -> Curve:
    """One encoder tier's measured points on the photos that training held out: top-1 agreement with the whole model."""
    photos = [Path(p) for p in json.loads((arm / "dev.json").read_text(encoding="utf-8"))]
    if len(photos) < 2:
        raise ConfigError(f"{len(photos)} photos were held out in {arm}: give --hold-out, or more photos")
    graphs = tier_graphs(TIERS[tier])
    few = replace(bundle, points=tuple(p for p in bundle.points if p.graphs == graphs))
    with tempfile.TemporaryDirectory() as folder:
        for number, photo in enumerate(photos):
            (Path(folder) / f"{number:05}{photo.suffix}").symlink_to(photo.resolve())
        report = evaluate(few, EvaluateConfig(images=Path(folder), against=()), tick=lambda _: None)
    return report.curves[0]


def read_at(points: np.ndarray[tuple[int, int], np.dtype[np.float64]], size: float) -> float:
    """Accuracy of the non-dominated ``points`` (P, 2) at ``size`` bytes, linear in log-bytes; the nearest end's outside."""
    kept = front(points)
    return float(np.interp(np.log(size), np.log(kept[:, 0]), kept[:, 1]))


def penalty(slim: Curve, single: Curve) -> dict[str, float | list[float]]:
    """Accuracy of a single-point arm minus the slimmable one's at the same bytes."""
    size, accuracy = (float(v) for v in single.points()[0])
    same = read_at(slim.points(), size)
    drawn = [
        one[0, 1] - read_at(many, float(one[0, 0])) for one, many in zip(single.drawn_points(), slim.drawn_points(), strict=True)
    ]
    low, high = interval(np.array(drawn))
    return {"bytes": size, "single": accuracy, "slimmable": same, "penalty": accuracy - same, "interval": [low, high]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="folder with trained weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--points", nargs="+", default=["own:3", "s:3"], metavar="TIER:GAIN")
    parser.add_argument("--recipe", default="efficientnet-lite0-joint")
    parser.add_argument("--batch", type=int, help="photos a step (default: the recipe's)")
    parser.add_argument("--hold-out", type=int, help="photos kept for judging (default: the recipe's)")
    parser.add_argument("--cache", type=Path, help="decoded photos (default: in OUT)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    try:
        measure_penalty(args)
    except HeadtailError as error:
        parser.exit(error.exit_code, f"{error.message}\n")


def measure_penalty(args: argparse.Namespace) -> None:
    """Trains what is missing, measures, prints one JSON line."""
    torch.set_num_threads(args.threads)
    config = recipe(args.recipe)
    config = replace(config, start=str(args.start), stages=(replace(config.stages[-1], steps=args.steps),))
    if args.batch:
        config = replace(config, batch=args.batch)
    if args.hold_out is not None:
        config = replace(config, hold_out=args.hold_out)
    arms = {"slimmable": config} | {point: replace(config, single=point) for point in args.points}
    told: dict[str, object] = {"steps": args.steps, "recipe": args.recipe}
    bundles = {}
    for name, arm in arms.items():
        out = args.out / name.replace(":", "-")
        train(arm, args.data, out, args.cache or args.out / "photos")
        if not (out / "bundle").exists():
            export_learned(out / "bundle", out, partial(measured, run=out))
        bundles[name] = open_bundle(out / "bundle")
        print(f"  {name} is trained", flush=True)
    for point in args.points:
        tier, _ = parse_point(point)
        curves = [dev_curve(bundles[name], args.out / name.replace(":", "-"), tier) for name in ("slimmable", point)]
        told[point] = penalty(*curves)
        print(f"  {point}: {told[point]}", flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
