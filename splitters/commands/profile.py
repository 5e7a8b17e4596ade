"""``splitters profile MODEL``: what every candidate cut of a model would cost."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from splitters.commands.common.model_arguments import (
    add_input_arguments,
    add_model_arguments,
    input_roles,
    load_model,
    model_size,
    read_examples,
    sample_of,
    sample_picture,
)
from splitters.commands.common.progress import Progress

if TYPE_CHECKING:
    from splitters.profiling.table import Profile


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "profile",
        help="what every candidate cut of a model would cost",
        description="Finds every place where the model can be cut and measures, on this machine and one thread, what crosses "
        "there and what each side would have to do. Cuts marked * send the least for the work they ask of the device.",
    )
    add_model_arguments(parser, weights="random")
    add_input_arguments(parser)
    parser.add_argument(
        "--image", type=Path, help="a photograph to measure compressed bytes on (default: scikit-image's astronaut)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bytes and cumulative MACs along the network")
    parser.add_argument("--all", action="store_true", help="list every cut, not the good ones alone")
    parser.add_argument("--budget-s", type=float, default=20.0, help="time for latency measurements (default: %(default)s)")
    network = parser.add_argument_group("where to run it, given a network")
    network.add_argument("--bitrate-bps", type=float, help="uplink; prints the fastest places to run, local and server included")
    network.add_argument("--rtt-ms", type=float, default=30.0)
    network.add_argument(
        "--device-slowdown", type=float, default=8.0, help="how many times slower the device is (default: %(default)s)"
    )
    network.add_argument("--deadline-ms", type=float)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, draws."""
    table, weights, where = _measured(args)
    print(table.text(every=args.all))
    print(f" picture: {where}; weights: {weights}" + ("" if weights != "random" else
          " (compressed sizes are those of an untrained network; trained ones are usually smaller after activations)"))  # fmt: skip
    result = {"weights": weights, **table.to_json()}
    if args.bitrate_bps is not None:
        best = table.choices(
            bitrate_bps=args.bitrate_bps, rtt_ms=args.rtt_ms, device_slowdown=args.device_slowdown, deadline_ms=args.deadline_ms
        )
        print(
            f" at {args.bitrate_bps / 1e6:g} Mbit/s, {args.rtt_ms:g} ms round trip, a device {args.device_slowdown:g} times slower:"
        )
        for c in best[:5]:
            print(f"   {c.where:6} {c.name:30} {c.latency_ms:8.1f} ms = device {c.device_ms:.1f} + network {c.network_ms:.1f} "
                  f"+ server {c.server_ms:.1f}{'' if c.meets_deadline else '  (misses the deadline)'}")  # fmt: skip
        result["best"] = [{"where": c.where, "name": c.name, "latency_ms": c.latency_ms} for c in best[:5]]
    if args.plot:
        from splitters.profiling.plot import plot

        plot(table, args.plot)
        print(f" picture of the table: {args.plot}")
    if args.json:
        print(json.dumps(result))
    return 0


def _measured(args: argparse.Namespace) -> tuple[Profile, str, str]:
    """The table, what the weights are, and where the picture is from."""
    if str(args.model).startswith("onnx:"):
        return _of_onnx(args)
    import torch

    from splitters.cutting.graph.trace import flat_inputs
    from splitters.cutting.rcnn.bundle import backbone_source
    from splitters.cutting.rcnn.detectors import is_detector
    from splitters.profiling.measure import profile
    from splitters.tasks.preprocess import preprocess

    source = load_model(args)
    if is_detector(source.model):
        source = backbone_source(source)
    source.check_takes_pictures()
    picture, spec, where, jpeg_bytes = sample_picture(args.image, source)
    image = flat_inputs(torch.from_numpy(preprocess(picture, spec)))
    with Progress("profile", every_s=2) as show:
        table = profile(source.model, image, name=args.model, picture_bytes=jpeg_bytes, budget_s=args.budget_s, on_step=show)
    return table, source.weights, where


def _of_onnx(args: argparse.Namespace) -> tuple[Profile, str, str]:
    """The table of the user's own graph, in ONNX Runtime alone."""
    from splitters.cutting.onnx.feeds import feeds_of
    from splitters.cutting.onnx.meaning import preprocess_for
    from splitters.cutting.onnx.model import load_onnx_model
    from splitters.profiling.onnx_model import profile_onnx

    path = Path(str(args.model).removeprefix("onnx:"))
    given = read_examples(args.example)
    model = load_onnx_model(path, size_px=model_size(args), roles=input_roles(args), example=given[0] if given else None)
    spec = preprocess_for(model, {"resize": "letterbox", "anchor": "centre"})
    picture, where, jpeg_bytes = sample_of(args.image, spec)
    feed = feeds_of(model, [picture], spec, given)[0]
    with Progress("profile", every_s=2) as show:
        table = profile_onnx(model, feed, name=args.model, picture_bytes=jpeg_bytes, budget_s=args.budget_s, on_step=show)
    return table, path.name, where
