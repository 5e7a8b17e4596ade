"""``splitters profile MODEL``: what every candidate cut of a model would cost, and when splitting it pays."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import ConfigError
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
    from splitters.profiling.paying import Way
    from splitters.profiling.table import Profile

_DEADLINE_MS = 200.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "profile",
        help="what every candidate cut of a model would cost",
        description="Finds every place where the model can be cut and measures, on this machine and one thread, what crosses "
        "there and what each side would have to do. Cuts marked * send the least for the work they ask of the device. "
        "Of a bundle, it measures the ways to answer a frame and says when splitting pays.",
    )
    add_model_arguments(parser, weights="random", also="a bundle's directory, a default model's name, ")
    add_input_arguments(parser)
    parser.add_argument(
        "--image", type=Path, help="a photograph to measure compressed bytes on (default: scikit-image's astronaut)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bytes and cumulative MACs along the network")
    parser.add_argument("--all", action="store_true", help="list every cut, not the good ones alone")
    parser.add_argument(
        "--verbose", action="store_true", default=argparse.SUPPRESS, help="write the model's graph, a line a node, to a file"
    )
    parser.add_argument("--budget-s", type=float, default=20.0, help="time for latency measurements (default: %(default)s)")
    network = parser.add_argument_group("where to run it, given a network")
    network.add_argument("--bitrate-bps", type=float, help="uplink; prints the fastest places to run, local and server included")
    network.add_argument("--rtt-ms", type=float, default=30.0)
    network.add_argument(
        "--device-slowdown", type=float, default=8.0, help="how many times slower the device is (default: %(default)s)"
    )
    network.add_argument("--deadline-ms", type=float)
    network.add_argument(
        "--pays", type=Path, metavar="FILE.png",
        help="when does splitting pay: draw whether to answer alone, split or offload over every uplink and device, at half "
        f"the deadline, the deadline and twice the deadline (default: {_DEADLINE_MS:g} ms)",
    )  # fmt: skip
    network.add_argument(
        "--same-accuracy", action="store_true",
        help="of a bundle: count every way as equally accurate, where weights are random and only bytes and times mean something",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, draws."""
    from splitters.zoo.defaults import EXPORTERS

    if Path(args.model).is_dir() or args.model in EXPORTERS:
        return _run_bundle(args)
    table, weights, where = _measured(args)
    print(table.text(every=args.all))
    print(f" picture: {where}; weights: {weights}" + ("" if weights != "random" else
          " (compressed sizes are those of an untrained network; trained ones are usually smaller after activations)"))  # fmt: skip
    result: dict[str, Any] = {"weights": weights, **table.to_json()}
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
    if args.pays:
        from splitters.profiling.paying import ways_of

        result |= _paying(args, table.model, ways_of(table))
    if args.json:
        print(json.dumps(result))
    return 0


def _run_bundle(args: argparse.Namespace) -> int:
    """A bundle's ways to answer a frame, and when which of them is best."""
    from splitters.profiling.bundle_ways import bundle_ways
    from splitters.zoo.defaults import find

    if args.plot:
        raise ConfigError("--plot draws the cuts of a model; a bundle is cut already: use --pays FILE.png")
    bundle = find(args.model)
    picture, where, _ = sample_of(args.image, bundle.manifest.preprocess)
    ways = bundle_ways(bundle, picture, same_accuracy=args.same_accuracy)
    metric = bundle.points[0].accuracy_metric
    print(
        f"{bundle.manifest.name}: ways to answer a frame; {metric} and bytes by the bundle's table, one thread's times on {where}"
    )
    print(f"   {'way':8} {'setting':20} {metric:>9} {'bytes':>9} {'device ms':>10} {'server ms':>10}")
    for w in ways:
        print(f"   {w.kind:8} {w.name:20} {w.accuracy:9.3f} {w.sent_bytes:9,.0f} {w.device_ms:10.2f} {w.server_ms:10.2f}")
    result = _paying(args, bundle.manifest.name, ways)
    if args.json:
        print(json.dumps({"model": bundle.manifest.name, "metric": metric, **result}))
    return 0


def _paying(args: argparse.Namespace, model: str, ways: Sequence[Way]) -> dict[str, Any]:
    """Tells and draws when splitting pays."""
    from splitters.profiling.paying import Place, stretches, told
    from splitters.profiling.paying_plot import plot_paying

    middle = Place(rtt_ms=args.rtt_ms, deadline_ms=_DEADLINE_MS if args.deadline_ms is None else args.deadline_ms)
    print("\n".join(told(ways, middle, args.device_slowdown, args.bitrate_bps)))
    if args.pays:
        places = [replace(middle, deadline_ms=middle.deadline_ms * factor) for factor in (0.5, 1.0, 2.0)]
        marked = None if args.bitrate_bps is None else (args.bitrate_bps, args.device_slowdown)
        plot_paying(ways, places, args.pays, title=f"When does splitting {model} pay?", marked=marked)
        print(f" picture: {args.pays}")
    return {
        "ways": [asdict(w) for w in ways],
        "stretches": [asdict(s) for s in stretches(ways, middle, args.device_slowdown)],
    }


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
    if args.verbose:
        from splitters.cutting.graph.trace import trace, trace_program

        model = source.model
        traced = trace(model, image) if isinstance(model, torch.nn.Module) else trace_program(model, image)
        _write_graph(args.model, str(traced.module.graph))
    with Progress("profile", every_s=2) as show:
        table = profile(source.model, image, name=args.model, picture_bytes=jpeg_bytes, budget_s=args.budget_s, on_step=show)
    return table, source.weights, where


def _write_graph(model: str, text: str) -> None:
    """The graph as a file beside the terminal, which it would fill.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-") + ".graph.txt")
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the graph cannot be written to {path}: {error.strerror or error}") from error
    print(f" graph: {path}, {len(text.splitlines())} lines")


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
    if args.verbose:
        _write_graph(path.name, "\n".join(str(node) for node in model.graph.graph))
    with Progress("profile", every_s=2) as show:
        table = profile_onnx(model, feed, name=args.model, picture_bytes=jpeg_bytes, budget_s=args.budget_s, on_step=show)
    return table, path.name, where
