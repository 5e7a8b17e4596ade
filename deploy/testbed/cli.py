"""The ``edge-testbed`` command."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deploy.testbed import comparison
from deploy.testbed.arguments import number
from deploy.testbed.link.synthetic import KINDS
from deploy.testbed.plots import Dot, plot_run
from deploy.testbed.scenario import Scenario, load_scenario
from deploy.testbed.simulate.report import Summary, summarise
from deploy.testbed.simulate.run import Run, simulate
from deploy.testbed.study import ALL_POLICIES
from deploy.testbed.workload import Workload, find_workload, with_clip
from edge_client.observe.fairness import jain
from protos.errors import ConfigError, HeadtailError, SourceError, StorageError
from protos.version import package_version

SCENARIOS = Path(__file__).parent / "scenarios"

_EPILOG = """\
examples:
  edge-testbed list
  edge-testbed run tunnel --plot tunnel.png --json
  edge-testbed run my.toml --policy reference --bundle detector
  edge-testbed run lossy --mode shape --bundle detector          # real client and server, loopback only
  sudo edge-testbed run lossy --mode relay --bundle detector     # two network namespaces, real TCP
  edge-testbed compare --traces $HEADTAIL_DATA/traces --deadline-ms 200 --json
  edge-testbed compare --device-slowdown 3,5,8,12,20,30          # six devices, a table for each and one over all

exit codes: 0 done; 2 a wrong argument or scenario; 3 no such frames; 4 the bundle is unreadable; 12 a file cannot be written;
130 interrupted; 1 our own fault.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _check_paths(args)
        code: int = args.run(args)
    except HeadtailError as error:
        print(f"edge-testbed: {error.message}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"edge-testbed: {error}", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        logging.getLogger("edge-testbed").exception("our own fault")
        return 1
    return code


def _check_paths(args: argparse.Namespace) -> None:
    """What a run writes at its end and reads at its beginning is looked at before it begins."""
    for option in ("plot", "explain"):
        path: Path | None = getattr(args, option, None)
        if path is not None and (path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK)):
            raise ConfigError(f"--{option} {path} cannot be written: its folder is absent or not writable")
    plot: Path | None = args.plot if hasattr(args, "plot") else None
    if plot is not None and plot.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot {plot} must end in .png, .pdf or .svg")
    source: str | None = getattr(args, "frames", None)
    if (
        source
        and not source.isdecimal()
        and not source.startswith("synthetic:")
        and "://" not in source
        and not Path(source).exists()
    ):
        raise SourceError(f"--frames {source} does not exist")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="edge-testbed",
        description="What a split-computing system does on a bad network: simulated, shaped or relayed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    parser.add_argument("--verbose", action="store_true", help="log what is being done")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser("run", help="run a scenario")
    run.add_argument("scenario", help="a TOML file, or the name of a scenario that comes with headtail (edge-testbed list)")
    run.add_argument(
        "--policy", default="ours",
        help=f"who decides: {', '.join(ALL_POLICIES)}, a registered policy, or module:Class (default %(default)s)",
    )  # fmt: skip
    run.add_argument("--mode", default="simulate", choices=("simulate", "shape", "relay"), help="default %(default)s")
    run.add_argument("--frames", metavar="SOURCE", help="shape and relay: the video, picture or folder the camera shows")
    run.add_argument("--duration-s", type=number, help="instead of the scenario's")
    run.add_argument(
        "--explain", type=Path, metavar="FILE", help="write every decision's inputs, candidates and choice as JSON lines"
    )
    run.add_argument("--sample", type=int, default=0, help="scenarios of several servers: simulate so many of them (default: all)")
    run.add_argument(
        "--processes", type=int, default=1, help="scenarios of several servers: so many at a time (default %(default)s)"
    )
    _workload_arguments(run)
    _clip_argument(run)
    _output_arguments(run)
    run.set_defaults(run=_run)

    compare = verbs.add_parser("compare", help="all policies over a folder of traces")
    comparison.add_arguments(compare)
    _workload_arguments(compare)
    _clip_argument(compare)
    _output_arguments(compare)
    compare.set_defaults(run=_compare)

    shown = verbs.add_parser("list", help="scenarios and synthetic traces that come with headtail")
    shown.set_defaults(run=_list)
    return parser


def _workload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bundle",
        default="efficientnet-lite0",
        help="whose operating points: a default model's name, a bundle directory or a workload's JSON file (default %(default)s)",
    )


def _clip_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip",
        type=Path,
        metavar="VIDEO",
        help="simulate: payloads are as large as this video's frames are, encoded by the bundle (minutes the first time);"
        " default: drawn from the table, which was measured on stills",
    )
    parser.add_argument("--clip-frames", type=int, default=60, help="frames taken of it, at the fps (default %(default)s)")


def _workload(args: argparse.Namespace, fps: float) -> Workload:
    workload = find_workload(args.bundle)
    if args.clip is None:
        return workload
    if args.clip_frames < 8:
        raise ConfigError(f"--clip-frames must be at least 8, got {args.clip_frames}")
    return with_clip(workload, args.bundle, args.clip, fps=fps, frames=args.clip_frames)


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the last line of output is one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture: .png, .pdf or .svg")


def _scenario(name: str) -> Scenario:
    path = Path(name)
    own = SCENARIOS / f"{name}.toml"
    if not path.exists() and own.exists():
        path = own
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in SCENARIOS.glob("*.toml")))
        raise ConfigError(f"no scenario {name!r}: give a TOML file or one of {known}")
    return load_scenario(path)


def _run(args: argparse.Namespace) -> int:
    scenario = _scenario(args.scenario)
    if args.duration_s:
        scenario = replace(scenario, duration_s=args.duration_s)
    if args.mode != "simulate":
        if args.clip is not None:
            raise ConfigError("--clip is for --mode simulate; in the other modes --frames names the video")
        return _run_real(args, scenario)
    workload = _workload(args, scenario.fps)
    if scenario.servers > 1:
        return _run_fleet(args, scenario, workload)
    if args.policy == "oracle":
        if workload.clip is not None:
            raise ConfigError("the oracle reads the table's payload sizes; leave --clip out")
        from deploy.testbed.simulate.oracle import oracle

        _show(args, scenario.name, workload, "oracle", oracle(scenario, workload), {})
        return 0
    run = simulate(scenario, workload, args.policy, explain=args.explain is not None)
    if args.explain:
        with args.explain.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in run.explanations())
    extra: dict[str, object] = {}
    if len(run.cameras) > 1:
        scores = [summarise(c.frames).score for c in run.cameras]
        extra = {"cameras": len(scores), "jain": round(jain(scores), 4), "score_sum": round(sum(scores), 4)}
    if args.plot:
        plot_run(
            dots_of(run),
            [(t / 1e9, bps / 1e6) for t, bps in run.uplinks[0].trace.steps(int(scenario.duration_s * 1e9))],
            choices_of(workload),
            title=f"{scenario.name}, {args.policy}: {run.summary().on_time:.1%} on time, accuracy {run.summary().accuracy:.3f}",
            deadline_ms=scenario.deadline_ms,
            duration_s=scenario.duration_s,
            out=args.plot,
        )
    _show(args, scenario.name, workload, args.policy, run.summary(), extra)
    return 0


def _run_fleet(args: argparse.Namespace, scenario: Scenario, workload: Workload) -> int:
    from deploy.testbed.simulate.fleet import simulate_fleet

    if args.policy == "oracle" or args.explain or args.plot or args.clip:
        raise ConfigError("a scenario of several servers knows no oracle, --explain, --plot or --clip")
    found = simulate_fleet(scenario, workload, args.policy, sample=args.sample, processes=args.processes)
    for key, value in found.summary().items():
        print(f"{key:<18}{value:.4f}" if isinstance(value, float) else f"{key:<18}{value}")
    if args.json:
        print(json.dumps({"scenario": scenario.name, "workload": workload.name, "policy": args.policy, **found.to_json()}))
    return 0


def _run_real(args: argparse.Namespace, scenario: Scenario) -> int:
    from deploy.testbed.real.run import run_real

    if args.policy == "oracle":
        raise ConfigError("the oracle knows the future, which only --mode simulate can tell it")
    choices = choices_of(find_workload(args.bundle))
    found = run_real(
        scenario, mode=args.mode, model=args.bundle, source=args.frames, plot=args.plot, policy=args.policy, choices=choices
    )
    if args.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:<18}{value}")
    return 0


def _show(args: argparse.Namespace, name: str, workload: Workload, policy: str, s: Summary, extra: dict[str, object]) -> None:
    print(f"{name}: {policy} on {workload.name}, {s.captured} frames")
    print(
        f"  on time {s.on_time:.1%}   accuracy {s.accuracy:.4f}   accuracy x on-time {s.score:.4f}   {s.bytes_mean:.0f} bytes/frame"
    )
    if s.latency_ms_p95:
        print(f"  latency p50 {s.latency_ms_p50:.0f} ms, p95 {s.latency_ms_p95:.0f} ms")
    print("  " + ", ".join(f"{k} {v}" for k, v in s.outcomes.items()))
    for key, value in extra.items():
        print(f"  {key} {value}")
    if args.json:
        print(json.dumps({"scenario": name, "workload": workload.name, "policy": policy, **s.to_json(), **extra}))


def _compare(args: argparse.Namespace) -> int:
    comparison.compare(args, _workload(args, args.fps))
    return 0


def _list(args: argparse.Namespace) -> int:
    del args
    for path in sorted(SCENARIOS.glob("*.toml")):
        first = path.read_text().splitlines()[0].lstrip("# ")
        print(f"{path.stem:<14}{first}")
    print(f"synthetic traces: {', '.join(KINDS)}")
    return 0


def dots_of(run: Run) -> list[Dot]:
    """The first camera's frames for ``plot_run``."""
    return [
        Dot(
            at_s=f.captured_ns / 1e9,
            choice=f.choice,
            outcome=f.outcome,
            latency_ms=(f.answered_ns - f.captured_ns) / 1e6 if f.answered_ns else 0.0,
            sent_s=f.sent_ns / 1e9,
            payload_bytes=f.payload_bytes if f.sent_ns else 0,
        )
        for f in run.cameras[0].frames
    ]


def choices_of(workload: Workload) -> list[str]:
    """Names of all choices, least accurate first."""
    rows = [(p.accuracy, f"split {p.id}") for p in workload.points]
    rows += [(o.accuracy, f"{o.format} {o.quality}" + (f"@{o.size_px}" if o.size_px else "")) for o in workload.offloads]
    rows += [(workload.local.accuracy, "local")] if workload.local else []
    return [name for _, name in sorted(rows)]
