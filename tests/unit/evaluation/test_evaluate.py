"""BD-rate, fronts, image codecs, labels: the arithmetic of the comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from protos.errors import ConfigError, SourceError
from protos.messages import Classification, ClassScore
from splitters.evaluation.bdrate import Curve, bd_rate, compare, front, resample
from splitters.evaluation.image_codecs import Setting, decode, encode, ladder
from splitters.evaluation.judging.tasks import TopOne, list_images, read_labels


def curve(scale: float, photos: int = 200, shift: float = 0.0, seed: int = 1, draws: int = 100) -> Curve:
    rng = np.random.default_rng(seed)
    accuracies = np.array([0.5, 0.6, 0.7, 0.78, 0.8]) + shift
    sizes = scale * np.outer([500, 900, 1600, 3000, 6000], rng.uniform(0.9, 1.1, photos))
    hits = np.stack([rng.permutation(photos) < a * photos for a in accuracies]).astype(float)
    counts = resample(photos, draws)
    return Curve(
        name="c", labels=tuple("abcde"), sizes=sizes, accuracy=hits.mean(axis=1), drawn=hits @ counts.T / photos, counts=counts
    )


def test_half_the_bytes_at_every_accuracy_is_minus_fifty_percent() -> None:
    percent, low, high = bd_rate(curve(1.0).points(), curve(0.5).points())
    assert percent == pytest.approx(-50.0)
    assert (low, high) == (pytest.approx(0.5), pytest.approx(0.8))


def test_bd_rate_is_symmetric_in_logarithms() -> None:
    a, b = curve(1.0).points(), curve(0.7, shift=0.02).points()
    there, back = bd_rate(a, b)[0], bd_rate(b, a)[0]
    assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1.0)


def test_curves_without_common_accuracy_are_an_error_not_a_number() -> None:
    with pytest.raises(ConfigError, match="share no accuracy"):
        bd_rate(curve(1.0).points(), curve(1.0, shift=-0.45).points())


def test_a_single_point_is_an_error() -> None:
    with pytest.raises(ConfigError, match="fewer than two"):
        bd_rate(curve(1.0).points()[:1], curve(1.0).points())


def test_front_drops_what_costs_more_and_gives_no_more() -> None:
    points = np.array([[100, 0.5], [200, 0.4], [200, 0.6], [300, 0.6], [50, 0.1]])
    assert front(points).tolist() == [[50, 0.1], [100, 0.5], [200, 0.6]]


def test_the_bootstrap_interval_holds_the_value_and_narrows_with_photos() -> None:
    few, many = (compare(curve(1.0, n), curve(0.6, n, seed=2)) for n in (60, 2000))
    for rate in (few, many):
        assert rate.low <= rate.percent <= rate.high
    assert many.high - many.low < few.high - few.low


def test_curves_of_different_photos_are_refused() -> None:
    with pytest.raises(ConfigError, match="same photos"):
        compare(curve(1.0, 100), curve(1.0, 90))


@pytest.fixture
def picture() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:96]
    return np.stack([x * 2, y * 3, (x + y) % 255], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("codec", ["jpeg", "webp", "avif"])
def test_image_codecs_keep_the_picture_and_its_size(codec: str, picture: np.ndarray) -> None:
    fine, coarse = (encode(picture, Setting(codec=codec, quality=q, size_px=64)) for q in (90, 5))
    small = encode(picture, Setting(codec=codec, quality=90, size_px=32))
    assert len(coarse) < len(fine)
    assert len(small) < len(fine)
    for data in (fine, small):
        restored = decode(data, 64, 96)
        assert restored.shape == picture.shape
    error = np.abs(decode(fine, 64, 96)[:, :80].astype(int) - picture[:, :80]).mean()
    assert error < 12


def test_of_a_letterboxed_input_the_content_is_reduced_in_the_inputs_own_scale(picture: np.ndarray) -> None:
    setting = Setting(codec="webp", quality=60, size_px=48)  # half of an input of 96 px
    data = encode(picture, setting, input_px=96)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.size == (48, 32)
    assert {s.size_px for s in ladder("jpeg", 416, detector=True)} == {208, 258, 333, 416}


def test_the_ladder_covers_every_size_and_refuses_unknown_codecs() -> None:
    settings = ladder("jpeg", 224, (10, 50))
    assert {s.size_px for s in settings} == {128, 160, 192, 224}
    assert len(settings) == 8
    with pytest.raises(ConfigError, match="gif"):
        ladder("gif", 224)


def answer(class_id: int) -> Classification:
    return Classification(top=(ClassScore(class_id=class_id, score=0.9), ClassScore(class_id=99, score=0.1)))


def test_top_one_counts_the_first_class_over_drawn_photos() -> None:
    judge = TopOne(metric="top1", files=(Path("a"), Path("b"), Path("c")), wanted=(1, 2, 3))
    score = judge.score([answer(1), answer(2), answer(7)], np.array([[0, 0, 3], [1, 2, 0]], np.int32))
    assert score.value == pytest.approx(2 / 3)
    assert score.drawn.tolist() == [0.0, 1.0]
    assert judge.only([2]).wanted == (3,)


def test_labels_are_found_by_name_or_relative_path(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    files = [tmp_path / "x" / "a.jpg", tmp_path / "b.jpg", tmp_path / "c.jpg"]
    for f in files:
        f.write_bytes(b"")
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"x/a.jpg": 3, "b.jpg": 0}))
    judge = read_labels(labels, list_images(tmp_path), tmp_path)
    assert dict(zip([f.name for f in judge.files], judge.wanted, strict=True)) == {"a.jpg": 3, "b.jpg": 0}


@pytest.mark.parametrize("text", ["[1]", '{"a": "cat"}', "no json"])
def test_bad_labels_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    labels = tmp_path / "labels.json"
    labels.write_text(text)
    with pytest.raises(ConfigError):
        read_labels(labels, list_images(tmp_path), tmp_path)


def test_no_photo_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image"):
        list_images(tmp_path)
