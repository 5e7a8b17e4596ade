"""The policies with real processes: server and client behind a shaped or relayed link, and the simulation's word beside it.

    python -m tests.bench.control_real --data DATA --mode shape --out rows.jsonl            # about ten minutes
    python -m tests.bench.control_real --data DATA --mode relay --out rows.jsonl            # root; about ten minutes

One trace a family under three conditions (in relay mode, where each run starts a server, one family a condition), ours against
local only, offload fixed, split fixed and the reference controller. Local only needs no link, and runs once a condition. The
classifier sees imagenette's val photos, and its accuracy is the share of right answers to them; the detector sees a street (vtest),
and its accuracy is the mean F1 of its boxes with those of the whole model, at IoU .5. An answer after its deadline is none. The
device takes the committed workload's times, stretched by the condition's slowdown; the server is this
machine, whose own times in the simulation are the workload's too. Runs whose line stands in ``--out`` already are not done again:
so a long bench can be had in several sittings (``--budget-s``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from deploy.testbed.real.run import Stage, answered_in_time, summary_of
from deploy.testbed.scenario import Scenario
from deploy.testbed.simulate.run import simulate
from deploy.testbed.study import Condition, Job, sample_traces, scenario_of
from deploy.testbed.workload import Workload, load_workload
from splitters.bundle import open_bundle
from splitters.runtime.tail import load_tail
from splitters.tasks.decoding.boxes import iou_matrix
from splitters.tasks.preprocess import input_image

CLASSIFIER, DETECTOR = "efficientnet-lite0", "detector"
PLAN = (
    (CLASSIFIER, Condition(deadline_ms=200, fps=10, loss_percent=0, rtt_ms=80, slowdown=10)),
    (CLASSIFIER, Condition(deadline_ms=200, fps=10, loss_percent=5, rtt_ms=80, slowdown=10)),
    (DETECTOR, Condition(deadline_ms=400, fps=10, loss_percent=2, rtt_ms=80, slowdown=10)),
)
POLICIES = ("ours", "offload_fixed", "split_fixed", "reference")
WORKLOADS = Path(__file__).parent / "workloads"
_PHOTOS, _IOU = 120, 0.5

Judge = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A bundle, what its camera sees, how its answers are judged, and its measured workload on this machine."""

    bundle: Path
    source: Path
    judge: Judge
    workload: Workload


def classifier(bundle: Path, data: Path, folder: Path) -> Model:
    """Photos with their labels in their names; an answer is right or wrong."""
    folder.mkdir()
    val = data / "imagenette160" / "val"
    labels = json.loads((data / "imagenette160" / "imagenet_class_index.json").read_text())
    files = sorted(val.rglob("*.JPEG"))
    for i, file in enumerate(np.random.default_rng(0).choice(len(files), _PHOTOS, replace=False)):
        photo = files[int(file)]
        (folder / f"{i:03d}_{labels[photo.parent.name]}.jpg").symlink_to(photo)

    def judge(line: Mapping[str, Any]) -> float:
        return float(line["predictions"][0]["class_id"] == int(Path(line["source"]).stem.split("_")[1]))

    return Model(bundle=bundle, source=folder, judge=judge, workload=load_workload(WORKLOADS / f"{CLASSIFIER}.json"))


def detector(bundle: Path, data: Path, frames: int) -> Model:
    """A street; an answer is as good as its boxes agree with the whole model's."""
    source = data / "video" / "vtest.avi"
    opened = open_bundle(bundle)
    torch.set_num_threads(1)
    tail, clip, truth = load_tail(opened), cv2.VideoCapture(str(source)), []
    while len(truth) < frames:
        ok, frame = clip.read()
        if not ok:
            break
        picture = input_image(frame.astype(np.uint8, copy=False), opened.manifest.preprocess)
        (answer,) = tail.run_images([picture], [(frame.shape[1], frame.shape[0])])
        truth.append([{"class_id": b.class_id, "box_px": b.box_px} for b in answer.boxes])  # type: ignore[union-attr]

    def judge(line: Mapping[str, Any]) -> float:
        return f1(line["detections"], truth[line["frame"]])

    return Model(bundle=bundle, source=source, judge=judge, workload=load_workload(WORKLOADS / f"{DETECTOR}.json"))


def f1(found: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, Any]]) -> float:
    """Of boxes against boxes: same class, IoU at least .5, each used once, the best pairs first. 1 where both are empty."""
    if not found or not truth:
        return float(not found and not truth)
    ious = iou_matrix(*(np.array([row["box_px"] for row in rows], np.float32) for rows in (found, truth)))
    ious *= np.array([[a["class_id"] == b["class_id"] for b in truth] for a in found])
    hits = 0
    while ious.size and ious.max() >= _IOU:
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        ious[row, :] = ious[:, column] = 0
        hits += 1
    return 2 * hits / (len(found) + len(truth))


def plan(data: Path, mode: str, seconds: float) -> list[tuple[str, Scenario, Condition, str, str]]:
    """Model, scenario, condition, family and policy of every run."""
    found = []
    traces = sample_traces(data / "traces", 1, seed=1)
    for number, (model, condition) in enumerate(PLAN):
        families = list(traces) if mode == "shape" else [list(traces)[number % len(traces)]]
        workload = load_workload(WORKLOADS / f"{model}.json")
        for family in families:
            job = Job(
                family=family,
                trace=traces[family][0],
                condition=condition,
                policy="",
                workload=workload,
                duration_s=seconds,
                seed=1,
            )
            scenario = replace(scenario_of(job), grants=True)
            policies = (*POLICIES, "local") if family == families[0] else POLICIES
            found += [(model, scenario, condition, family, policy) for policy in policies]
    return found


async def measure(args: argparse.Namespace, runs: Sequence[tuple[str, Scenario, Condition, str, str]], done: set[str]) -> None:
    """Does what is not done yet, until the time is over."""
    until = time.monotonic() + args.budget_s
    with tempfile.TemporaryDirectory() as name:
        for model_name in (CLASSIFIER, DETECTOR):
            todo = [r for r in runs if r[0] == model_name and key(args.mode, *r) not in done]
            if not todo or time.monotonic() > until:
                continue
            bundle = args.bundles / model_name
            frames = int(args.seconds * todo[0][1].fps)
            model = (
                classifier(bundle, args.data, Path(name) / "photos")
                if model_name == CLASSIFIER
                else detector(bundle, args.data, frames)
            )
            async with Stage(args.mode, str(bundle), str(WORKLOADS / f"{model_name}.json")) as stage:
                for run in todo:
                    if time.monotonic() > until:
                        break
                    await one(args, stage, model, run)


async def one(args: argparse.Namespace, stage: Stage, model: Model, run: tuple[str, Scenario, Condition, str, str]) -> None:
    """One run, its line written."""
    model_name, scenario, condition, family, policy = run
    lines, begin_ns = await stage.run(scenario, str(model.source), policy)
    _, summary = summary_of(lines, begin_ns, scenario.deadline_ms)
    right = [model.judge(line) for line in lines if answered_in_time(line, scenario.deadline_ms)]
    expected = simulate(scenario, model.workload, policy).summary()
    row = {
        "key": key(args.mode, *run), "model": model_name, "condition": str(condition), "family": family, "policy": policy,
        "accuracy": sum(right) / max(1, len(right)), "score": sum(right) / len(lines), **summary,
        "unaccounted": int(scenario.duration_s * scenario.fps) - len(lines),
        "simulated": {
            name: getattr(expected, name)
            for name in ("on_time", "accuracy", "score", "bytes_mean", "latency_ms_p50", "latency_ms_p95", "outcomes")
        },
    }  # fmt: skip
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    told = f"{row['on_time']:.3f} ({expected.on_time:.3f})  {row['accuracy']:.3f} ({expected.accuracy:.3f})"
    print(f"{row['key']}: on time {told}  bytes {row['bytes_mean']:.0f} ({expected.bytes_mean:.0f})  {row['outcomes']}", flush=True)


def key(mode: str, model: str, scenario: Scenario, condition: Condition, family: str, policy: str) -> str:
    """A run's name."""
    return f"{mode} {model} [{condition}, {scenario.duration_s:g} s] {family} {policy}"


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The mean over the families, by model and condition and by policy; local only counts for all of them."""
    by: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by[f"{row['model']}, {row['condition']}"][row["policy"]].append(row)
    return {
        group: {policy: {name: round(value, 4) for name, value in means(found).items()} for policy, found in policies.items()}
        for group, policies in by.items()
    }


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of one policy; each run counts the same. The simulation's beside them."""

    def mean(name: str, pick: Callable[[Mapping[str, Any]], Any] = lambda row: row) -> float:
        return float(np.mean([pick(row)[name] for row in rows]))

    found = {name: mean(name) for name in ("on_time", "score", "bytes_mean")}
    found |= {f"simulated_{name}": mean(name, lambda row: row["simulated"]) for name in ("on_time", "score", "bytes_mean")}
    found["accuracy"] = found["score"] / found["on_time"] if found["on_time"] else 0.0
    found["simulated_accuracy"] = found["simulated_score"] / found["simulated_on_time"] if found["simulated_on_time"] else 0.0
    return found


def main() -> None:
    """Runs and prints; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundles", type=Path, required=True, help="folder with the bundles efficientnet-lite0 and detector")
    parser.add_argument("--mode", choices=("shape", "relay"), default="shape")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one run (default %(default)s)")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="begin no run after this (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="one JSON line a run; runs in it already are not done again")
    args = parser.parse_args()
    runs = plan(args.data, args.mode, args.seconds)
    keys = {key(args.mode, *run) for run in runs}
    asyncio.run(measure(args, runs, {row["key"] for row in read(args.out)}))
    rows = [row for row in read(args.out) if row["key"] in keys]
    found = table(rows)
    for group, policies in found.items():
        print(f"{group}\n  {'policy':<16}on time (sim)    accuracy (sim)   score (sim)      bytes (sim)")
        for policy, t in sorted(policies.items(), key=lambda item: -item[1]["score"]):
            shares = [f"{t[name]:.3f} ({t['simulated_' + name]:.3f})    " for name in ("on_time", "accuracy", "score")]
            print(f"  {policy:<16}{''.join(shares)}{t['bytes_mean']:.0f} ({t['simulated_bytes_mean']:.0f})")
    print(json.dumps({"mode": args.mode, "runs": len(rows), "of": len(runs), "unaccounted": sum(r["unaccounted"] for r in rows),
                      "table": found}))  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The lines written so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
