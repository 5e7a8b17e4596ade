"""Published files by name, from a loopback mirror or a folder: fetched, cut, and the answers of the whole file come out.

YOLOX-S, PP-ResNet50 and YoutuReID cannot be fetched here. Stand-ins of the same form take their place under their names.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime as ort
import pytest

from protos.errors import BundleError, UnreachableError
from protos.messages import Classification, Detection, Tensors
from splitters.bundle import open_bundle
from splitters.evaluation.run import loose
from splitters.runtime.pictures import shipped_pictures
from splitters.runtime.whole import BundleModel
from splitters.tasks.decoding.boxes import letterbox
from splitters.tasks.labels.coco_classes import CATEGORY_IDS, NAME_OF
from splitters.tasks.labels.imagenet import imagenet_labels
from splitters.zoo import by_address, fetch, published
from splitters.zoo.defaults import EXPORTERS, ensure_exported
from tests.fakes import zoo_files
from tests.fakes.server_running import command, environment
from tests.integration.test_zoo_fetch import send, serving

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
Pixels = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    for variable in (fetch.MIRROR_VARIABLE, fetch.WEIGHTS_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


def stand_in(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Puts a file of our own in a published one's place; its entry keeps all that says how it is served."""
    content = file.read_bytes()
    entry = replace(published.find(name), bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    table: Mapping[str, Any] = {**published.published(), name: entry}
    monkeypatch.setattr(published, "published", lambda: table)
    return content


def run(file: Path, image: Pixels) -> Pixels:
    session = ort.InferenceSession(str(file))
    return np.asarray(session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(image, np.float32)})[0])


def chw(rgb: Pixels) -> Pixels:
    return rgb.transpose(2, 0, 1)[None]


def test_yolox_s_is_read_as_its_makers_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zoo_files.yolox(tmp_path / "file.onnx")
    with serving(send(stand_in("yolox-s", file, monkeypatch))) as (mirror, asked):
        monkeypatch.setenv(fetch.MIRROR_VARIABLE, mirror)
        path = ensure_exported("yolox-s")
        assert ensure_exported("yolox-s") == path
    assert len(asked) == 1
    bundle = open_bundle(path)
    assert bundle.manifest.labels == dict(NAME_OF)
    assert bundle.manifest.licence == "Apache-2.0"
    found = 0
    model = BundleModel(bundle)
    for frame in shipped_pictures()[:2]:
        square, scale = letterbox(frame[..., ::-1], 64)
        raw = run(file, chw(square.astype(np.float32)))[0]
        grids = [np.stack(np.meshgrid(np.arange(64 // s), np.arange(64 // s)), -1) for s in (8, 16, 32)]
        cells = np.concatenate([g.reshape(-1, 2) for g in grids])
        stride = np.concatenate([np.full((64 // s) ** 2, s) for s in (8, 16, 32)])[:, None]
        centre, extent = (raw[:, :2] + cells) * stride, np.exp(raw[:, 2:4]) * stride
        corners = np.concatenate([centre - extent / 2, centre + extent / 2], 1) / scale
        scores = raw[:, 4:5] * raw[:, 5:]
        corners = np.clip(corners, 0, np.tile(frame.shape[1::-1], 2))
        answer = model.whole(frame)
        assert isinstance(answer, Detection)
        for box in answer.boxes:
            column = int(np.flatnonzero(box.class_id == CATEGORY_IDS)[0])
            near = np.abs(corners - box.box_px).max(axis=1) + 1000 * np.abs(scores[:, column] - box.score)
            assert near.min() < 0.5 + 5, f"{box} is no box of the whole file"
        found += len(answer.boxes)
    assert found, "a test that finds nothing shows nothing"


@pytest.mark.parametrize("softmax", [False, True])
def test_pp_resnet50_names_its_class(softmax: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zoo_files.classifier(tmp_path / "file.onnx", softmax=softmax)
    # At its own size the middle 224 px of 256 are taken; the stand-in is smaller and takes its middle of the same picture.
    with serving(send(stand_in("pp-resnet50", file, monkeypatch))) as (mirror, _):
        monkeypatch.setenv(fetch.MIRROR_VARIABLE, mirror)
        bundle = open_bundle(ensure_exported("pp-resnet50"))
    model = BundleModel(bundle)
    assert bundle.manifest.labels == imagenet_labels()
    for frame in shipped_pictures()[:3]:
        small = cv2.resize(frame, (256, 256), interpolation=cv2.INTER_LINEAR)[96:160, 96:160, ::-1]
        raw = run(file, chw((small.astype(np.float32) / 255 - MEAN) / STD))[0].astype(np.float64)
        shares = raw if softmax else np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
        answer = model.whole(frame)
        assert isinstance(answer, Classification)
        assert answer.top[0].class_id == int(shares.argmax())
        assert answer.top[0].score == pytest.approx(float(shares.max()), abs=1e-3)
        assert model(frame).answer.top[0].class_id == answer.top[0].class_id  # type: ignore[union-attr]


def test_youtu_reid_gives_the_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = zoo_files.person(tmp_path / "file.onnx")
    with serving(send(stand_in("youtu-reid", file, monkeypatch))) as (mirror, _):
        monkeypatch.setenv(fetch.MIRROR_VARIABLE, mirror)
        model = BundleModel(open_bundle(ensure_exported("youtu-reid")))
    for frame in shipped_pictures()[:3]:
        small = cv2.resize(frame, (32, 64), interpolation=cv2.INTER_LINEAR)[..., ::-1]
        wanted = run(file, chw((small.astype(np.float32) / 255 - MEAN) / STD)).ravel()
        for answer in (model.whole(frame), model(frame).answer):
            assert isinstance(answer, Tensors)
            got = answer.arrays["embedding"]
            assert got.shape == (768,)
            assert float(got @ wanted / np.linalg.norm(got) / np.linalg.norm(wanted)) > 0.999


@pytest.mark.parametrize(
    ("lie", "error"), [(lambda data: data[:-1] + b"x", BundleError), (lambda data: data[: len(data) // 2], UnreachableError)]
)
def test_a_download_that_lies_leaves_no_bundle(
    lie: Callable[[bytes], bytes], error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = stand_in("yolox-s", zoo_files.yolox(tmp_path / "file.onnx"), monkeypatch)
    with serving(send(lie(content))) as (mirror, _):
        monkeypatch.setenv(fetch.MIRROR_VARIABLE, mirror)
        with pytest.raises(error):
            ensure_exported("yolox-s")
    left = {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix not in (".lock", ".partial")}
    assert not left


def test_every_file_that_is_served_by_name_has_an_exporter_and_what_is_prepared_is_whole() -> None:
    assert {"picodet-s", "nanodet-m", "yolox-s", "pp-resnet50", "youtu-reid"} <= set(by_address.served_names()) <= set(EXPORTERS)
    for folder in by_address.PREPARED.iterdir():
        spec = json.loads((folder / "codec.json").read_text(encoding="utf-8"))
        points = by_address.load_points((folder / "operating_points.json").read_text(encoding="utf-8"))
        assert [p["id"] for p in spec["codec"]["points"]] == [str(p.id) for p in points]
        assert all(p.measured and p.accuracy_metric == "ap" for p in points)


@pytest.mark.parametrize("name", ["picodet-s", "nanodet-m"])
def test_from_a_name_to_named_boxes(name: str, data_dir: Path, tmp_path: Path) -> None:
    """The real files, a real server and a real client: boxes through the 8-bit cut are those of the whole file."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, frame in enumerate(shipped_pictures()[:3]):
        cv2.imwrite(str(photos / f"{number}.png"), frame)
    surroundings = {**environment(), fetch.WEIGHTS_VARIABLE: str(data_dir / "weights")}
    port, results = tmp_path / "port", tmp_path / "results.jsonl"
    line = command("--listen", "127.0.0.1:0", "--port-file", str(port), "--tail-threads", "1", "--model", name)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(line, stdout=log, stderr=log, env=surroundings)
        try:
            while not port.exists():
                assert server.poll() is None, (tmp_path / "log").read_text()
            client = [sys.executable, "-m", "edge_client.cli", "--camera", str(photos), "--server", port.read_text().strip()]
            told = subprocess.run(
                [*client, "--output", str(results)], env=surroundings, capture_output=True, text=True, check=False
            )
            assert told.returncode == 0, told.stderr
        finally:
            server.kill()
            server.wait()
    assert published.find(name).licence in (tmp_path / "log").read_text()
    bundle = open_bundle(tmp_path / "cache" / "exported" / name)
    whole = BundleModel(loose(bundle, 0.05))
    frames = [json.loads(text) for text in results.read_text().splitlines()]
    assert [f["outcome"] for f in frames] == ["result"] * 3
    found = 0
    for told_of, frame in zip(frames, shipped_pictures(), strict=False):
        wanted = whole.whole(frame)
        assert isinstance(wanted, Detection)
        for box in (b for b in told_of["detections"] if b["score"] > 0.4):
            assert box["label"] == NAME_OF[box["class_id"]]
            alike = [b for b in wanted.boxes if b.class_id == box["class_id"] and abs(b.score - box["score"]) < 0.1]
            assert any(np.abs(np.subtract(b.box_px, box["box_px"])).max() < 12 for b in alike), f"{box} is no box of the whole file"
            found += 1
    assert found >= 3
