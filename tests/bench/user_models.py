"""The models that people bring: exported as their makers export them, cut, served, and compared with the whole file.

Run in an environment of its own, where this project and ``ultralytics`` (AGPL: a test's tool, never a dependency),
``transformers``, ``segmentation_models_pytorch``, ``nudenet``, ``rapidocr_onnxruntime``, ``rfdetr`` and ``monai`` are installed:
``python -m tests.bench.user_models [--only WORD…] [--part I/N] [--size 160] [--keep DIR]``. Weights are random, since none can be
fetched everywhere; those of public detectors are taken from ``HEADTAIL_DATA`` where it is set. What a row shows is that the form
loads, cuts, is served by real processes, and answers as ONNX Runtime does on the whole file.

A row passes if the pieces are the file (to the last bit, or within 1e-3 where a half rounds at the cut), if a real client and
server answer every picture as head and tail do, and if what comes through the codec at its finest point equals what ONNX Runtime,
with its default options, makes of the whole file: boxes, key points and corners within .5 px of the model's input, scores within
.005, masks, vectors and named tensors within 1e-3 of the largest (`tests.bench.user_model_judge`). No row has a tolerance of its
own. Three things follow from random weights:

- Boxes of an untrained network are near ties, and which of them a suppression keeps is chance. So all rows are compared before a
  threshold and a suppression choose among them. A detector that finds boxes may pass by these instead: all found again.
- An answer must depend on what came through: it must lie less than half as far from its own picture's as the answers of two
  pictures lie from one another, as it is read or as raw outputs. A network that answers the same whatever it sees passes in no row.
- A class map may agree instead of its logits: all but 1e-3 of the classes' overlap.

Clips, volumes and pairs of pictures go through `edge_client.Client`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from protos.errors import first_line
from tests.bench.user_model_files import ROWS
from tests.bench.user_model_judge import BOX_PX, SCORE, VECTOR, distance, raw

REAL = ("YOLOX-nano", "PicoDet-S", "NanoDet", "FastestDet", "NudeNet", "PP-OCR")  # the others' weights are random  # fmt: skip


def photos(folder: Path) -> Path:
    """scikit-image's photographs as files, which the client reads."""
    from splitters.commands.cut import read_photos

    folder.mkdir()
    for number, picture in enumerate(read_photos(None, 3)[:3]):
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return folder


def texts(folder: Path) -> Path:
    """Lines of text on paper, which a reader of text is for: on other pictures its shares are near ties."""
    folder.mkdir()
    for number, words in enumerate(("split computing", "27 November", "HEAD and tail")):
        paper = np.full((48, 320, 3), 235, np.uint8)
        cv2.putText(paper, words, (8, 34), cv2.FONT_HERSHEY_SIMPLEX, 1.0, (30, 30, 30), 2, cv2.LINE_AA)
        cv2.imwrite(str(folder / f"{number}.png"), paper)
    return folder


def scans(folder: Path) -> Path:
    """Volumes (1, 16, 64, 64): blobs, as a scanner's."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = rng.standard_normal((4, 16, 16)).astype(np.float32)
        finer = np.stack([cv2.resize(plane, (64, 64), interpolation=cv2.INTER_CUBIC) for plane in coarse])
        np.save(folder / f"{number}.npy", np.repeat(finer, 4, axis=0)[None])
    return folder


def told_apart(manifest: Any, mine: list[Any], wanted: list[Any]) -> tuple[float, float, bool]:
    """The largest distance of an answer from the whole file's, and the least that two pictures' answers have of one another.

    And whether answers depend on what came through: each lies less than half as far from its own picture's as any two from one
    another, as they are read, or as raw outputs where reading hides it (a softmax that is sure of one class).
    """
    found = []
    for measure in (partial(distance, manifest), raw):
        gap = max(measure(a, b) for a, b in zip(mine, wanted, strict=True))
        found.append((gap, min(measure(a, b) for a, b in itertools.combinations(wanted, 2))))
    return *found[0], any(gap < moves / 2 for gap, moves in found)


def through(model: Path, bundle: Any, folder: Path) -> tuple[tuple[float, float, bool], list[dict[str, Any]]]:
    """Through head, codec and tail at the finest point, and `told_apart`; and the answers as a client would write them."""
    from splitters.codec import codec_from_spec
    from splitters.commands.cut import read_photos
    from splitters.cutting.onnx.model import load_onnx_model
    from splitters.cutting.onnx.pieces import whole_outputs
    from splitters.cutting.onnx.runtime import Session
    from splitters.runtime.tail import batched
    from splitters.tasks.base import open_task
    from splitters.tasks.preprocess import preprocess

    manifest = bundle.manifest
    # The whole file as ONNX Runtime runs it: optimised, as the pieces are.
    whole = replace(
        load_onnx_model(model, size_px=manifest.preprocess.size_px), reference=Session(model, optimised=True, what="the file")
    )
    codec = codec_from_spec(json.loads(bundle.read_part(manifest.codec)), bundle.read_part)
    head = Session(bundle.part_path(manifest.head.stem), optimised=True, what="head")
    tail = Session(bundle.part_path(manifest.tail["path"]), optimised=True, what="tail")
    run = batched(lambda arrays: tail.run(dict(zip(tail.inputs, arrays, strict=True))), 1)
    finest, task = max(bundle.points, key=lambda p: p.bits), open_task(manifest)
    answers, mine, wanted = [], [], []
    for picture in read_photos(folder, 3):
        image, size = preprocess(picture, manifest.preprocess), (picture.shape[1], picture.shape[0])
        latents = codec.quantise([t[0] for t in head.run({"image": image})], finest.codec_point)
        mine.append(run([a[None] for a in codec.dequantise(codec.decode(codec.encode(latents)))]))
        wanted.append(whole_outputs(whole, {"image": image}))
        answers.append(task.to_json(task.decode(mine[-1], [size])[0], manifest.labels))
    return told_apart(manifest, mine, wanted), answers


def through_client(model: Path, bundle: Any, folder: Path) -> tuple[float, float, bool]:
    """A model of clips, volumes or pairs through `edge_client.Client` and a server, and `told_apart`."""
    import onnxruntime as ort

    from edge_client import Client, ClientOptions
    from splitters.commands.cut import read_photos
    from splitters.tasks.preprocess import preprocess
    from tests.fakes.server_running import child

    whole = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    frames = [] if bundle.manifest.inputs[0].source == "raw" else read_photos(folder, 3)[:3]
    ready = [preprocess(frame, bundle.manifest.preprocess) for frame in frames]
    mine: list[Any] = []
    wanted: list[Any] = []
    with child(folder.parent, bundle.path) as server:
        options = ClientOptions(cache=folder.parent / "cache", operating_point=0)
        with Client.open(server=server.address, options=options) as client:
            for number in range(3):
                if frames:
                    answer, feeds = client.infer(frames[number]).answer, _fed(whole, ready, number)
                else:
                    scan = np.load(model.parent / "scans" / f"{number}.npy")
                    feeds = {whole.get_inputs()[0].name: scan[None]}
                    answer = client.infer(raw={bundle.manifest.inputs[0].name: scan}).answer
                wanted.append([a[0] for a in whole.run(None, feeds)])
                mine.append(list(answer.arrays.values()))
    return told_apart(bundle.manifest, mine, wanted)


def _fed(whole: Any, ready: list[Any], number: int) -> Mapping[str, Any]:
    """What the whole file takes for a frame: a clip of the last frames, or the one before and this one."""
    inputs = whole.get_inputs()
    if len(inputs) == 2:
        return {inputs[0].name: ready[max(0, number - 1)], inputs[1].name: ready[number]}
    last = [ready[max(0, number - back)][0] for back in reversed(range(inputs[0].shape[2]))]
    return {inputs[0].name: np.stack(last, axis=1)[None]}


def row(name: str, folder: Path, size: int, pictures: Path) -> dict[str, Any]:
    """One model from export to answers of a real client."""
    from splitters.bundle import open_bundle
    from tests.fakes.server_running import child, environment

    make, options = ROWS[name]
    folder.mkdir()
    start = time.monotonic()
    with (folder / "maker.log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        model = make(folder, size)
    told: dict[str, Any] = {"model": name, "passed": False}
    python = [sys.executable, "-m"]
    command = [
        *python, "splitters.cli", "cut", f"onnx:{model}", "--out", str(folder / "b"),
        *(("--example", str(scans(folder / "scans"))) if "scan=raw" in options else ("--photos", str(pictures))), *options,
        *(() if name.startswith(REAL) else ("--allow-nothing-found",)), "--json",
    ]  # fmt: skip
    cut = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if cut.returncode:
        return {**told, "why": cut.stderr.strip().splitlines()[-1], "seconds": time.monotonic() - start}
    report = json.loads(cut.stdout.strip().splitlines()[-1])
    bundle = open_bundle(folder / "b")
    seen, problem = report["agreement"], ""
    if bundle.manifest.inputs and (len(bundle.manifest.inputs) > 1 or bundle.manifest.inputs[0].source != "picture"):
        gap, moves, apart = through_client(model, bundle, pictures)
    else:
        (gap, moves, apart), answers = through(model, bundle, pictures)
        results = folder / "results.jsonl"
        finest = max(bundle.points, key=lambda p: p.bits).id
        with child(folder, folder / "b") as server:
            client = [*python, "edge_client.cli", "--camera", str(pictures), "--server", server.address, "--output", str(results),
                      "--operating-point", str(finest)]  # fmt: skip
            done = subprocess.run(
                client, env={**environment(), "HEADTAIL_CACHE": str(folder / "cache")}, capture_output=True, text=True, check=False
            )
        lines = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
        if done.returncode or [line["outcome"] for line in lines] != ["result"] * 3:
            problem = done.stderr.strip()[-300:] or "a picture has no result"
        elif not all(alike(line[k], v) for line, answer in zip(lines, answers, strict=True) for k, v in answer.items()):
            problem = "the client's answers are not those of the pieces"
    told |= {
        "at": report["at"], "identical": report["identical"], "task": bundle.manifest.task, "free_batch": report["free_batch"],
        "distance": gap, "moves": moves, "agreement": seen, "seconds": time.monotonic() - start,
    }  # fmt: skip
    boxes = told["task"] == "detection" and seen["found"] and seen["matched"] == seen["found"]
    same = gap <= 1 and apart
    same = same or (boxes and moves > 1 and seen["box_px"] <= BOX_PX and seen["score"] <= SCORE)
    same = same or (told["task"] == "segmentation" and moves > 1 and 1 - seen["accuracy"] <= VECTOR)
    if not report["identical"] and report["onnx_difference"] > VECTOR:
        problem = problem or f"the pieces differ from the file by {report['onnx_difference']:.1e}"
    if not same:
        problem = problem or f"answers lie {gap:.2g} tolerances from the whole file's, two pictures' {moves:.2g} apart"
    return {**told, "passed": not problem, "why": problem}


def alike(mine: Any, theirs: Any) -> bool:
    """Whether two answers in JSON are the same but for the last digits that are written."""
    if isinstance(theirs, dict):
        return isinstance(mine, dict) and mine.keys() == theirs.keys() and all(alike(mine[k], v) for k, v in theirs.items())
    if isinstance(theirs, list):
        return isinstance(mine, list) and len(mine) == len(theirs) and all(map(alike, mine, theirs))
    if isinstance(theirs, float):
        return isinstance(mine, float | int) and abs(mine - theirs) <= 1e-2 * max(1.0, abs(theirs))
    return bool(mine == theirs)


def main() -> int:
    """Runs all rows, or those whose names hold a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--part", default="1/1", metavar="I/N", help="of all rows every N-th, from the I-th")
    args = parser.parse_args()
    home = args.keep or Path(tempfile.mkdtemp(prefix="user-models-"))
    home.mkdir(parents=True, exist_ok=True)
    shown, read = photos(home / "photos"), texts(home / "texts")
    first, step = map(int, args.part.split("/"))
    chosen = [n for n in ROWS if not args.only or any(word in n for word in args.only)][first - 1 :: step]
    found = []
    for number, name in enumerate(chosen):
        try:
            told = row(name, home / f"{number}", args.size, read if "PP-OCR" in name else shown)
        except Exception as error:  # noqa: BLE001  (an exporter that fails is a row that says so)
            told = {"model": name, "passed": False, "why": f"{type(error).__name__}: {first_line(error)[:200]}"}
        found.append(told)
        nan = float("nan")
        told_of = (
            f"{told.get('task', ''):14} distance {told.get('distance', nan):7.2g}  of two pictures {told.get('moves', nan):7.2g}  "
            f"identical {told.get('identical', '')!s:5}  {told.get('seconds', nan):4.0f} s"
        )
        print(f"{'pass' if told['passed'] else 'FAIL'}  {name:32} {told_of}  {told.get('why', '')}", flush=True)
    passed = sum(t["passed"] for t in found)
    print(json.dumps({"passed": passed, "rows": len(found), "models": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
