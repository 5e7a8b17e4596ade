"""When splitting pays: the rule, its break-even lines, and the verb on a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from protos.errors import BundleError, ConfigError
from splitters.bundle import Bundle
from splitters.cli import main
from splitters.profiling.bundle_ways import bundle_ways
from splitters.profiling.paying import ALIKE, Kind, Place, Way, best, latency_ms, slowest_alone, stretches, told, ways_of
from splitters.profiling.table import Profile

PLACE = Place(rtt_ms=20, deadline_ms=100)


def way(kind: Kind, accuracy: float, device_ms: float = 1.0, sent_bytes: float = 0, server_ms: float = 0.0) -> Way:
    return Way(kind=kind, name=kind, accuracy=accuracy, device_ms=device_ms, sent_bytes=sent_bytes, server_ms=server_ms)


ALONE, SPLIT, OFFLOAD = way("alone", 0.7, 10), way("split", 0.7, 2, 1000, 5), way("offload", 0.7, 0.1, 10_000, 12)
WAYS = [OFFLOAD, SPLIT, ALONE]


def chosen(ways: list[Way], slowdown: float, bitrate_bps: float) -> str:
    i = int(best(ways, PLACE, slowdown, bitrate_bps))
    return ways[i].kind if i >= 0 else "none"


def test_equally_accurate_ways_are_told_apart_by_what_they_send() -> None:
    assert chosen(WAYS, 10, 1e8) == "alone"  # 100 ms: just in time
    assert chosen(WAYS, 10.1, 1e8) == "split"
    assert chosen(WAYS, 36, 1e8) == "split"  # 72 + 20 + 5 + .08
    assert chosen(WAYS, 38, 1e8) == "offload"
    assert chosen(WAYS, 38, 1.24e6) == "none"  # 3.8 + 20 + 12 + 8e7 / bps
    assert chosen(WAYS, 38, 1.25e6) == "offload"


def test_more_accuracy_is_worth_bytes_but_less_than_half_a_point_is_not() -> None:
    better, same = way("split", 0.7 + 2 * ALIKE, 2, 1000, 5), way("split", 0.7 + ALIKE / 2, 2, 1000, 5)
    assert chosen([ALONE, better], 1, 1e6) == "split"
    assert chosen([ALONE, same], 1, 1e6) == "alone"
    assert chosen([ALONE, better], 1, 1e4) == "alone"  # 800 ms on the link


def test_a_grid_is_chosen_as_its_cells_are() -> None:
    slow, bps = np.array([[1.0], [12.0], [60.0]]), np.array([[1e4, 1e5, 1e6, 1e7]])
    grid = best(WAYS, PLACE, slow, bps)
    assert grid.shape == (3, 4)
    for r, s in enumerate(slow[:, 0]):
        for c, b in enumerate(bps[0]):
            assert grid[r, c] == int(best(WAYS, PLACE, s, b))
    assert latency_ms(SPLIT, np.asarray(2.0), np.asarray(1e6), 20) == pytest.approx(4 + 20 + 8 + 5)


def test_stretches_end_at_break_even() -> None:
    found = stretches(WAYS, PLACE, 20)
    assert [s.kind for s in found] == [None, "split"]
    # 40 + 20 + 5 + 8e6 / bps = 100
    assert found[1].from_bps == pytest.approx(8e6 / 35, rel=0.01)
    assert slowest_alone(WAYS, 100) == 10
    assert slowest_alone([SPLIT], 100) == 0


def test_the_answer_in_words_says_what_is_best() -> None:
    text = "\n".join(told(WAYS, PLACE, 20, 1e6))
    assert "up to 10 times slower" in text
    assert "nothing in time" in text
    assert "at 1 Mbit/s: split (split): accuracy 0.700, 1,000 bytes, 73 ms" in text
    assert "nothing meets the deadline" in told(WAYS, PLACE, 1000, 1e4)[-1]


@pytest.mark.parametrize(("slowdown", "bitrate_bps"), [(0.0, 1e6), (1.0, 0.0), (float("nan"), 1e6)])
def test_impossible_places_are_refused(slowdown: float, bitrate_bps: float) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        best(WAYS, PLACE, slowdown, bitrate_bps)
    with pytest.raises(ConfigError, match="deadline_ms positive"):
        Place(rtt_ms=1, deadline_ms=0)


def test_a_model_that_is_cut_as_it_is_answers_alike_everywhere() -> None:
    profile = Profile(
        model="m", rows=(), input_bytes=10, picture_bytes=9, total_macs=1, local_ms=4.0, local_torch_ms=3.0, notes=()
    )  # fmt: skip
    alone, offload = ways_of(profile)
    assert (alone.kind, alone.device_ms, alone.sent_bytes) == ("alone", 4.0, 0)
    assert (offload.kind, offload.server_ms, offload.sent_bytes, offload.accuracy) == ("offload", 3.0, 9, alone.accuracy)


def test_a_bundle_has_a_way_for_each_point_and_none_is_better_than_the_whole_model(bundle: Bundle) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (64, 80, 3)).astype(np.uint8)
    ways = bundle_ways(bundle, frame)
    splits = [w for w in ways if w.kind == "split"]
    assert [w.sent_bytes for w in splits] == [p.payload_bytes.p50 for p in bundle.points]
    assert all(w.device_ms > 0 and w.server_ms > 0 for w in splits)
    whole = [w.accuracy for w in ways if w.name == "whole model"]
    assert all(w.accuracy <= max(whole, default=1.0) for w in ways)
    assert len({w.accuracy for w in bundle_ways(bundle, frame, same_accuracy=True)}) == 1


def test_a_bundle_without_a_measured_table_is_refused(bundle: Bundle) -> None:
    from dataclasses import replace

    bare = replace(bundle, points=tuple(replace(p, accuracy_metric="unmeasured") for p in bundle.points))
    with pytest.raises(BundleError, match="were not measured"):
        bundle_ways(bare, np.zeros((64, 64, 3), np.uint8))


def test_the_verb_answers_for_a_bundle_and_draws(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage")
    picture = tmp_path / "pays.png"
    asked = ["profile", str(bundle.path), "--bitrate-bps", "1e6", "--device-slowdown", "3", "--pays", str(picture), "--json"]
    assert main(asked) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    told_json = json.loads(lines[-1])
    assert {w["kind"] for w in told_json["ways"]} >= {"split"}
    assert told_json["stretches"][0]["from_bps"] == pytest.approx(1e4)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["profile", str(bundle.path), "--plot", str(picture)]) == 2
    assert "is cut already" in capsys.readouterr().err
