"""The prefilter: network, targets, and what its calibration promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from protos.errors import ConfigError, ModelError
from splitters.evaluation.gating.prefilter import passage_scores, passages, roc, roc_auc
from splitters.training.prefilter.loop import heat_targets, held_out, prefilter_loss
from splitters.zoo.prefilter.network import CATEGORY_IDS, WEIGHTS, InterestScore, Prefilter, columns_of, load_prefilter
from splitters.zoo.prefilter.promise import RECALLS, clopper_pearson_lower, promises, threshold_for
from tests.bench.prefilter_report import draw_curves


def test_shapes_and_the_interest_column() -> None:
    torch.manual_seed(0)
    model = Prefilter().eval()
    stem = torch.rand(2, 32, 112, 112) * 6
    heat, logits = model.judge(model.features(stem))
    assert tuple(heat.shape) == (2, 8, 14, 14)
    scores = InterestScore(model, [0, 2])(stem)
    assert tuple(scores.shape) == (2, 9)
    assert torch.allclose(scores[:, -1], logits[:, [0, 2]].sigmoid().amax(1))


def test_it_is_small() -> None:
    assert sum(p.numel() for p in Prefilter().parameters()) < 130_000


def test_names_of_interest() -> None:
    assert columns_of(["person", "car"]) == [0, 2]
    with pytest.raises(ConfigError, match="needs training"):
        columns_of(["zebra"])
    with pytest.raises(ConfigError, match="no COCO class"):
        columns_of(["unicorn"])
    with pytest.raises(ConfigError, match="at least one"):
        columns_of([])


def test_targets_warm_the_right_cells() -> None:
    boxes = [np.asarray([[32, 32, 96, 64, 0, 0.7], [4, 4, 12, 12, 2, 1.0], [0, 0, 64, 64, 70, 1.0]], np.float32)]
    heat, image = heat_targets(boxes, CATEGORY_IDS, 128, 16)
    assert tuple(heat.shape) == (1, 8, 8, 8)
    hot = (heat[0, 0] > 0).nonzero().tolist()
    assert {(r, c) for r, c in hot} == {(2, 3), (2, 4), (2, 5), (3, 3), (3, 4), (3, 5)}
    assert heat[0, 0].max().item() == pytest.approx(0.7)
    assert image[0, 0].item() == pytest.approx(0.7)
    assert heat[0, 2, 0, 0].item() == 1  # a small box still warms its cell …
    assert torch.isnan(image[0, 2])  # … but does not decide whether the picture holds anything
    assert image[0, 1].item() == 0


def test_a_few_steps_learn_where_the_light_is() -> None:
    torch.manual_seed(0)
    model = Prefilter(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    stem = torch.zeros(4, 32, 64, 64)
    stem[0, :, 16:32, 16:32] = 5
    stem[1, :, 40:56, 8:24] = 5
    boxes = [np.asarray([[32, 32, 64, 64, 0, 1.0]]), np.asarray([[16, 80, 48, 112, 0, 1.0]]), np.zeros((0, 6)), np.zeros((0, 6))]
    heat, image = heat_targets([b.astype(np.float32) for b in boxes], (1,), 128, 8)
    features = model.features(stem)
    for _ in range(30):
        loss = prefilter_loss(model, features, heat, image)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    logits = model(stem)[:, 0]
    assert logits[:2].min() > logits[2:].max() + 1


def test_clopper_pearson_known_values() -> None:
    assert clopper_pearson_lower(0, 10) == 0
    assert clopper_pearson_lower(10, 10) == pytest.approx(0.05 ** (1 / 10))
    assert clopper_pearson_lower(95, 100) == pytest.approx(0.8977, abs=1e-3)
    with pytest.raises(ConfigError):
        clopper_pearson_lower(3, 2)


def test_calibration_takes_the_highest_threshold_that_keeps_the_promise() -> None:
    scores = np.linspace(0.01, 1, 500)
    promise = threshold_for(scores, 0.95)
    assert promise.kept
    assert promise.missed == int((scores < promise.threshold).sum())
    assert clopper_pearson_lower(500 - promise.missed - 1, 500) < 0.95 <= promise.recall_promised


def test_too_few_units_promise_what_they_can() -> None:
    promise = threshold_for([0.3, 0.9], 0.98)
    assert not promise.kept
    assert promise.threshold == 0.3
    assert promise.recall_promised == pytest.approx(0.05**0.5)
    with pytest.raises(ConfigError, match="at least one"):
        threshold_for([], 0.98)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        threshold_for([0.5], 1.0)


def test_the_promise_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(400):
        threshold = threshold_for(rng.normal(size=200), 0.9).threshold
        # The true recall of a standard normal score at that threshold, from many fresh draws.
        kept.append(np.mean(np.sort(rng.normal(size=4000)) >= threshold) >= 0.9)
    assert np.mean(kept) >= 0.92  # 95 % less the noise of 400 trials


def test_equal_scores_pass_together() -> None:
    promise = threshold_for([0.5] * 300, 0.9)
    assert (promise.threshold, promise.missed) == (0.5, 0)


def test_passages_join_over_short_gaps() -> None:
    positive = np.zeros(40, bool)
    positive[[3, 4, 5, 8, 30, 31]] = True
    runs = passages(positive, gap=3)
    assert [r.tolist() for r in runs] == [[3, 4, 5, 8], [30, 31]]
    assert passages(np.zeros(5, bool), gap=1) == []
    scores = np.zeros(40)
    scores[[3, 4, 5, 8]] = 0.1, 0.9, 0.8, 0.7
    scores[[30, 31]] = 0.4, 0.6
    assert passage_scores(scores, runs, 0.98).tolist() == [0.1, 0.4]
    assert passage_scores(scores, runs, 0.75).tolist() == [0.7, 0.4]


def test_roc_by_hand(tmp_path: Path) -> None:
    scores, positive = np.asarray([0.9, 0.8, 0.8, 0.1]), np.asarray([True, True, False, False])
    false_share, recall, precision = roc(scores, positive)
    assert false_share.tolist() == [0, 0.5, 1]
    assert recall.tolist() == [0.5, 1, 1]
    assert precision.tolist() == pytest.approx([1, 2 / 3, 0.5])
    assert roc_auc(scores, positive) == pytest.approx(0.875)
    with pytest.raises(ConfigError):
        roc_auc(scores, np.ones(4, bool))
    pytest.importorskip("matplotlib")
    draw_curves({"one": (scores, positive)}, tmp_path / "deep" / "curve.png")
    assert (tmp_path / "deep" / "curve.png").stat().st_size > 5000


def test_held_out_share_is_stable() -> None:
    chosen = [i for i in range(4000) if held_out(i, 0.15)]
    assert 0.12 < len(chosen) / 4000 < 0.18
    assert chosen == [i for i in range(4000) if held_out(i, 0.15)]


def test_weights_round_trip_and_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="train them with"):
        load_prefilter(tmp_path / "none.safetensors")
    model = Prefilter(2)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "two.safetensors", {"category_ids": "1,3"})
    loaded, ids = load_prefilter(tmp_path / "two.safetensors")
    assert ids == (1, 3)
    assert torch.allclose(loaded.heat.weight, model.heat.weight, atol=1e-3)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="does not hold"):
        load_prefilter(tmp_path / "other.safetensors")


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no prefilter weights in this tree")
def test_committed_weights_load() -> None:
    model, ids = load_prefilter()
    assert ids == CATEGORY_IDS
    assert torch.isfinite(model(torch.zeros(1, 32, 160, 160))).all()


def test_promises_count_only_photos_with_something_of_interest() -> None:
    rng = np.random.default_rng(0)
    confidence = np.zeros((400, 3))
    confidence[:300, 1] = 1.0
    confidence[300:, 2] = 0.4  # not sure enough to count
    scores = np.clip(confidence * 0.5 + rng.uniform(0, 0.5, confidence.shape), 0, 1)
    found = promises(scores, confidence, [1, 2])
    assert [c.units for c in found] == [300] * 8
    assert all(c.kept for c in found)
    assert [c.threshold for c in found] == sorted((c.threshold for c in found), reverse=True)


def test_what_was_measured_of_other_weights_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from splitters.bundle import sha256_file
    from splitters.zoo.detector.network import WEIGHTS
    from splitters.zoo.prefilter import export as prefilter_export
    from splitters.zoo.prefilter.promise import SURE

    file = tmp_path / "sure.json"
    monkeypatch.setattr(prefilter_export, "SURE_OF_DETECTOR", file)
    assert prefilter_export.sure_score(WEIGHTS) == SURE
    file.write_text(json.dumps({"score": 0.31, "weights_sha256": "0" * 64}))
    assert prefilter_export.sure_score(WEIGHTS) == SURE
    file.write_text(json.dumps({"score": 0.31, "weights_sha256": sha256_file(WEIGHTS)}))
    assert prefilter_export.sure_score(WEIGHTS) == 0.31


def test_a_detectors_boxes_are_right_where_an_object_of_their_class_lies() -> None:
    from splitters.tasks.decoding.boxes import Detections
    from splitters.training.detector.data import Example
    from splitters.training.prefilter.sure import judged

    boxes = np.array([[10, 10, 50, 50], [10, 10, 50, 50], [100, 100, 140, 140], [60, 60, 90, 90]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.8, 0.7, 0.6], np.float32), np.array([1, 3, 1, 44]))
    truth = np.array([[12, 12, 50, 52, 0, 1.0], [100, 100, 140, 140, 0, 0.3]], np.float32)  # persons; the second is only suspected
    example = Example(image=np.zeros((200, 200, 3), np.uint8), boxes=truth, source="coco/train")
    rows = judged(lambda _image: found, example)
    assert rows == [(pytest.approx(0.9), True), (pytest.approx(0.8), False), (pytest.approx(0.7), False)]


def test_every_class_and_group_has_a_promise_of_its_own() -> None:
    from splitters.zoo.prefilter.export import GROUPS, HELD_OUT, INTEREST, prefilter_promise
    from splitters.zoo.prefilter.network import CATEGORY_IDS

    if not HELD_OUT.is_file():
        pytest.skip("the prefilter is not trained")
    told = prefilter_promise(INTEREST, CATEGORY_IDS, 0.98)
    sets = {frozenset(g["interest"]): g for g in told["calibrated"]}
    assert len(sets) == len(told["calibrated"])
    assert {g["name"]: tuple(g["interest"]) for g in told["calibrated"] if g["name"]} == GROUPS
    for names in [*GROUPS.values(), ("car",), ("dog",), (*GROUPS["person"], *GROUPS["vehicle"])]:
        found = sets[frozenset(names)]
        assert 0 < found["recall_promised"] <= 1
        assert 0 < found["threshold"] < 1
        assert found["units"] > 0
        assert [r["recall_asked"] for r in found["recalls"]] == list(RECALLS)
        thresholds = [r["threshold"] for r in found["recalls"]]
        assert thresholds == sorted(thresholds, reverse=True)
    assert sets[frozenset(GROUPS["person"])]["kept"], "people are in enough of the photos for .98"
