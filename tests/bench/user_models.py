"""The models that people bring: exported as their makers export them, cut, served, and compared with the whole file.

Run in an environment of its own, where this project and ``ultralytics`` (AGPL: a test's tool, never a dependency),
``transformers``, ``segmentation_models_pytorch``, ``nudenet``, ``rapidocr_onnxruntime``, ``rfdetr`` and ``monai`` are installed:
``python -m tests.bench.user_models [--only WORD…] [--size 160] [--keep DIR]``. Weights are random, since none can be
fetched everywhere; those of public detectors are taken from ``HEADTAIL_DATA`` where it is set. What a row shows is that the form
loads, cuts, is served by real processes, and answers as ONNX Runtime does on the whole file.

A row passes if the pieces are the file (to the last bit, or within 1e-3 where a half rounds at the cut), and if what comes through
client and server equals the whole file's answer: boxes within .5 px and scores within .005, other tensors within 1e-3 of the
largest. Boxes of an untrained network are near ties, and which of them a suppression keeps is chance: where none scores above
the threshold, raw outputs are compared; they must lie ten times nearer to the whole file's than those of two pictures lie to
one another, which says that the answer depends on what came through. Rows that a network sorted by score itself are compared as
a set. Of a segmentation the masks may agree instead, to within 1e-3 of their overlap. Clips, volumes and pairs of pictures go
through `edge_client.Client`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from protos.errors import first_line
from tests.bench.user_model_files import ROWS

TOLERANCE = 1e-3
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


def raw_gap(model: Path, bundle: Any, folder: Path) -> tuple[float, float]:
    """Through head, codec and tail at the finest point: largest difference of a raw output over its largest value.

    And how much the whole file's outputs differ, by the same measure, from picture to picture: what a wrong piece would show.
    """
    from splitters.codec import codec_from_spec
    from splitters.commands.cut import read_photos
    from splitters.cutting.onnx.model import load_onnx_model
    from splitters.cutting.onnx.pieces import whole_outputs
    from splitters.cutting.onnx.runtime import Session
    from splitters.runtime.tail import batched
    from splitters.tasks.preprocess import preprocess

    whole = load_onnx_model(model, size_px=bundle.manifest.preprocess.size_px)
    codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
    head = Session(bundle.part_path(bundle.manifest.head.stem), optimised=True, what="head")
    tail = Session(bundle.part_path(bundle.manifest.tail["path"]), optimised=True, what="tail")
    run = batched(lambda arrays: tail.run(dict(zip(tail.inputs, arrays, strict=True))), 1)
    finest, worst, moves, first = max(bundle.points, key=lambda p: p.bits), 0.0, 0.0, []
    for picture in read_photos(folder, 3):
        image = preprocess(picture, bundle.manifest.preprocess)
        latents = codec.quantise([t[0] for t in head.run({"image": image})], finest.codec_point)
        got = run([a[None] for a in codec.dequantise(codec.decode(codec.encode(latents)))])
        outputs = whole_outputs(whole, {"image": image})
        first = first or outputs
        moves = max(moves, *(relative(a, b) for a, b in zip(first, outputs, strict=True) if a.shape == b.shape and a.size), 0.0)
        for wanted, mine in zip(outputs, got, strict=True):
            if wanted.shape == mine.shape and wanted.size:
                worst = max(worst, min(relative(mine, wanted), sorted_gap(mine, wanted, bundle.manifest.preprocess.size_px[0])))
    return worst, moves


def relative(mine: Any, wanted: Any) -> float:
    """The largest difference over the largest value."""
    a, b = (np.asarray(each, np.float64) for each in (mine, wanted))
    return float(np.abs(a - b).max()) / (float(np.abs(b).max()) or 1.0)


def sorted_gap(mine: Any, wanted: Any, size_px: int) -> float:
    """0 where two tables (1, K, 6) that end in score and class hold the same boxes in any order, else infinity.

    The same: .5 px, .005 of score, one class. Those that score within .005 of the last may have fallen off the table's end.
    """
    if wanted.ndim != 3 or wanted.shape[2] != 6:
        return float("inf")
    (a,), (b,) = mine.astype(np.float64), wanted.astype(np.float64)
    scale = float(size_px) if np.abs(b[:, :4]).max() <= 2 else 1.0
    for one, other in ((a, b), (b, a)):
        for row in one[one[:, 4] > one[:, 4].min() + 0.005]:
            near = other[other[:, 5] == row[5]]
            same = (np.abs(near[:, :4] - row[:4]).max(1) * scale <= 0.5) & (np.abs(near[:, 4] - row[4]) <= 0.005)
            if not same.any():
                return float("inf")
    return 0.0


def served_gap(model: Path, bundle: Any, folder: Path) -> float:
    """A model of clips, volumes or pairs through `edge_client.Client` and a server: largest relative difference."""
    import onnxruntime as ort

    from edge_client import Client, ClientOptions
    from splitters.commands.cut import read_photos
    from splitters.tasks.preprocess import preprocess
    from tests.fakes.server_running import child

    whole = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    frames = [] if bundle.manifest.inputs[0].source == "raw" else read_photos(folder, 3)[:3]
    ready = [preprocess(frame, bundle.manifest.preprocess) for frame in frames]
    worst = 0.0
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
                for got, wanted in zip(answer.arrays.values(), whole.run(None, feeds), strict=True):
                    worst = max(worst, relative(got, wanted[0]))
    return worst


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
    told: dict[str, Any] = {"model": name, "opset": None, "passed": False}
    python = [sys.executable, "-m"]
    command = [
        *python,
        "splitters.cli",
        "cut",
        f"onnx:{model}",
        "--out",
        str(folder / "b"),
        *(("--example", str(scans(folder / "scans"))) if "scan=raw" in options else ("--photos", str(pictures))),
        *options,
        *(() if name.startswith(REAL) else ("--allow-nothing-found",)),
        "--json",
    ]
    cut = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if cut.returncode:
        return {**told, "why": cut.stderr.strip().splitlines()[-1], "seconds": time.monotonic() - start}
    report = json.loads(cut.stdout.strip().splitlines()[-1])
    bundle = open_bundle(folder / "b")
    if bundle.manifest.inputs and (len(bundle.manifest.inputs) > 1 or bundle.manifest.inputs[0].source != "picture"):
        gap = served_gap(model, bundle, pictures)
        told |= {"at": report["at"], "identical": report["identical"], "task": bundle.manifest.task, "raw_gap": gap, "served": True}
        told |= {"passed": report["identical"] and gap <= TOLERANCE, "seconds": time.monotonic() - start}
        return told if told["passed"] else {**told, "why": f"raw outputs differ by {gap:.1e}"}
    gap, moves = raw_gap(model, bundle, pictures)
    results = folder / "results.jsonl"
    with child(folder, folder / "b") as server:
        client = [*python, "edge_client.cli", "--camera", str(pictures), "--server", server.address, "--output", str(results)]
        done = subprocess.run(
            client, env={**environment(), "HEADTAIL_CACHE": str(folder / "cache")}, capture_output=True, text=True, check=False
        )
    lines = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    served = done.returncode == 0 and [line["outcome"] for line in lines] == ["result"] * 3
    told |= {
        "at": report["at"], "identical": report["identical"], "task": bundle.manifest.task, "free_batch": report["free_batch"],
        "raw_gap": gap, "moves": moves, "served": served,
        "agreement": report["agreement"]["accuracy"], "seconds": time.monotonic() - start,
    }  # fmt: skip
    exact = report["identical"] or report["onnx_difference"] <= TOLERANCE
    seen = report["agreement"]
    boxes = told["task"] == "detection" and seen["found"] and seen["matched"] == seen["found"]
    same = seen["box_px"] <= 0.5 and seen["score"] <= 0.005 if boxes else gap <= min(TOLERANCE, moves / 10)
    same = same or (told["task"] == "segmentation" and 1 - seen["accuracy"] <= TOLERANCE)  # the masks themselves
    told["passed"] = exact and served and same
    if not told["passed"]:
        told["why"] = f"raw outputs differ by {gap:.1e}" if exact and served else done.stderr.strip()[-300:] or "the pieces differ"
    return told


def main() -> int:
    """Runs all rows, or those whose names hold a word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    home = args.keep or Path(tempfile.mkdtemp(prefix="user-models-"))
    home.mkdir(parents=True, exist_ok=True)
    shown, read = photos(home / "photos"), texts(home / "texts")
    chosen = [n for n in ROWS if not args.only or any(word in n for word in args.only)]
    found = []
    for number, name in enumerate(chosen):
        try:
            told = row(name, home / f"{number}", args.size, read if "PP-OCR" in name else shown)
        except Exception as error:  # noqa: BLE001  (an exporter that fails is a row that says so)
            told = {"model": name, "passed": False, "why": f"{type(error).__name__}: {first_line(error)[:200]}"}
        found.append(told)
        told_of = (
            f"{told.get('task', ''):14} raw {told.get('raw_gap', float('nan')):.1e} of {told.get('moves', float('nan')):.1e}  "
            f"identical {told.get('identical', '')!s:5}"
        )
        print(f"{'pass' if told['passed'] else 'FAIL'}  {name:32} {told_of}  {told.get('why', '')}", flush=True)
    passed = sum(t["passed"] for t in found)
    print(json.dumps({"passed": passed, "rows": len(found), "models": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
