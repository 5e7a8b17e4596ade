"""AP: our accumulation against pycocotools' own, and its bootstrap."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools")

from protos.errors import ConfigError
from splitters.evaluation.judging.detection import interval, load_truth, score
from splitters.tasks.decoding.boxes import Detections, empty_detections


def scene(tmp_path: Path, photos: int = 12) -> tuple[object, dict[int, Detections]]:
    """Random objects of three classes, crowds among them, and detections that are shifted, doubled, missed or made up."""
    rng = np.random.default_rng(4)
    annotations, found = [], {}
    for image in range(1, photos + 1):
        boxes, scores, classes = [], [], []
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = *rng.uniform(0, 60, 2), *rng.uniform(8, 40, 2)
            category = int(rng.choice([1, 3, 44]))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h,
                 "iscrowd": int(rng.random() < 0.1)}
            )  # fmt: skip
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 3, 4)
                boxes.append([x + shift[0], y + shift[1], x + w + shift[2], y + h + shift[3]])
                scores.append(rng.uniform(0.1, 1))
                classes.append(category if rng.random() < 0.8 else 3)
        order = np.argsort(-np.asarray(scores))
        found[image] = (
            Detections(np.asarray(boxes, np.float32)[order], np.asarray(scores, np.float32)[order], np.asarray(classes)[order])
            if boxes else empty_detections()
        )  # fmt: skip
    text = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in range(1, photos + 1)],
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c)} for c in (1, 3, 44)],
        "info": {},
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(text))
    return load_truth(path), found


def test_equals_pycocotools(tmp_path: Path) -> None:
    from pycocotools.cocoeval import COCOeval

    truth, found = scene(tmp_path)
    ours = score(truth, found)
    rows = [[i, b[0], b[1], b[2] - b[0], b[3] - b[1], s, c] for i, d in found.items() for b, s, c in zip(*d, strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(truth, truth.loadRes(np.asarray(rows, np.float64)), "bbox")  # type: ignore[attr-defined]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert ours.ap() == pytest.approx(judge.stats[0], abs=1e-9)
    assert ours.ap50() == pytest.approx(judge.stats[1], abs=1e-9)
    for row, category in enumerate(ours.category_ids):
        theirs = judge.eval["precision"][:, :, judge.params.catIds.index(category), 0, 2].mean(axis=1)
        assert ours.table()[row] == pytest.approx(theirs, abs=1e-9)
    assert 0.05 < ours.ap() < 0.95


def test_bootstrap_is_paired_and_surrounds_the_figure(tmp_path: Path) -> None:
    truth, found = scene(tmp_path)
    scores = score(truth, found)
    draws = scores.bootstrap(60, seed=1)
    low, high = interval(draws[:, 0])
    assert low < scores.ap() < high
    assert (draws == score(truth, found).bootstrap(60, seed=1)).all()
    assert not (draws == scores.bootstrap(60, seed=2)).all()


def test_a_photo_drawn_twice_counts_like_two_photos(tmp_path: Path) -> None:
    truth, found = scene(tmp_path)
    counts = np.array([[2, 0, 1, 3, 0, 1, 1, 0, 2, 1, 0, 1], [0, 0, 0, 5, 0, 0, 7, 0, 0, 0, 0, 0]], np.int32)
    drawn = score(truth, found).resampled(counts)
    for row, figures in zip(counts, drawn, strict=True):
        photos = [image for image, times in enumerate(row, 1) for _ in range(times)]
        annotations = [
            {**a, "image_id": new, "id": 1000 * new + a["id"]}
            for new, old in enumerate(photos, 1)
            for a in truth.loadAnns(truth.getAnnIds(imgIds=[old]))  # type: ignore[attr-defined]
        ]
        images = [{"id": new, "file_name": f"{new}.jpg", "width": 100, "height": 100} for new in range(1, len(photos) + 1)]
        text = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": c, "name": str(c)} for c in (1, 3, 44)],
            "info": {},
        }
        (tmp_path / "drawn.json").write_text(json.dumps(text))
        copies = score(load_truth(tmp_path / "drawn.json"), {new: found[old] for new, old in enumerate(photos, 1)})
        assert figures == pytest.approx([copies.ap(), copies.ap50()], abs=1e-9)


def test_nothing_found_is_zero_not_an_error(tmp_path: Path) -> None:
    truth, found = scene(tmp_path)
    scores = score(truth, dict.fromkeys(found, empty_detections()))
    assert scores.ap() == 0
    assert scores.ap50([1]) == 0


def test_wrong_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_truth(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}x")
    with pytest.raises(ConfigError, match="no COCO instances file"):
        load_truth(tmp_path / "bad.json")
    truth, _ = scene(tmp_path)
    with pytest.raises(ConfigError, match="none of the photos"):
        score(truth, {999: empty_detections()})
