"""``splitters train RECIPE --data DIR --out DIR``: a slimmable bottleneck for a cut, from unlabelled photographs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import ConfigError
from protos.messages import Detection
from splitters.commands.common.progress import Progress
from splitters.commands.common.serving_arguments import AUTO, UNKNOWN_LICENCE, add_serving_arguments, described
from splitters.commands.cut import read_photos
from splitters.commands.train_detector import add_detector, train_detector
from splitters.tasks.base import form_of

if TYPE_CHECKING:
    from splitters.bottleneck.raw_outputs import Scores
    from splitters.bundle import Bundle
    from splitters.training.config import TrainConfig
    from splitters.training.loop import StepReport
    from splitters.training.run import Trained


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "train",
        help="train a slimmable bottleneck for a cut",
        description="Distils an encoder, a decoder and frozen probability tables for a model's cut from a folder of photographs; "
        "no labels needed. Ctrl-C saves and stops; the same command goes on from there. With --bundle the finished run becomes a "
        "bundle, its operating points measured on the photos held out; `splitters export OUT` does that later.",
    )
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="efficientnet-lite0, its -joint (goes on from --start), any (with --model, --at), or detector: our small "
        "detector itself",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--out", type=Path, required=True, help="run directory: checkpoints, then weights and tables")
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="write the measured bundle there after the last step: servers and clients run it"
    )
    parser.add_argument("--data-parts", nargs="+", default=[], metavar="DIR", help="recipe any: only these folders of --data")
    parser.add_argument("--steps", type=int, help="scale the recipe's stages to this many steps in total")
    parser.add_argument(
        "--seconds", type=float, metavar="N",
        help="the run ends by itself after this time of training, if not by its steps before, and the learning rate follows "
        "(default: by its steps alone; detector: 5400, reading of photos included)",
    )  # fmt: skip
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="efficientnet-lite0, any: go on from this run's or folder's weights"
    )
    parser.add_argument(
        "--single-point",
        default="",
        metavar="TIER:GAIN",
        help="efficientnet-lite0: train this point alone (own:3), from --start",
    )
    parser.add_argument("--batch", type=int, help="photos a step")
    parser.add_argument("--hold-out", type=int, help="photos kept for dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (mixed precision there)")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--cache", type=Path, help="where decoded photos lie (default: in OUT)")
    parser.add_argument("--fit", type=int, default=240, help="photos the probability tables are fitted on (default: %(default)s)")
    _add_any(parser)
    add_detector(parser)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def _add_any(parser: argparse.ArgumentParser) -> None:
    group: Any = parser.add_argument_group("recipe any", "a bottleneck for any model at any cut")
    group.add_argument("--model", help="timm:NAME, torchvision:NAME, onnx:PATH or py:MODULE:FACTORY")
    group.add_argument("--weights", default="hub", metavar="random|hub|FILE", help="of --model (default: %(default)s)")
    group.add_argument("--at", help="the cut (`splitters profile` lists them); any number of tensors may cross it")
    group.add_argument("--stem-at", default="", help="an earlier cut, crossed by one map, from which cheaper encoders start")
    group.add_argument(
        "--match", nargs="+", default=[], metavar="NAME",
        help="later cuts where the student is matched to the teacher (default: three, spread over the tail)",
    )  # fmt: skip
    group.add_argument("--task", choices=("classification", "detection"), default="classification", help="(default: %(default)s)")
    group.add_argument("--size", type=int, help="side of the training crops, px (default: the model's own input)")
    group.add_argument("--channels", type=int, help="of the latent (default: 32, detection 144)")
    group.add_argument(
        "--shrink", type=int, default=0, metavar="N",
        help="the latent is N times coarser than the coarsest map that crosses (default: as makes it 1/16 of the input)",
    )  # fmt: skip
    group.add_argument("--bytes", type=float, nargs="+", default=[], metavar="N", help="payload of each gain tier, finest first")
    group.add_argument(
        "--video", type=Path, nargs="+", default=[], metavar="FILE",
        help="learn from neighbouring frames of these clips too, and from photos moved as a camera would see them: what a "
        "predicted frame costs joins the loss, and its tables are fitted on the clips",
    )  # fmt: skip
    group.add_argument(
        "--video-until", type=float, default=0.5, metavar="SHARE", help="of each clip, from its start (default: %(default)s)"
    )
    group.add_argument(
        "--amp", action="store_true", help="half precision in the student on the processor too (a GPU always has it)"
    )
    add_serving_arguments(group)


def _any(args: argparse.Namespace) -> TrainConfig:
    from torch import nn

    from splitters.bottleneck.learned_any import AnyCutConfig, fused_channels
    from splitters.cutting.answers import PHOTOS
    from splitters.cutting.sources import load_source
    from splitters.training.config import VideoLearning
    from splitters.training.recipes import any_cut

    if not args.model or not args.at:
        raise ConfigError("the recipe any needs --model and --at; `splitters profile MODEL` lists the cuts")
    detects = form_of(args.task) is Detection
    if detects != (args.output not in (AUTO, "softmax")):
        raise ConfigError("--task detection and --output yolox (or boxes) go together: the bundle must say how to read the boxes")
    source = load_source(args.model, weights=args.weights, size_px=(args.size, args.size) if args.size else None)
    if args.model.startswith("torchvision:"):
        from splitters.cutting.rcnn.detectors import is_detector

        if is_detector(source.model):
            raise ConfigError(f"{args.model} makes its own anchors and boxes; export it to ONNX with boxes and scores as outputs")
    height, width = source.example.shape[-2:]
    if height != width:
        raise ConfigError(f"the model's input is {height}x{width}; training crops are square: give --size")
    cut = AnyCutConfig(
        at=args.at, stem_at=args.stem_at, match=tuple(args.match), task=args.task, shrink=args.shrink,
        channels=args.channels or (144 if detects else 32),
    )  # fmt: skip
    if isinstance(source.model, nn.Module) and (most := fused_channels(source.model, source.example, cut)) < cut.channels:
        print(f"{most} channels cross at {args.at}: the latent has {most}, not {cut.channels}", file=sys.stderr)
        cut = replace(cut, channels=most)
    serving = described(source, args, read_photos(args.data, PHOTOS))
    cut = replace(cut, scores=_scores(serving.postprocess))
    config = any_cut(
        args.model, cut, weights=args.weights, size_px=height, steps=args.steps or 3000, batch=32,
        target_bytes=tuple(args.bytes), serving={**serving.to_json(), "licence": args.licence or UNKNOWN_LICENCE},
    )  # fmt: skip
    if args.video:
        from splitters.training.video import checked

        config = replace(config, video=VideoLearning(clips=checked(args.video, args.data), until=args.video_until))
    return replace(config, amp=args.amp, data=tuple(args.data_parts))


def _scores(postprocess: Mapping[str, Any]) -> Scores:
    """What a decoding makes of a detector's logits; a softmax counts where its last class is nothing."""
    told = postprocess.get("scores", {}).get("activation")
    if told == "softmax":
        return "softmax" if postprocess.get("background") == "last" else "given"
    return "sigmoid" if told == "sigmoid" else "given"


def settings(recipe: str, data: Path, **options: Any) -> TrainConfig:
    """What the command would train with these options.

    Args:
        recipe: as on the command line.
        data: folder of photographs.
        options: by name, with _ for -; one that is None is as if it were not given.

    Raises:
        ConfigError: there is no such option, or one is out of range.
    """
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["train", recipe, "--data", str(data), "--out", "."])
    for name, value in options.items():
        if not hasattr(args, name):
            raise ConfigError(f"training has no option {name!r}; `splitters train --help` lists them")
        if value is not None:
            setattr(args, name, value)
    return _config(args)


def _config(args: argparse.Namespace) -> TrainConfig:
    from splitters.training.recipes import recipe

    for name, least in (
        ("steps", 1),
        ("seconds", 1),
        ("batch", 1),
        ("hold_out", 0),
        ("seed", 0),
        ("threads", 1),
        ("fit", 1),
        ("channels", 1),
        ("size", 16),
    ):
        if (value := getattr(args, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.recipe == "any":
        config = _any(args)
    else:
        config = recipe(args.recipe)
        if args.steps:
            config = config.scaled(args.steps)
    config = replace(config, seed=args.seed, single=args.single_point, seconds=args.seconds or 0.0)
    if args.start:
        config = replace(config, start=str(args.start))
    if args.batch:
        config = replace(config, batch=args.batch)
    return replace(config, hold_out=args.hold_out) if args.hold_out is not None else config


def run(args: argparse.Namespace) -> int:
    """Trains, with a progress bar; a signal saves and stops."""
    if args.recipe == "detector":
        return train_detector(args)
    if args.pack is not None:
        raise ConfigError("--pack belongs to the recipe detector")
    import torch

    from splitters.training.run import run_training

    config = _config(args)
    if args.bundle is not None and config.hold_out < 1:
        raise ConfigError("--bundle measures on the photos held out of the training: give --hold-out at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    stopped: list[int] = []
    last: list[StepReport] = []
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _frame: object) -> None:
        stopped.append(number)
        if len(stopped) > 1:
            raise KeyboardInterrupt

    def decoding(done: int, total: int, told: str) -> None:
        if stopped:
            raise KeyboardInterrupt
        show(done, total, told)

    previous = [signal.signal(s, stop) for s in signals]
    try:
        with Progress(args.recipe) as show:

            def on_step(report: StepReport) -> None:
                last[:] = [report]
                told = f"loss {report.loss:.3f}  distortion {report.distortion:.3f}  latent {report.latent:.3f}"
                told += f"  bytes {report.tier_bytes[0]:.0f} … {report.tier_bytes[-1]:.0f}"
                show(max(report.step, int(report.progress * config.steps)), config.steps, told)

            trained = run_training(
                config, args.data, args.out, device=args.device, on_step=on_step, stop=lambda: bool(stopped), cache=args.cache,
                fit=args.fit, decoding=decoding,
            )  # fmt: skip
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
    bundle = _bundle(args) if trained.complete and args.bundle is not None else None
    _tell(args, trained, bundle, last[0] if last else None)
    return 0 if trained.complete else 128 + stopped[0]


def _tell(args: argparse.Namespace, trained: Trained, bundle: Bundle | None, last: StepReport | None) -> None:
    if trained.unreadable:
        print(f"{len(trained.unreadable)} photos could not be read and were left out; the first is {trained.unreadable[0]}")
    if trained.complete:
        then = f"the bundle is {args.bundle}" if bundle else f"`splitters export {args.out} --out BUNDLE` makes it a bundle"
        print(f"{args.out}: {trained.step} of {trained.steps} steps; {then}")
    else:
        print(f"{args.out}: stopped after {trained.step} of {trained.steps} steps; the same command goes on from there")
    if args.json:
        told: dict[str, Any] = {
            "out": str(args.out), "steps": trained.step, "of": trained.steps, "complete": trained.complete,
            "unreadable": len(trained.unreadable),
        }  # fmt: skip
        if last is not None:
            told |= {"loss": last.loss, "distortion": last.distortion, "tier_bytes": list(last.tier_bytes)}
        if bundle is not None:
            told |= {"bundle": str(bundle.path), "sha256": bundle.sha256, "points": [p.to_json() for p in bundle.points]}
        print(json.dumps(told))


def _bundle(args: argparse.Namespace) -> Bundle:
    """The finished run as a measured bundle."""
    from splitters.commands.export import measured, tell_points
    from splitters.zoo.defaults import export

    bundle = export(str(args.out), args.bundle, partial(measured, run=args.out))
    tell_points(bundle)
    return bundle
