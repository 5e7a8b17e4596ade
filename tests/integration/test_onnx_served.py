"""A default export, cut without a flag and served: the answers of a real client are those of ONNX Runtime on the whole file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.commands.cut import read_photos
from tests.fakes.onnx_models import NAMES, detector
from tests.fakes.server_running import child, environment
from tests.unit.cutting.test_cut_onnx import whole


@pytest.mark.parametrize("form", [{}, {"batch": "batch", "half": True}, {"done": "nms"}], ids=["default", "dynamic fp16", "nms"])
def test_from_a_file_to_named_boxes(form: dict[str, object], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(1)
    for number, (width, height) in enumerate([(80, 60), (64, 64), (50, 90)]):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(photos / f"{number}.png"), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    model = detector(tmp_path / "model.onnx", **form)  # type: ignore[arg-type]
    assert main(["cut", f"onnx:{model}", "--out", str(tmp_path / "b"), "--photos", str(photos)]) == 0
    bundle = open_bundle(tmp_path / "b")
    results = tmp_path / "results.jsonl"
    with child(tmp_path, tmp_path / "b") as server:
        line = [
            sys.executable,
            "-m",
            "edge_client.cli",
            "--camera",
            str(photos),
            "--server",
            server.address,
            "--output",
            str(results),
        ]
        run = subprocess.run(
            line,
            env={**environment(), "HEADTAIL_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    frames = [json.loads(text) for text in results.read_text().splitlines()]
    assert [f["outcome"] for f in frames] == ["result"] * 3
    found = 0
    for frame, photo in zip(frames, read_photos(photos, 3), strict=True):
        wanted = whole(model, photo, bundle)
        for box in frame["detections"]:
            assert box["label"] == NAMES[box["class_id"]]
            assert any(
                kind == box["class_id"]
                and abs(score - box["score"]) <= 0.005
                and np.abs(np.subtract(source, box["box_px"])).max() <= 0.5
                for kind, score, source in wanted
            ), f"{box} is no box of the whole file"
        found += len(frame["detections"])
    assert found
