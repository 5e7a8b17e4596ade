"""A camera's second halves through real client and server behind a shaped link: our operating points beside the H.264 offload.

    python -m tests.bench.video_real --data DATA [--bundle NAME_OR_PATH ...] [--clips vtest ...] --out rows.jsonl

Every run is one client process at one fixed choice (``split N``, or ``h264 Q`` for a rate factor, at the model's input size) on
a clip's second half at 10 fps, 80 ms of round trip, 10 Mbit/s, 300 ms deadline, without loss and with 2 % of packets lost each
way (TCP). Accuracy is AP50 against the uncut model's own boxes on the frames as captured: of all frames, where one without an
answer in time has no boxes, and of the answered ones alone. H.264 at equal bytes is read off between its two neighbouring
settings, along the logarithm of bytes; where ours lies outside of them there is none. The device is this machine. Runs whose
line stands in ``--out`` already are not done again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from deploy.testbed.real.run import Stage, answered_in_time
from deploy.testbed.scenario import Direction, Scenario
from deploy.testbed.simulate.policies import Baseline
from edge_client.control import Decision, Offload, Split
from protos.messages import Box, Detection
from splitters.bundle import Bundle, open_bundle, rewrite_points
from splitters.bundle.manifest import MANIFEST
from splitters.bundle.offload import VIDEO, OffloadOption
from splitters.bundle.operating_point import Quantiles
from splitters.evaluation.video.clips import decoded
from splitters.evaluation.video.fidelity import Fidelity, resample_segments
from splitters.runtime.tail import load_tail
from splitters.tasks.preprocess import input_image
from splitters.zoo.defaults import ensure_exported

CLIPS = ("vtest.avi", "street_vehicles.mp4", "pavement_pedestrians.mp4", "bottles_conveyor.mp4", "person-bicycle-car-detection.mp4")
FPS, DEADLINE_MS, MBPS, RTT_MS = 10.0, 300.0, 10.0, 80.0
LOSSES = (0.0, 2.0)
QUALITIES = (26, 32, 38, 44)
_CHOICE = "HEADTAIL_BENCH_CHOICE"
_SCORE_MIN = 0.01
_POLICY = "tests.bench.video_real:Fixed"


class Fixed(Baseline):
    """One choice, always: that of the environment's ``HEADTAIL_BENCH_CHOICE``, ``split 3`` or ``h264 32``."""

    def choose(self, now_ns: int, deadline_ns: int) -> Decision:
        kind, number = os.environ[_CHOICE].split()
        return Split(point_id=int(number)) if kind == "split" else Offload(format=kind, quality=int(number))


class ClipStage(Stage):
    """The testbed's, with the plain client as it is on this machine."""

    def _client(
        self, scenario: Scenario, source: str, policy: str, results: Path, address: str, begin_unix_ns: int = 0
    ) -> list[str]:
        return [
            *(sys.executable, "-m", "edge_client.cli", "--server", address, "--camera", source, "--realtime"),
            *("--fps", f"{scenario.fps:g}", "--frames", str(int(scenario.duration_s * scenario.fps))),
            *(("--policy", policy) if policy == _POLICY else ()),
            *("--deadline-ms", f"{scenario.deadline_ms:g}", "--change-gate", "off", "--prefilter", "off"),
            *("--score-min", str(_SCORE_MIN), "--output", str(results), "--log-level", "warning"),
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Half:
    """A clip's second half as a video of its own, and the uncut model's judge of it."""

    video: Path
    judge: Fidelity

    def __len__(self) -> int:
        return len(self.judge.wanted)


def prepared(source: Path, folder: Path) -> Bundle:
    """A copy of a bundle whose weak boxes are told, too, and that offers every H.264 setting of this bench.

    The sizes that it names for them are never used: each run has one choice.
    """
    shutil.copytree(source, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["postprocess"]["score_min"] = _SCORE_MIN
    manifest["tail"] |= {"score_min": _SCORE_MIN} if "score_min" in manifest["tail"] else {}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    nothing = Quantiles(p50=1.0, p95=1.0)
    offloads = [
        OffloadOption(format=VIDEO, quality=q, payload_bytes=nothing, key_bytes=nothing, accuracy=0.0, encode_ms=nothing)
        for q in QUALITIES
    ]
    bundle = open_bundle(folder)
    return rewrite_points(bundle, bundle.points, offloads=offloads)


def second_half(clip: Path, bundle: Bundle, video: Path, limit: int) -> Half:
    """Frames of the half at 10 fps, without loss, and what the uncut model sees in them."""
    frames, tick = [], 0
    for time_s, frame in decoded(clip):
        if time_s * FPS >= tick - 0.25:
            frames.append(frame)
            tick = max(tick + 1, int(time_s * FPS) + 1)
    tail, wanted = load_tail(bundle, threads=1), []
    frames = frames[len(frames) // 2 :][:limit]
    write_lossless(frames, video)
    for frame in frames:
        picture = input_image(frame, bundle.manifest.preprocess)
        wanted += tail.run_images([picture], [(frame.shape[1], frame.shape[0])])
    return Half(video=video, judge=Fidelity.to(wanted))


def write_lossless(frames: Sequence[NDArray[np.uint8]], video: Path) -> None:
    """A video whose frames are exactly these."""
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264rgb", rate=int(FPS), options={"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode(None))


def row_of(lines: Sequence[Mapping[str, Any]], half: Half) -> dict[str, Any]:
    """What came of one run."""
    by = {int(line["frame"]): line for line in lines}
    good = [n for n in range(len(half)) if n in by and by[n]["outcome"] == "result" and answered_in_time(dict(by[n]), DEADLINE_MS)]
    answers = {n: _boxes(by[n]) for n in good}
    everything = [answers.get(n, Detection(boxes=())) for n in range(len(half))]
    only = replace(half.judge, wanted=tuple(half.judge.wanted[n] for n in good))
    sizes = [int(line["payload_bytes"]) for line in lines if line["payload_bytes"]]
    codec_ms = [line["latency_ms"].get("head", 0.0) + line["latency_ms"].get("codec", 0.0) for line in lines]
    outcomes = [f"dropped({x['reason']})" if x["outcome"] == "dropped" else x["outcome"] for x in lines]
    return {
        "frames": len(half), "lines": len(lines), "on_time": len(good) / len(half),
        "bytes": float(np.mean(sizes)) if sizes else 0.0, "bytes_first": sizes[0] if sizes else 0,
        "ap50": _ap(half.judge, everything), "ap50_answered": _ap(only, [answers[n] for n in good]) if good else 0.0,
        "latency_ms_p50": float(np.median([by[n]["latency_ms"]["total"] for n in good])) if good else 0.0,
        "device_ms_p50": float(np.median(codec_ms)), "outcomes": {o: outcomes.count(o) for o in sorted(set(outcomes))},
    }  # fmt: skip


def _boxes(line: Mapping[str, Any]) -> Detection:
    return Detection(
        boxes=tuple(Box(class_id=d["class_id"], score=d["score"], box_px=tuple(d["box_px"])) for d in line["detections"])
    )


def _ap(judge: Fidelity, answers: Sequence[Detection]) -> float:
    return judge.score(answers, resample_segments([len(answers)], 20, 10)).value


def at_equal_bytes(theirs: Sequence[Mapping[str, Any]], n_bytes: float, name: str) -> float | None:
    """A figure of H.264's between its two settings around so many bytes a frame."""
    rows = sorted(theirs, key=lambda r: r["bytes"])
    for low, high in pairwise(rows):
        if low["bytes"] <= n_bytes <= high["bytes"] and low["bytes"] > 0:
            share = log(n_bytes / low["bytes"]) / log(high["bytes"] / low["bytes"]) if high["bytes"] > low["bytes"] else 0.0
            return float(low[name] + share * (high[name] - low[name]))
    return None


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each of our runs beside H.264 at the same bytes."""
    found = []
    for ours in (r for r in rows if r["choice"].startswith("split")):
        same = ("model", "clip", "loss_percent")
        theirs = [r for r in rows if r["choice"].startswith(VIDEO) and all(r[k] == ours[k] for k in same)]
        figures = ("bytes", "ap50", "ap50_answered", "on_time")
        found.append(
            {**{k: ours[k] for k in (*same, "choice", *figures)},
             **{f"h264_{k}": at_equal_bytes(theirs, ours["bytes"], k) for k in figures[1:]}}
        )  # fmt: skip
    return found


async def measure(args: argparse.Namespace, done: set[str]) -> None:
    """Does every run that is not done yet."""
    for name in args.bundle:
        with tempfile.TemporaryDirectory() as folder:
            bundle = prepared(Path(name) if Path(name).is_dir() else ensure_exported(name), Path(folder) / "bundle")
            graphs = bundle.points[0].graphs
            points = [p.id for p in bundle.points if p.graphs == graphs][::2][: args.points]
            choices = [*(f"split {i}" for i in points), *(f"{VIDEO} {q}" for q in QUALITIES)]
            async with ClipStage("shape", str(bundle.path)) as stage:
                for clip in args.clips:
                    todo = [(loss, c) for loss in LOSSES for c in choices if key(bundle, clip, loss, c) not in done]
                    if not todo:
                        continue
                    half = second_half(args.data / "video" / clip, bundle, Path(folder) / f"{Path(clip).stem}.mkv", args.frames)
                    for loss, choice in todo:
                        await one(args, stage, bundle, (clip, half), loss, choice)


async def one(args: argparse.Namespace, stage: Stage, bundle: Bundle, clip: tuple[str, Half], loss: float, choice: str) -> None:
    """One run, its line written."""
    name, half = clip
    link = Direction(mbps=MBPS, delay_ms=RTT_MS / 2, loss_percent=loss)
    scenario = Scenario(
        name=name,
        duration_s=len(half) / FPS,
        seed=1,
        fps=FPS,
        deadline_ms=DEADLINE_MS,
        device_slowdown=1,
        uplink=link,
        downlink=link,
    )
    os.environ[_CHOICE] = choice
    before = os.getloadavg()[0]
    lines, _ = await stage.run(scenario, str(half.video), _POLICY)
    row = {
        "key": key(bundle, name, loss, choice), "model": bundle.manifest.name, "clip": name, "loss_percent": loss, "choice": choice,
        "load": round((before + os.getloadavg()[0]) / 2, 1), **row_of(lines, half),
    }  # fmt: skip
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    shown = f"{row['bytes']:6.0f} B  AP50 {row['ap50']:.3f} ({row['ap50_answered']:.3f})  on time {row['on_time']:.3f}"
    print(f"{row['key']:60} {shown}  {row['outcomes']}", flush=True)


def key(bundle: Bundle, clip: str, loss: float, choice: str) -> str:
    """A run's name."""
    return f"{bundle.manifest.name} {clip} {loss:g}% {choice}"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines written so far."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", nargs="+", default=["yolox-nano", "detector"], help="names or folders (default %(default)s)")
    parser.add_argument("--clips", nargs="+", default=CLIPS, help="files under DATA/video (default: five fixed cameras)")
    parser.add_argument("--frames", type=int, default=100, help="at most, of a half (default %(default)s)")
    parser.add_argument("--points", type=int, default=5, help="operating points a model (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="one JSON line a run")
    args = parser.parse_args()
    asyncio.run(measure(args, {row["key"] for row in read(args.out)}))
    rows = read(args.out)
    print(json.dumps({"runs": len(rows), "load_mean": float(np.mean([r["load"] for r in rows])), "compared": compared(rows)}))


if __name__ == "__main__":
    main()
