"""What payloads cost is learnt: by kind of choice, by the reference's age, by choice; forgotten slowly; in virtual time."""

from __future__ import annotations

import random
from itertools import pairwise
from math import exp

import pytest

from deploy.testbed.clip import ClipSizes
from deploy.testbed.scenario import Direction, Scenario
from deploy.testbed.simulate.run import simulate
from deploy.testbed.workload import Workload
from edge_client.control import ControlConfig, Controller, LocalOption, Offload, OffloadOption, Split
from edge_client.control.estimating.sizes import PayloadSizes
from edge_client.device.references import ReferenceAges
from splitters.bundle.operating_point import OperatingPoint, Quantiles

MS, S = 1_000_000, 1_000_000_000
TABLE = {f"split {i}": Quantiles(p50=500.0 * 2**i, p95=600.0 * 2**i) for i in range(4)} | {"jpeg 50": Quantiles(p50=8000, p95=9000)}
KINDS = {name: name.partition(" ")[0] for name in TABLE}


def feed(sizes: PayloadSizes, name: str, age: int, ratio: float, frames: int, *, start_ns: int = 0, noise: float = 0.1) -> int:
    """So many frames at 10 fps whose sizes scatter about a share of the table's; returns when the last one came."""
    rng = random.Random(f"{name}/{age}/{ratio}")
    at_ns = start_ns
    for _ in range(frames):
        at_ns += 100 * MS
        sizes.learn(name, age, max(1, int(TABLE[name].p50 * ratio * exp(rng.gauss(0, noise)))), at_ns)
    return at_ns


def ratio(sizes: PayloadSizes, name: str, age: int, now_ns: int) -> float:
    return sizes.expect(name, age, now_ns).p50 / TABLE[name].p50


def test_before_the_first_payload_the_table_is_believed() -> None:
    sizes = PayloadSizes(TABLE, KINDS)
    assert sizes.expect("split 1", 0, 0) == TABLE["split 1"]
    assert sizes.expect("jpeg 50", 0, 0) == TABLE["jpeg 50"]
    assert ratio(sizes, "split 1", 1, 0) < 1, "what is predicted is smaller than a still"


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0, 3.0])
def test_a_second_of_frames_teaches_what_they_cost(share: float) -> None:
    sizes = PayloadSizes(TABLE, KINDS)
    now_ns = feed(sizes, "split 1", 1, share, 10)
    assert ratio(sizes, "split 1", 1, now_ns) == pytest.approx(share, rel=0.15)


def test_what_one_point_costs_tells_of_those_never_tried_and_of_nothing_else() -> None:
    sizes = PayloadSizes(TABLE, KINDS)
    now_ns = feed(sizes, "split 0", 1, 0.05, 20)
    assert ratio(sizes, "split 3", 1, now_ns) == pytest.approx(0.05, rel=0.35)
    assert sizes.expect("jpeg 50", 0, now_ns) == TABLE["jpeg 50"]
    assert ratio(sizes, "split 3", 0, now_ns) == 1, "a key frame is another matter"


def test_an_older_reference_costs_more_once_that_was_seen() -> None:
    sizes = PayloadSizes(TABLE, KINDS)
    now_ns = feed(sizes, "split 0", 1, 0.1, 20)
    assert ratio(sizes, "split 0", 4, now_ns) == pytest.approx(0.1, rel=0.2), "nothing better is known"
    now_ns = feed(sizes, "split 0", 4, 0.3, 10, start_ns=now_ns)
    assert ratio(sizes, "split 2", 4, now_ns) == pytest.approx(0.3, rel=0.35)
    assert ratio(sizes, "split 0", 1, now_ns) == pytest.approx(0.1, rel=0.35), "the younger one is as it was"


def test_key_frames_between_them_do_not_move_what_predicted_frames_cost() -> None:
    sizes = PayloadSizes(TABLE, KINDS)
    now_ns = feed(sizes, "split 1", 1, 0.05, 20)
    before = ratio(sizes, "split 1", 1, now_ns)
    now_ns = feed(sizes, "split 1", 0, 1.2, 5, start_ns=now_ns)
    assert ratio(sizes, "split 1", 1, now_ns) == pytest.approx(before, rel=0.02)
    assert ratio(sizes, "split 1", 0, now_ns) == pytest.approx(1.2, rel=0.15)


def test_a_scene_cut_moves_little_and_another_scene_everything() -> None:
    sizes = PayloadSizes(TABLE, KINDS)
    now_ns = feed(sizes, "split 1", 1, 0.05, 40)
    sizes.learn("split 1", 1, int(TABLE["split 1"].p50), now_ns + 100 * MS)
    assert ratio(sizes, "split 1", 1, now_ns + 100 * MS) < 0.05 * 1.25, "one frame coded whole"
    now_ns = feed(sizes, "split 1", 1, 0.05, 5, start_ns=now_ns + 100 * MS)
    now_ns = feed(sizes, "split 1", 1, 0.4, 6, start_ns=now_ns)
    assert ratio(sizes, "split 1", 1, now_ns) == pytest.approx(0.4, rel=0.25), "within six frames of the new scene"


def test_a_point_has_its_own_share_and_it_fades_so_that_it_is_tried_again() -> None:
    sizes = PayloadSizes(TABLE, KINDS)
    now_ns = 0
    for _ in range(10):
        now_ns = feed(sizes, "split 0", 1, 0.05, 3, start_ns=now_ns)
        now_ns = feed(sizes, "split 3", 1, 0.1, 3, start_ns=now_ns)
    assert ratio(sizes, "split 0", 1, now_ns) == pytest.approx(0.05, rel=0.2)
    assert ratio(sizes, "split 3", 1, now_ns) == pytest.approx(0.1, rel=0.2)
    dear = ratio(sizes, "split 3", 1, now_ns) / ratio(sizes, "split 1", 1, now_ns)
    now_ns = feed(sizes, "split 1", 1, 0.07, 1800, start_ns=now_ns)
    later = ratio(sizes, "split 3", 1, now_ns) / ratio(sizes, "split 1", 1, now_ns)
    assert abs(later - 1) < 0.3 * (dear - 1)


def test_stills_that_the_table_is_right_about_stay_as_they_are() -> None:
    sizes, rng, seen = PayloadSizes(TABLE, KINDS), random.Random(0), []
    for i in range(400):
        sizes.learn("split 2", 0, int(TABLE["split 2"].p50 * exp(rng.gauss(0, 0.11))), i * 100 * MS)
        seen.append(ratio(sizes, "split 2", 0, i * 100 * MS))
    assert sum(seen) / len(seen) == pytest.approx(1, abs=0.03)
    assert max(abs(b / a - 1) for a, b in pairwise(seen[20:])) < 0.1
    expected = sizes.expect("split 2", 0, 40 * S)
    assert expected.p95 / expected.p50 == pytest.approx(1.2, rel=0.15), "the spread is learnt, too"


def test_absurd_sizes_and_strange_names_do_no_harm() -> None:
    sizes = PayloadSizes(TABLE | {"split 9": Quantiles(p50=0, p95=0)}, KINDS | {"split 9": "split"})
    for i, n_bytes in enumerate([0, -5, 1, 10**12] * 50):
        sizes.learn("split 1", 1, n_bytes, (100 - i) * MS)  # the clock may even run backwards
        sizes.learn("split 9", 1, n_bytes, i)
        sizes.learn("no such", 1, n_bytes, i)
    found = sizes.expect("split 1", 10**9, 0)
    assert 0 < found.p50 <= found.p95 < 1e12
    assert sizes.expect("split 9", 1, 0) == Quantiles(p50=0, p95=0)


POINTS = tuple(
    OperatingPoint(
        id=i, channels=8, bits=4, payload_bytes=TABLE[f"split {i}"], accuracy=0.5 + 0.08 * i, head_ms=Quantiles(p50=4, p95=5)
    )
    for i in range(4)
)


def test_the_controller_sends_what_the_link_carries_not_what_the_table_says() -> None:
    chosen, believed = {}, {}
    for learn in (True, False):
        c = Controller(ControlConfig(fps=10, learn_sizes=learn, explain=True), POINTS)
        c.estimator.on_connect(0)
        for i in range(100):
            now_ns = i * 100 * MS
            c.on_reference(0 if i == 0 else 1)
            decision = c.decide(i, now_ns, now_ns + 200 * MS)
            if isinstance(decision, Split):
                n_bytes = int(TABLE[decision.name].p50 * (0.05 if i else 1))
                c.on_payload(decision, n_bytes, now_ns + 4 * MS)
                c.on_sent(i, n_bytes, now_ns + 4 * MS)
                c.on_ack(i, now_ns + 64 * MS + int(8e9 * n_bytes / 40_000), 10 * MS)
            chosen[learn] = decision
            assert decision.explain is not None
            believed[learn] = {x.name: x.payload_bytes for x in decision.explain.candidates}
    assert chosen[True].name == "split 3", "200 bytes take 40 ms of 100"
    assert believed[False]["split 2"] == TABLE["split 2"].p95
    assert believed[True]["split 2"] < 0.1 * TABLE["split 2"].p95, "though it was never tried"


def clip(share: float, frames: int = 30) -> ClipSizes:
    rng = random.Random(1)
    sizes = {
        f"split {p.id}": {
            age: [max(20, int(p.payload_bytes.p50 * level * exp(rng.gauss(0, 0.2)))) for _ in range(frames)]
            for age, level in ((0, 1.0), (1, share), (2, 1.4 * share), (4, 2 * share))
        }
        for p in POINTS
    }
    return ClipSizes(clip="yard", fps=10, sizes=sizes)


@pytest.mark.parametrize("mbps", [0.05, 0.1])
def test_on_video_a_fixed_split_beats_ours_no_more(mbps: float) -> None:
    workload = Workload(name="yard", points=POINTS, local=LocalOption(accuracy=0.3, ms=Quantiles(p50=6, p95=7)), clip=clip(0.05))
    scenario = Scenario(duration_s=20, device_slowdown=1, grants=False, uplink=Direction(mbps=mbps, delay_ms=40))
    scores = {policy: simulate(scenario, workload, policy).summary().score for policy in ("ours", "ours_table", "split_fixed")}
    assert scores["ours"] >= 0.98 * scores["split_fixed"]
    assert scores["ours"] >= 1.1 * scores["ours_table"], "the table's sizes were believed before"


def test_the_oracle_of_a_clip_is_refused_rather_than_wrong(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    from deploy.testbed.cli import main

    assert main(["run", "step", "--clip", str(tmp_path), "--mode", "shape"]) == 2
    assert "--frames names the video" in capsys.readouterr().err


def test_sizes_of_an_age_not_measured_are_the_nearest_ones() -> None:
    found = ClipSizes(clip="x", fps=10, sizes={"split 0": {0: [1000, 1001], 1: [10], 4: [40]}, "jpeg 50": {0: [7]}})
    assert [found.bytes_of("split 0", age, 1) for age in (0, 1, 2, 3, 4, 99)] == [1001, 10, 10, 40, 40, 40]
    assert found.bytes_of("jpeg 50", 3, 5) == 7
    assert found.bytes_of("split 7", 1, 0) is None


def test_the_reference_is_as_old_as_the_frames_captured_since() -> None:
    ages = ReferenceAges()
    assert ages.age(None, 5) == 0
    ages.sent(70, 5)
    assert ages.age(70, 9) == 4
    assert ages.age(71, 9) == 0
    for i in range(1000):
        ages.sent(100 + i, i)
    assert ages.age(70, 9) == 0


def test_offloaded_pictures_learn_beside_splits() -> None:
    offload = OffloadOption(
        format="jpeg", quality=50, payload_bytes=TABLE["jpeg 50"], accuracy=0.9, encode_ms=Quantiles(p50=2, p95=3)
    )
    c = Controller(ControlConfig(fps=10, explain=True), POINTS, offloads=[offload])
    c.estimator.on_connect(0)
    choice = Offload(format="jpeg", quality=50)
    for i in range(20):
        c.on_payload(choice, 16_000, i * 100 * MS)
    explain = c.decide(21, 2100 * MS, 2300 * MS).explain
    assert explain is not None
    assert next(x for x in explain.candidates if x.name == "jpeg 50").payload_bytes == pytest.approx(17_000, rel=0.15)
