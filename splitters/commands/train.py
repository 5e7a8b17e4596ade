"""``splitters train RECIPE --data DIR --out DIR``: a slimmable bottleneck for a cut, from unlabelled photographs."""

from __future__ import annotations

import argparse
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from protos.errors import ConfigError

if TYPE_CHECKING:
    from splitters.train.config import TrainConfig


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "train",
        help="train a slimmable bottleneck for a cut",
        description="Distils an encoder, a decoder and frozen probability tables for a model's cut from a folder of photographs; "
        "no labels needed. "
        "Ctrl-C saves and stops; the same command goes on from there. `splitters export OUT` turns the run into a bundle.",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="efficientnet-lite0, efficientnet-lite0-single, or any (with --model and --at)"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--out", type=Path, required=True, help="run directory: checkpoints, then weights and tables")
    parser.add_argument("--model", help="recipe any: timm:NAME, torchvision:NAME, onnx:PATH or py:MODULE:FACTORY")
    parser.add_argument("--weights", default="hub", metavar="random|hub|FILE", help="of --model (default: %(default)s)")
    parser.add_argument("--at", help="recipe any: the cut, crossed by one feature map (`splitters profile` lists them)")
    parser.add_argument("--stem-at", default="", help="recipe any: an earlier cut whose map cheaper encoders start from")
    parser.add_argument(
        "--match", nargs="+", default=[], metavar="NAME", help="recipe any: later cuts where the student is matched to the teacher"
    )
    parser.add_argument(
        "--task", choices=("classification", "detection"), default="classification", help="recipe any (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=224, help="recipe any: side of the training crops, px (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="scale the recipe's stages to so many steps in total")
    parser.add_argument("--batch", type=int, help="photos a step")
    parser.add_argument("--hold-out", type=int, help="photos kept for dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (mixed precision there)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--cache", type=Path, help="where decoded photos lie (default: in OUT)")
    parser.add_argument("--fit", type=int, default=240, help="photos the probability tables are fitted on (default: %(default)s)")
    parser.add_argument("--tag", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def _config(args: argparse.Namespace) -> TrainConfig:
    from splitters.train.recipes import any_cut, recipe

    if args.recipe == "any":
        if not args.model or not args.at:
            raise ConfigError("the recipe any needs --model and --at; `splitters profile MODEL` lists the cuts")
        config = any_cut(
            args.model, args.at, stem_at=args.stem_at, match=tuple(args.match), task=args.task, weights=args.weights,
            size_px=args.size, steps=args.steps or 3000,
        )  # fmt: skip
    else:
        config = recipe(args.recipe)
        if args.steps:
            config = replace(
                config, stages=tuple(replace(s, steps=max(1, s.steps * args.steps // config.steps)) for s in config.stages)
            )
    config = replace(config, seed=args.seed)
    if args.batch:
        config = replace(config, batch=args.batch)
    return replace(config, hold_out=args.hold_out) if args.hold_out is not None else config


def run(args: argparse.Namespace) -> int:
    """Trains, with a progress bar."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from splitters.train.loop import StepReport
    from splitters.train.run import run_training

    config = _config(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    stopped: list[int] = []
    last: list[StepReport] = []
    previous = [signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGINT, signal.SIGTERM)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )
    try:
        with Progress(*columns) as bar:
            task = bar.add_task(args.recipe, total=config.steps, told="")

            def on_step(report: StepReport) -> None:
                last[:] = [report]
                told = f"loss {report.loss:.3f}  distortion {report.distortion:.3f}  latent {report.latent:.3f}"
                told += f"  bytes {report.tier_bytes[0]:.0f} … {report.tier_bytes[-1]:.0f}"
                bar.update(task, completed=report.step, told=told)

            run_training(
                config,
                args.data,
                args.out,
                device=args.device,
                on_step=on_step,
                stop=lambda: bool(stopped),
                cache=args.cache,
                fit=args.fit,
            )
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), previous, strict=True):
            signal.signal(number, handler)
    done = last[0].step if last else config.steps
    print(f"{args.out}: {done} of {config.steps} steps; `splitters export {args.out} --out BUNDLE` makes it a bundle")
    if args.json:
        told = {"out": str(args.out), "steps": done, "of": config.steps}
        if last:
            told |= {"loss": last[0].loss, "distortion": last[0].distortion, "tier_bytes": list(last[0].tier_bytes)}
        print(json.dumps(told))
    return 0
