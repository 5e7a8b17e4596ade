"""Models of two pictures, clips, volumes, tokens and bytes: cut, served, and answered as the whole model answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from edge_client import Client, ClientOptions
from protos.errors import SourceError
from protos.messages import Classification, Tensors
from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.runtime.pictures import shipped_pictures
from splitters.runtime.whole import BundleModel
from splitters.tasks.preprocess import Frame, preprocess
from tests.fakes import input_models as made
from tests.fakes.server_running import child, environment

Array = np.ndarray[Any, Any]


@pytest.fixture
def frames() -> list[Frame]:
    """Frames of a little video: one photograph, moving."""
    picture = cv2.resize(shipped_pictures()[0], (80, 60))
    return [np.ascontiguousarray(np.roll(picture, 3 * i, axis=1)) for i in range(6)]


def photos(folder: Path, frames: list[Frame]) -> Path:
    folder.mkdir()
    for number, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{number}.png"), frame)
    return folder


def outputs(answer: object) -> Array:
    assert isinstance(answer, Tensors)
    return np.asarray(next(iter(answer.arrays.values())), np.float64)


def close(got: Array, wanted: Array) -> None:
    wanted = np.asarray(wanted, np.float64).reshape(got.shape)
    assert float(np.abs(got - wanted).max()) <= 1e-3 * max(0.1, float(np.abs(wanted).max()))


def served(tmp: Path, bundle: Path) -> Any:
    return child(tmp, bundle)


def opened(address: str, tmp: Path) -> Any:
    return Client.open(server=address, options=ClientOptions(cache=tmp / "cache", operating_point=0))


def test_the_previous_picture_is_the_one_of_the_frame_before(tmp_path: Path, frames: list[Frame], capsys: Any) -> None:
    file = made.flow(tmp_path / "flow.onnx")
    pictures = photos(tmp_path / "photos", frames)
    assert main(["cut", f"onnx:{file}", "--out", str(tmp_path / "b"), "--photos", str(pictures)]) == 0
    assert "before takes the picture before" in capsys.readouterr().err
    bundle = open_bundle(tmp_path / "b")
    assert [(i.name, i.source) for i in bundle.manifest.inputs] == [("image", "picture"), ("previous", "previous")]
    assert main(["evaluate", str(tmp_path / "b"), "--images", str(pictures)]) == 2
    assert "only bundles of one picture can be evaluated" in capsys.readouterr().err.strip().splitlines()[-1]
    made_ready = [preprocess(f, bundle.manifest.preprocess) for f in frames]
    with served(tmp_path, tmp_path / "b") as server, opened(server.address, tmp_path) as client:
        for number, frame in enumerate(frames):
            before = made_ready[max(0, number - 1)]
            close(outputs(client.infer(frame).answer), made.run(file, before=before, now=made_ready[number])[0])


def test_a_clip_is_the_last_frames_of_any_source(tmp_path: Path, frames: list[Frame]) -> None:
    file = made.video(tmp_path / "video.onnx")
    pictures = photos(tmp_path / "photos", frames)
    assert main(["cut", f"onnx:{file}", "--out", str(tmp_path / "b"), "--photos", str(pictures)]) == 0
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest.task == "classification"
    assert bundle.manifest.inputs[0].shape == (1, made.FRAMES, 3, made.SIDE, made.SIDE)
    results = tmp_path / "results.jsonl"
    with served(tmp_path, tmp_path / "b") as server:
        line = [sys.executable, "-m", "edge_client.cli", "--camera", str(pictures), "--server", server.address]
        done = subprocess.run(
            [*line, "--operating-point", "0", "--output", str(results)], capture_output=True, text=True, check=False,
            env={**environment(), "HEADTAIL_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(text) for text in results.read_text().splitlines()]
    assert len(told) == len(frames)
    ready = [preprocess(f, bundle.manifest.preprocess)[0] for f in frames]
    for number, each in enumerate(told):
        last = [ready[max(0, number - back)] for back in reversed(range(made.FRAMES))]
        raw = made.run(file, clip=np.stack(last, axis=1)[None])[0][0].astype(np.float64)
        shares = np.exp(raw - raw.max()) / np.exp(raw - raw.max()).sum()
        assert each["predictions"][0]["class_id"] == int(shares.argmax())
        assert each["predictions"][0]["score"] == pytest.approx(float(shares.max()), abs=2e-3)


def test_a_volume_comes_from_a_program_and_from_files(tmp_path: Path) -> None:
    file = made.volume(tmp_path / "unet.onnx")
    rng = np.random.default_rng(0)
    scans = [rng.standard_normal((1, 8, 16, 16)).astype(np.float32) for _ in range(3)]
    folder = tmp_path / "scans"
    folder.mkdir()
    for number, scan in enumerate(scans):
        np.save(folder / f"{number}.npy", scan)
    assert main(["cut", f"onnx:{file}", "--out", str(tmp_path / "b"), "--input", "scan=raw", "--example", str(folder)]) == 0
    assert not (tmp_path / "b.jpg").exists()
    bundle = open_bundle(tmp_path / "b")
    assert [(i.name, i.source, i.dtype) for i in bundle.manifest.inputs] == [("scan", "raw", "float32")]
    results = tmp_path / "results.jsonl"
    with served(tmp_path, tmp_path / "b") as server:
        with opened(server.address, tmp_path) as client:
            for scan in scans:
                close(outputs(client.infer(raw={"scan": scan}).answer), made.run(file, scan=scan[None])[0])
            with pytest.raises(SourceError, match=r"needs an array 'scan' of float32 \(1, 1, 8, 16, 16\)"):
                client.infer()
            with pytest.raises(SourceError, match="the frame brings float32"):
                client.infer(raw={"scan": scans[0][:, :4]})
        line = [
            sys.executable,
            "-m",
            "edge_client.cli",
            "--camera",
            str(folder),
            "--server",
            server.address,
            "--output",
            str(results),
        ]
        done = subprocess.run(
            line, capture_output=True, text=True, check=False, env={**environment(), "HEADTAIL_CACHE": str(tmp_path / "cache")}
        )
    assert done.returncode == 0, done.stderr
    told = [json.loads(text) for text in results.read_text().splitlines()]
    assert [(t["outcome"], t["source"]) for t in told] == [("result", f"{i}.npy") for i in range(3)]
    assert all(next(iter(t["tensors"].values()))["shape"] == [2, 8, 16, 16] for t in told)


def test_a_factorys_own_dict_of_tokens_is_used(tmp_path: Path) -> None:
    assert main(["cut", "py:tests.fakes.input_models:words", "--out", str(tmp_path / "b")]) == 0
    bundle = open_bundle(tmp_path / "b")
    assert {i.name: i.dtype for i in bundle.manifest.inputs} == {"tokens": "int64", "mask": "float32"}
    assert bundle.manifest.name == "words"
    module, _ = made.words()
    model = BundleModel(bundle)
    rng = np.random.default_rng(1)
    for _ in range(3):
        tokens, mask = rng.permutation(made.LENGTH)[None], np.ones((1, made.LENGTH), np.float32)
        with torch.no_grad():
            wanted = module(torch.from_numpy(tokens), torch.from_numpy(mask)).numpy()
        close(outputs(model(raw={"tokens": tokens, "mask": mask}).answer), wanted)


def test_a_factory_of_bytes_gets_bytes(tmp_path: Path, frames: list[Frame]) -> None:
    out = tmp_path / "b"
    assert main(["cut", "py:tests.fakes.input_models:camera_bytes", "--out", str(out), "--output", "softmax"]) == 0
    bundle = open_bundle(out)
    module, _ = made.camera_bytes()
    model = BundleModel(bundle)
    for frame in frames[:3]:
        image = preprocess(frame, bundle.manifest.preprocess)
        assert np.array_equal(image, np.rint(image))
        assert image.max() > 1
        with torch.no_grad():
            shares = torch.softmax(module(torch.from_numpy(image.astype(np.uint8).transpose(0, 2, 3, 1))), -1)[0].numpy()
        answer = model(frame).answer
        assert isinstance(answer, Classification)
        assert answer.top[0].class_id == int(shares.argmax())
        assert answer.top[0].score == pytest.approx(float(shares.max()), abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "nowhere=raw"], "has no input 'nowhere'"),
        (["--input", "before=sound"], "--input must be NAME=ROLE"),
        (["--input", "before=clip"], "takes no clip"),
        (["--local"], "--local is for models of one picture"),
    ],
)
def test_what_does_not_fit_is_one_sentence(arguments: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    file = made.flow(tmp_path / "flow.onnx")
    assert main(["cut", f"onnx:{file}", "--out", str(tmp_path / "b"), *arguments]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "b").exists()
