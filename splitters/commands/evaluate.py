"""``splitters evaluate BUNDLE``: accuracy against real payload bytes, beside image codecs or, on clips, video codecs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import ConfigError
from splitters.bundle import cache_dir
from splitters.commands.common.progress import Progress

if TYPE_CHECKING:
    from splitters.bundle import Bundle
    from splitters.evaluation.bdrate import BdRate
    from splitters.evaluation.report import Report
    from splitters.evaluation.run import EvaluateConfig
    from splitters.evaluation.video.clips import Part
    from splitters.evaluation.video.report import VideoReport


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "evaluate",
        help="accuracy against real payload bytes, beside image or video codecs",
        description="Measures every operating point of a bundle on a folder of photos, through real payloads, beside the same "
        "model fed with compressed images at every quality and size, and rewrites the bundle's operating-point table with "
        "its Pareto frontier, its offload options and its local model's accuracy. With --video the same on a camera's clips: "
        "every frame predicted from one before it, beside H.264 and others at every quality and three sizes, judged by the "
        "uncut model's own answers; the bundle stays as it is.",
    )
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, or a default model's name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, help="folder of photos")
    what.add_argument("--video", type=Path, nargs="+", metavar="CLIP", help="video files, best of a camera that stands still")
    parser.add_argument(
        "--labels",
        type=Path,
        help="JSON {path below --images: class index}, or a COCO instances.json, whose categories are matched by name; "
        "absent: agreement with the whole model (the same class; F1 of the boxes)",
    )
    parser.add_argument(
        "--against",
        help="codecs to compare with, comma-separated, or none (default: jpeg,webp,avif; for video h264,h265; also av1)",
    )
    parser.add_argument("--limit", type=int, help="at most this many photos, evenly spread, or first frames of every clip (240)")
    parser.add_argument("--draws", type=int, help="bootstrap draws (default: 1000 over photos, 200 over a clip's segments)")
    parser.add_argument("--fps", type=float, default=10.0, help="video: frames a second (default: %(default)s)")
    parser.add_argument(
        "--part", default="0:1", metavar="FROM:TO", help="video: share of every clip, by its length (default: %(default)s)"
    )
    parser.add_argument(
        "--references",
        default="1,2,3",
        help="video: how many frames back the reference lies (default: %(default)s; the first is the headline)",
    )
    parser.add_argument(
        "--points",
        help="ids of operating points; video: default all of the largest encoder; --corrupt: the most accurate, and the most "
        "accurate of half its bytes",
    )
    parser.add_argument(
        "--corrupt",
        nargs="?",
        const="dark,noise,blur,jpeg",
        metavar="NAMES",
        help="photos: what darkness, noise, blur and JPEG at three strengths cost the bundle beside its own whole model "
        "(default: all four); the bundle stays as it is",
    )
    parser.add_argument(
        "--alone",
        metavar="SIZES",
        help="classifiers: also the whole model alone on the device at these smaller inputs, px, comma-separated (160,128,96,64): "
        "what the device's work buys without a server",
    )
    parser.add_argument(
        "--score-min",
        type=float,
        default=0.01,
        help="detectors: AP counts boxes from this score on (default: %(default)s). Which boxes a viewer is shown is the "
        "manifest's score_min: with --labels it becomes the score of the best F1",
    )
    parser.add_argument("--plot", type=Path, help="write the picture to this PNG")
    parser.add_argument("--report", type=Path, help="write everything measured to this JSON file")
    parser.add_argument("--no-write", action="store_true", help="leave the bundle's operating points as they are")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, rewrites the bundle's points."""
    from splitters.evaluation.run import EvaluateConfig, dump, evaluate, rewrite
    from splitters.zoo.defaults import find

    bundle = find(args.bundle)
    if args.video:
        return _video(bundle, args)
    against = _names(args.against, "jpeg,webp,avif")
    config = EvaluateConfig(
        images=args.images, labels=args.labels, against=against, limit=args.limit, cache=cache_dir() / "evaluations",
        draws=args.draws or 1000, score_min=args.score_min,
        alone_px=_numbers(args.alone, "--alone") if args.alone else (),
    )  # fmt: skip
    if args.corrupt:
        return _corrupted(bundle, config, args)
    with Progress(f"evaluating {bundle.manifest.name}") as show:
        report = evaluate(bundle, config, show=show)
    _tell(report)
    if args.plot is not None:
        from splitters.evaluation.plot import plot

        plot(report, args.plot)
    if args.report is not None:
        dump(report, args.report)
    if not args.no_write:
        rewrite(bundle, report)
    if args.json:
        print(json.dumps(report.to_json()))
    return 0


def _corrupted(bundle: Bundle, config: EvaluateConfig, args: argparse.Namespace) -> int:
    """Measures on corrupted photos and tells; the bundle stays as it is."""
    from splitters.evaluation.corruption import evaluate_corrupted

    points = _numbers(args.points, "--points") if args.points else None
    with Progress(f"evaluating {bundle.manifest.name}") as show:
        report = evaluate_corrupted(bundle, config, _names(args.corrupt, ""), points=points, show=show)
    print(f"{report.model}: {report.photos} photos, {report.metric}; lost beyond the whole model [95 %]")
    print("corruption       whole  " + "  ".join(f"point {i} at {b:.0f} bytes".ljust(32) for i, b in report.bytes_mean.items()))
    for row in report.rows:
        told = "  ".join(f"{row.points[i]:.4f}  {g[0]:+.4f} [{g[1]:+.4f}, {g[2]:+.4f}]" for i, g in row.more.items())
        print(f"{row.corruption:8s} {row.strength or '':1}     {row.whole:.4f}  {told}")
    _hand_out(report.to_json(), args)
    return 0


def _hand_out(report: Mapping[str, Any], args: argparse.Namespace) -> None:
    """The report as one line of JSON, where it was asked for."""
    told = json.dumps(report)
    if args.report is not None:
        args.report.write_text(told + "\n", encoding="utf-8")
    if args.json:
        print(told)


def _names(text: str | None, default: str) -> tuple[str, ...]:
    return () if text == "none" else tuple((text or default).split(","))


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers, comma-separated, not {text!r}") from None


def _part(text: str) -> Part:
    from splitters.evaluation.video.clips import Part

    try:
        start, stop = (float(n) for n in text.split(":"))
    except ValueError:
        raise ConfigError(f"--part takes FROM:TO, shares of a clip such as .5:1, not {text!r}") from None
    return Part(start=start, stop=stop)


def _video(bundle: Bundle, args: argparse.Namespace) -> int:
    """Measures on clips and tells; the bundle stays as it is."""
    from splitters.evaluation.video.report import plot_video
    from splitters.evaluation.video.run import VideoConfig, evaluate_video

    config = VideoConfig(
        clips=tuple(args.video), against=_names(args.against, "h264,h265"), fps=args.fps, part=_part(args.part),
        limit=args.limit or 240,
        ages=_numbers(args.references, "--references"), points=_numbers(args.points, "--points") if args.points else None,
        draws=args.draws or 200, score_min=args.score_min, cache=cache_dir() / "evaluations",
    )  # fmt: skip
    report = evaluate_video(bundle, config, tick=lambda what: print(f"  {what}", flush=True))
    _tell_video(report)
    if args.plot is not None:
        plot_video(report, args.plot)
    _hand_out(report.to_json(), args)
    return 0


def _tell_video(report: VideoReport) -> None:
    """The tables for people."""
    for clip in report.clips:
        print(f"{clip.name}: {clip.frames} frames at {clip.fps:g} a second, {clip.metric} against the uncut model's own answers")
        print("  back  point  bytes a frame (key, predicted)  accuracy  encode ms  decode ms  head ms")
        for p in clip.ours:
            sizes = f"{p.bytes_mean:7.0f} ({p.key_bytes:6.0f}, {p.predicted_bytes:6.0f})"
            times = f"{p.encode_ms:9.2f}  {p.decode_ms:9.2f}  {p.head_ms:7.2f}"
            print(f"  {p.reference_age:4d}  {p.id:5d}  {sizes:30s}  {p.accuracy:.3f}  {times}")
        for t in clip.theirs:
            print(
                f"  {t.codec} crf {t.crf} at {t.share:.0%}: {t.bytes_mean:.0f} bytes (key {t.key_bytes:.0f}), {t.accuracy:.3f}, "
                f"encode {t.encode_ms:.2f} ms"
            )
        for age in report.overall:
            for codec in clip.codecs:
                _tell_rate(f"  reference {age} back, against {codec}", clip.bd_rate(codec, age))
    for age, rates in report.overall.items():
        for codec, rate in rates.items():
            _tell_rate(f"mean over {len(report.clips)} clips, reference {age} back, against {codec}", rate)


def _tell_rate(what: str, rate: BdRate | str) -> None:
    if isinstance(rate, str):
        print(f"{what}: not comparable ({rate})")
    else:
        span = f"over {rate.accuracy_from:.3f} … {rate.accuracy_to:.3f}"
        print(f"{what}: bytes at equal accuracy {rate.percent:+.1f} % [{rate.low:+.1f}, {rate.high:+.1f}] {span}")


def _tell_encoders(report: Report) -> None:
    """What each encoder weighs."""
    for cost in report.encoders:
        print(
            f"{'+'.join(cost.graphs) or 'stem'}, stem included: {cost.file_bytes:,} bytes, {cost.parameters:,} parameters, "
            f"{cost.macs / 1e6:.1f} M MACs, {cost.macs_per_px:,.0f} a pixel"
        )


def _tell_work(report: Report) -> None:
    """Accuracy against the device's work, alone and split."""
    if (work := report.work) is None:
        return
    print("device work, of the whole model's time at full size (multiply-accumulates)")
    macs = work.alone[0].macs
    for a in work.alone:
        told = f"{a.accuracy:.4f}   {a.gap[0]:+.4f} [{a.gap[1]:+.4f}, {a.gap[2]:+.4f}]"
        print(f"  alone at {a.size_px:3d} px   {work.share(a.ms):6.1%} ({a.macs / macs:6.1%})  {a.ms:6.2f} ms   {told}")
    weighed = {cost.graphs: cost.macs for cost in report.encoders}
    for graphs, ms in work.heads_ms.items():
        best = max((p for p in report.points if p.graphs == graphs), key=lambda p: p.accuracy)
        told = f"{best.accuracy:.4f} at {best.payload_bytes.p50:.0f} bytes"
        name = "+".join(graphs) or "stem"
        print(f"  split {name:11s} {work.share(ms):6.1%} ({weighed[graphs] / macs:6.1%})  {ms:6.2f} ms   {told}")


def _tell(report: Report) -> None:
    """The table for people."""
    from splitters.evaluation.bdrate import BdRate

    print(f"{report.model}: {report.photos} photos, whole model {report.metric} {report.whole:.4f}")
    if report.unreadable:
        print(f"{len(report.unreadable)} photos could not be read and were left out; the first is {report.unreadable[0]}")
    print(" id  graphs          codec  bytes p50    p95  head ms   accuracy   minus whole model [95 %]   frontier")
    row = "{:3d}  {:14s}  {:5s}  {:9.0f} {:6.0f}  {:7.2f}   {:.4f}   {}   {}"
    for p in sorted(report.points, key=lambda p: (p.graphs, p.payload_bytes.p50)):
        gap = report.gaps.get(p.id)
        told = f"{gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]" if gap else ""
        size, graphs = p.payload_bytes, "+".join(p.graphs) or "stem"
        print(row.format(p.id, graphs, p.codec_point, size.p50, size.p95, p.head_ms.p50, p.accuracy, told, "*" if p.pareto else ""))
    _tell_encoders(report)
    _tell_work(report)
    for tier, rates in report.bd_rates.items():
        for codec, rate in rates.items():
            if isinstance(rate, BdRate):
                span = f"over {rate.accuracy_from:.3f} … {rate.accuracy_to:.3f}"
                print(
                    f"bytes at equal accuracy, {tier} against {codec}: "
                    f"{rate.percent:+.1f} % [{rate.low:+.1f}, {rate.high:+.1f}] {span}"
                )
            else:
                print(f"bytes at equal accuracy, {tier} against {codec}: not comparable ({rate})")
    if (bar := report.jpeg95) is not None and bar.point is not None and bar.lost is not None:
        value, low, high = (100 * v for v in bar.lost)
        print(
            f"JPEG 95 of the same inputs: {bar.jpeg_bytes:.0f} bytes; point {bar.point} takes {bar.point_bytes:.0f} "
            f"({bar.point_bytes / bar.jpeg_bytes:.1%}) and loses {value:+.2f} AP points [{low:+.2f}, {high:+.2f}]"
        )
    elif bar is not None:
        print(f"JPEG 95 of the same inputs: {bar.jpeg_bytes:.0f} bytes; no operating point takes {bar.share:.0%} of that or less")
    for o in report.offloads:
        side = f"{o.size_px} px" if o.size_px else "full size"
        print(f"offload {o.format} q{o.quality} {side}: {o.payload_bytes.p50:.0f} bytes, {report.metric} {o.accuracy:.4f}")
    if report.local is not None:
        print(f"local model: {report.metric} {report.local:.4f}")
    if report.best_f1 is not None:
        print(f"boxes: the best F1 ({report.best_f1[1]:.3f} at IoU .50) is at score {report.best_f1[0]:.3f}")
    for codec, ms in report.encode_ms.items():
        print(f"{codec} encode: {ms:.2f} ms")
