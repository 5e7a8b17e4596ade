"""Truth as people write it: other ids, other folders, broken photos, classes nobody has; matched by name and path, or refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_client.gates.floor import bundle_floor
from protos.errors import ConfigError, SourceError
from protos.messages import Box, Classification, ClassScore, Detection
from splitters.bundle import open_bundle
from splitters.cli import main
from splitters.evaluation.bdrate import resample
from splitters.evaluation.judging.agreement import Agreement
from splitters.evaluation.judging.coco import read_instances
from splitters.evaluation.judging.pairing import pair
from splitters.evaluation.judging.tasks import AveragePrecision, list_images, read_labels
from splitters.evaluation.run import EvaluateConfig, evaluate
from tests.fakes.detector_bundle import write_cell_detector, write_cell_photos

pytest.importorskip("pycocotools")


class Cells:
    """A detector whose AP on its photos is known, and their truth."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        self.labels = write_cell_photos(self.images)
        self.bundle = write_cell_detector(folder / "bundle")
        self.truth: dict[str, Any] = json.loads(self.labels.read_text(encoding="utf-8"))

    def whole(self, truth: dict[str, Any] | None = None) -> float:
        self.labels.write_text(json.dumps(truth or self.truth), encoding="utf-8")
        config = EvaluateConfig(images=self.images, labels=self.labels, against=(), draws=10)
        return evaluate(open_bundle(self.bundle.path), config).whole


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cells:
    monkeypatch.setenv("HEADTAIL_CACHE", str(tmp_path / "cache"))
    return Cells(tmp_path)


def test_categories_are_matched_by_name_whatever_their_ids(cells: Cells) -> None:
    before = cells.whole()
    truth = copy.deepcopy(cells.truth)
    order = {c["id"]: 1000 - i for i, c in enumerate(truth["categories"])}
    for category in truth["categories"]:
        category.update(id=order[category["id"]], name=f"  {category['name'].upper()} ")
    for annotation in truth["annotations"]:
        annotation["category_id"] = order[annotation["category_id"]]
    assert cells.whole(truth) == pytest.approx(before) == pytest.approx(1.0)


def _nameless(truth: dict[str, Any]) -> None:
    del truth["categories"][0]["name"]


def _foreign(truth: dict[str, Any]) -> None:
    for i, category in enumerate(truth["categories"]):
        category["name"] = f"screw {i}"


def _namesakes(truth: dict[str, Any]) -> None:
    truth["categories"].append({"id": 77, "name": truth["categories"][0]["name"]})


def _unlisted(truth: dict[str, Any]) -> None:
    truth["annotations"][0]["category_id"] = 4711


def _no_image(truth: dict[str, Any]) -> None:
    truth["annotations"][0]["image_id"] = 4711


def _no_box(truth: dict[str, Any]) -> None:
    truth["annotations"][0]["bbox"] = [1, 2, -3, 4]


def _twice(truth: dict[str, Any]) -> None:
    truth["images"].append({**truth["images"][0], "id": 4711})


def _same_id(truth: dict[str, Any]) -> None:
    truth["images"][1]["id"] = truth["images"][0]["id"]


def _other_pixels(truth: dict[str, Any]) -> None:
    truth["images"][0].update(width=99, height=1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_nameless, "has no name"), (_foreign, "screw"), (_namesakes, "two categories"), (_unlisted, "no such category"),
        (_no_image, "no such image"), (_no_box, "box"), (_twice, "twice"), (_same_id, "same id"), (_other_pixels, "other pixels"),
    ],
)  # fmt: skip
def test_what_disagrees_is_refused(cells: Cells, spoil: Callable[[dict[str, Any]], None], said: str) -> None:
    truth = copy.deepcopy(cells.truth)
    spoil(truth)
    with pytest.raises(ConfigError, match=said):
        cells.whole(truth)


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"images": [{"id": "x"}]}', "[" * 5000, '{"images": 1}'])
def test_what_is_no_instances_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ConfigError, match="COCO"):
        read_instances(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_instances(tmp_path)


def test_objects_of_classes_the_model_does_not_know_are_left_out_with_a_word(
    cells: Cells, caplog: pytest.LogCaptureFixture
) -> None:
    truth = copy.deepcopy(cells.truth)
    truth["categories"].append({"id": 500, "name": "hovercraft"})
    truth["annotations"].append({**truth["annotations"][0], "id": 500, "category_id": 500})
    assert cells.whole(truth) == pytest.approx(1.0)
    assert "hovercraft" in caplog.text


def test_names_are_paths_below_the_folder_or_the_end_of_them(tmp_path: Path) -> None:
    files = [tmp_path / "a/1.jpg", tmp_path / "b/1.jpg", tmp_path / "c/2.jpg", tmp_path / "3.jpg"]

    def told(*names: str) -> dict[str, str]:
        return {f.relative_to(tmp_path).as_posix(): n for f, n in pair(files, tmp_path, names, "labels").items()}

    assert told("a/1.jpg", "b\\1.jpg") == {"a/1.jpg": "a/1.jpg", "b/1.jpg": "b\\1.jpg"}
    assert told("2.jpg", "./3.jpg") == {"c/2.jpg": "2.jpg", "3.jpg": "./3.jpg"}
    assert told("val/c/2.jpg", "val/3.jpg") == {"c/2.jpg": "val/c/2.jpg", "3.jpg": "val/3.jpg"}
    assert told(f"{tmp_path}/a/1.jpg") == {"a/1.jpg": f"{tmp_path}/a/1.jpg"}
    assert told("other.jpg", "x/2.png") == {}
    with pytest.raises(ConfigError, match=r"a/1\.jpg or b/1\.jpg"):
        told("1.jpg")
    with pytest.raises(ConfigError, match="which of them"):
        told("x/2.jpg/../2.jpg", "y/c/2.jpg", "2.jpg")
    with pytest.raises(ConfigError, match="twice"):
        told("3.jpg", "./3.jpg")


def test_photos_in_subfolders_are_found(cells: Cells) -> None:
    truth = copy.deepcopy(cells.truth)
    for image in truth["images"]:
        (cells.images / "sub").mkdir(exist_ok=True)
        (cells.images / image["file_name"]).rename(cells.images / "sub" / image["file_name"])
        image["file_name"] = f"sub/{image['file_name']}"
    assert cells.whole(truth) == pytest.approx(1.0)
    assert cells.whole() == pytest.approx(1.0), "the bare names say it, too, while no two are the same"


def test_broken_photos_are_left_out_by_name(cells: Cells, capsys: pytest.CaptureFixture[str]) -> None:
    first = cells.images / cells.truth["images"][0]["file_name"]
    first.write_bytes(first.read_bytes()[:80])
    (cells.images / f"._{first.name}").write_bytes(b"\x00\x05\x16\x07Mac OS X" + bytes(4000))
    cells.truth["images"].append({"id": 4711, "file_name": f"._{first.name}", "width": 64, "height": 48})
    cells.labels.write_text(json.dumps(cells.truth), encoding="utf-8")
    options = ["--images", str(cells.images), "--labels", str(cells.labels), "--against", "none", "--draws", "10", "--json"]
    assert main(["evaluate", str(cells.bundle.path), *options]) == 0
    out = capsys.readouterr().out.splitlines()
    told = json.loads(out[-1])
    assert told["photos"] == len(cells.truth["images"]) - 2
    assert sorted(Path(p).name for p in told["unreadable"]) == sorted([first.name, f"._{first.name}"])
    assert told["whole_model"] == pytest.approx(1.0)
    assert any("2 photos could not be read" in line for line in out)


def test_progress_counts_every_photo_of_every_setting(cells: Cells) -> None:
    shown: list[tuple[int, int]] = []
    config = EvaluateConfig(images=cells.images, labels=cells.labels, against=("jpeg",), draws=10)
    report = evaluate(open_bundle(cells.bundle.path), config, show=lambda done, total, _: shown.append((done, total)))
    assert [done for done, _ in shown] == list(range(1, len(shown) + 1))
    assert shown[-1][0] == shown[-1][1]
    assert shown[-1][0] > report.photos * (len(report.points) + 16)


def test_the_bundle_learns_from_which_score_on_boxes_are_worth_showing(cells: Cells, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images", str(cells.images), "--labels", str(cells.labels), "--against", "none", "--draws", "10", "--json"]
    assert main(["evaluate", str(cells.bundle.path), *options]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["f1"] == pytest.approx(1.0)
    assert bundle_floor(open_bundle(cells.bundle.path)) == pytest.approx(told["score_min"], abs=1e-4), "the client goes by it"
    report = evaluate(
        open_bundle(cells.bundle.path), EvaluateConfig(images=cells.images, labels=cells.labels, against=(), draws=10)
    )
    assert report.whole == pytest.approx(told["whole_model"]), "AP counts the weak boxes whatever the bundle shows"


def test_the_best_score_is_the_one_of_the_best_f1(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 9, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 9, "bbox": [x, 0, 10, 10]} for x in (0, 20, 40, 60)],
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(truth))
    judge = AveragePrecision(tmp_path / "t.json", [tmp_path / "a.png"], tmp_path, {3: "cat"})

    def box(x: float, score: float, class_id: int = 3) -> Box:
        return Box(class_id=class_id, score=score, box_px=(x, 0.0, x + 10, 10.0))

    # Three right, one wrong below .5, then wrong ones; the box of another class does not count at all.
    found = (box(0, 0.9), box(20, 0.8), box(40, 0.5), box(90, 0.4), box(120, 0.3), box(60, 0.2), box(60, 0.95, class_id=5))
    best = judge.best_score([Detection(boxes=found)])
    assert best is not None
    assert best[0] == pytest.approx(0.5)
    assert best[1] == pytest.approx(2 * 3 / (3 + 4))
    assert judge.best_score([Detection(boxes=())]) is None


@pytest.mark.parametrize("index", [-1, 10, 1000])
def test_a_class_the_model_does_not_have_is_refused(tmp_path: Path, index: int) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": index}))
    with pytest.raises(ConfigError, match=str(index)):
        read_labels(tmp_path / "labels.json", list_images(tmp_path), tmp_path, range(10))


def test_two_photos_of_one_name_need_their_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"a/1.png": 3, "b/1.png": 4}))
    assert read_labels(labels, list_images(tmp_path), tmp_path, range(10)).wanted == (3, 4)
    labels.write_text(json.dumps({"1.png": 3}))
    with pytest.raises(ConfigError, match="may be"):
        read_labels(labels, list_images(tmp_path), tmp_path, range(10))


def test_pictures_are_found_by_what_they_hold(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "picture")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert [f.name for f in list_images(tmp_path)] == ["broken.jpg", "picture"]
    with pytest.raises(SourceError, match="no folder"):
        list_images(tmp_path / "picture")


def test_boxes_agree_where_class_and_place_do() -> None:
    def boxes(*rows: tuple[int, float]) -> Detection:
        return Detection(boxes=tuple(Box(class_id=c, score=0.9, box_px=(x, 0.0, x + 10, 10.0)) for c, x in rows))

    whole = [boxes((1, 0), (1, 50)), boxes(), boxes((2, 0))]
    judge = Agreement(files=(Path("a"), Path("b"), Path("c")), wanted=tuple(whole))
    counts = np.array([[3, 0, 0], [0, 3, 0], [1, 1, 1]], np.int32)
    assert judge.score(whole, counts).value == 1.0
    worse = [boxes((1, 1), (1, 2), (2, 50)), boxes((1, 0)), boxes((2, 0))]  # one twice, one of another class, one too many
    score = judge.score(worse, counts)
    assert score.value == pytest.approx(2 * 2 / (5 + 3))
    assert score.drawn == pytest.approx([2 / 5, 0.0, 0.5])
    assert judge.only([1]).score([boxes()], resample(1, 10)).value == 1.0, "nothing there, nothing found"
    same = [Classification(top=(ClassScore(class_id=1, score=1.0),))]
    assert Agreement(files=(Path("a"),), wanted=tuple(same)).score(same, resample(1, 10)).value == 1.0


def test_a_detector_without_labels_is_judged_by_its_whole_model(cells: Cells) -> None:
    report = evaluate(open_bundle(cells.bundle.path), EvaluateConfig(images=cells.images, against=(), draws=10))
    assert (report.metric, report.whole) == ("agreement", 1.0)
    assert report.points[0].accuracy == pytest.approx(1.0)
    assert report.points[1].accuracy < 1.0
