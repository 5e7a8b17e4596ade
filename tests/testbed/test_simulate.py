"""The simulator: repeatable to the byte, every frame accounted for, and what the control promises on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.testbed.cli import main
from deploy.testbed.link.layering import Layer
from deploy.testbed.scenario import Direction, Scenario, load_scenario, parse_scenario
from deploy.testbed.simulate.oracle import _prune, oracle
from deploy.testbed.simulate.policies import POLICIES
from deploy.testbed.simulate.report import summarise
from deploy.testbed.simulate.run import Run, simulate
from deploy.testbed.study import pairwise_conditions
from deploy.testbed.workload import Workload, load_workload
from edge_client.observe.fairness import jain
from protos.errors import ConfigError

FIXTURES = Path(__file__).parent.parent / "fixtures"
SCENARIOS = Path(__file__).parents[2] / "deploy" / "testbed" / "scenarios"
S = 1_000_000_000


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Invented numbers: these tests are about the machinery."""
    return load_workload(FIXTURES / "placeholder_detector.json")


def record(run: Run) -> list[tuple[object, ...]]:
    return [(f.captured_ns, f.choice, f.payload_bytes, f.outcome, f.reason, f.answered_ns) for c in run.cameras for f in c.frames]


LOSSY = Scenario(
    duration_s=12, fps=10, deadline_ms=300, device_slowdown=5, seed=4,
    uplink=Direction(trace="synthetic:lte:2", loss_percent=3, jitter_ms=2), downlink=Direction(mbps=20, loss_percent=3),
)  # fmt: skip


def test_the_same_scenario_gives_the_same_run_to_the_byte(workload: Workload) -> None:
    first, second = simulate(LOSSY, workload), simulate(LOSSY, workload)
    assert record(first) == record(second)
    assert record(simulate(replace(LOSSY, seed=5), workload)) != record(first)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_captured_frame_has_one_outcome(workload: Workload, policy: str) -> None:
    run = simulate(LOSSY, workload, policy)
    summary = run.summary()
    assert summary.captured == 120
    assert sum(summary.outcomes.values()) == summary.captured
    for frame in run.cameras[0].frames:
        assert frame.outcome in ("result", "local", "expired", "dropped")
        if frame.outcome in ("result", "local"):
            assert frame.captured_ns < frame.answered_ns <= frame.deadline_ns


def test_an_outage_is_bridged_and_left_again(workload: Workload) -> None:
    """Local within a deadline, split again within 2 s, nothing unaccounted for."""
    scenario = Scenario(
        duration_s=28, fps=10, deadline_ms=200, device_slowdown=5,
        uplink=Direction(mbps=4, outages_s=((8, 18),)), downlink=Direction(mbps=20, outages_s=((8, 18),)),
    )  # fmt: skip
    frames = simulate(scenario, workload).cameras[0].frames
    assert len(frames) == 280
    assert all(f.outcome for f in frames)
    first_local = min(f.answered_ns for f in frames if f.outcome == "local" and f.captured_ns >= 7.8 * S)
    assert first_local <= 8 * S + 0.2 * S + 0.1 * S, "one deadline, from the first frame captured in the outage"
    dark = [f for f in frames if 8.3 * S <= f.captured_ns < 18 * S]
    assert sum(f.outcome == "local" for f in dark) >= 0.97 * len(dark)
    back = [f for f in frames if f.captured_ns >= 20 * S]
    assert sum(f.outcome == "result" for f in back) >= 0.95 * len(back)


def test_after_a_collapse_no_more_than_a_credit_window_is_queued(workload: Workload) -> None:
    """Bytes handed to the transport and not yet delivered, at every moment after the link has fallen to a fiftieth."""
    trace_scenario = Scenario(
        duration_s=20, fps=10, deadline_ms=400, device_slowdown=3, uplink=Direction(mbps=10, outages_s=((10, 13),))
    )
    run = simulate(trace_scenario, workload)
    camera = run.cameras[0]
    sent = [(f.sent_ns, f.payload_bytes) for f in camera.frames if f.sent_ns and f.sent_ns < 10 * S]
    largest = max(b for _, b in sent)
    in_outage = [f.payload_bytes for f in camera.frames if f.sent_ns and 9.9 * S <= f.sent_ns < 13 * S]
    assert len(in_outage) <= 3, "max(2, ceil(fps x round trip) + 1) frames"
    assert sum(in_outage) <= 3 * largest


OWN_SHARE = Scenario(
    duration_s=40, fps=10, deadline_ms=200, device_slowdown=3,
    uplink=Direction(mbps=0.5, delay_ms=10), downlink=Direction(mbps=50, delay_ms=10),
)  # fmt: skip


def test_twenty_cameras_share_a_link_fairly_and_lose_nothing_by_it(workload: Workload) -> None:
    workload = replace(workload, server=replace(workload.server, marginal=0.05))  # the link, not the server, is shared
    scenario = replace(load_scenario(SCENARIOS / "cameras20.toml"), duration_s=15)
    scores = [summarise(c.frames).score for c in simulate(scenario, workload).cameras]
    assert jain(scores) >= 0.95
    alone = Scenario(
        duration_s=15, fps=10, deadline_ms=200, device_slowdown=3,
        uplink=Direction(mbps=0.5, delay_ms=10), downlink=Direction(mbps=50, delay_ms=10),
    )  # fmt: skip
    assert sum(scores) >= 0.98 * 20 * simulate(alone, workload).summary().score


def test_twenty_cameras_that_name_no_group_are_found_to_share_a_link(workload: Workload) -> None:
    workload = replace(workload, server=replace(workload.server, marginal=0.05))
    scenario = replace(load_scenario(SCENARIOS / "cameras20.toml"), group="", duration_s=40)
    run, alone = simulate(scenario, workload), simulate(OWN_SHARE, workload).cameras[0]
    detected = [summarise(c.frames).score for c in run.cameras]
    assert jain(detected) >= 0.95
    left = [summarise(c.frames).score for c in simulate(replace(scenario, grants=False), workload).cameras]
    assert sum(detected) > 1.01 * sum(left), "left to themselves they take equal shares too, and queue for them"
    after = [summarise([f for f in c.frames if f.captured_ns >= 20 * S]).score for c in run.cameras]
    assert sum(after) >= 0.995 * 20 * summarise([f for f in alone.frames if f.captured_ns >= 20 * S]).score, "once it is found"


def test_a_greedy_camera_starves_nobody(workload: Workload) -> None:
    scenario = replace(load_scenario(SCENARIOS / "greedy.toml"), duration_s=15)
    modest = [summarise(c.frames) for c in simulate(scenario, workload).cameras][1:]
    peaceful = simulate(replace(scenario, greedy=0), workload).summary()
    assert min(s.score for s in modest) >= 0.85 * peaceful.score
    assert min(s.on_time for s in modest) >= 0.9


GUSTS = Scenario(
    duration_s=20, fps=5, deadline_ms=300, device_slowdown=1, grants=False,
    uplink=Direction(trace="gusts.csv", delay_ms=20), downlink=Direction(mbps=20, delay_ms=20),
)  # fmt: skip


def test_in_a_collapse_the_base_layer_is_answered_in_time(workload: Workload, tmp_path: Path) -> None:
    """The link falls to a twentieth again and again; without layers a frame that meets that is late, with them it is coarse."""
    rows = [(0.35 * i, 3.0 if i % 2 == 0 else 0.15) for i in range(80)]
    (tmp_path / "gusts.csv").write_text("seconds,mbps\n" + "".join(f"{t:.2f},{m}\n" for t, m in rows))
    scenario = replace(GUSTS, folder=tmp_path)
    best = max(workload.points, key=lambda p: p.accuracy)
    name = f"split {best.id}"
    layers = {name: [Layer(share=0.2, accuracy=0.5 * best.accuracy), Layer(share=0.8, accuracy=best.accuracy)]}
    whole = simulate(scenario, workload, "split_fixed").summary()
    run = simulate(scenario, workload, "split_fixed", layers=layers)
    assert run.summary().on_time > whole.on_time + 0.05
    assert run.summary().score > whole.score
    coarse = [f for f in run.cameras[0].frames if f.outcome == "result" and f.accuracy == 0.5 * best.accuracy]
    assert coarse, "some frames were answered from the base alone"
    assert all(f.answered_ns <= f.deadline_ns for f in coarse)
    assert any(f.accuracy == best.accuracy for f in run.cameras[0].frames), "and others had time for everything"
    assert sum(run.summary().outcomes.values()) == run.summary().captured


def test_layers_are_sent_only_while_there_is_time(workload: Workload) -> None:
    """Our controller holds refining layers back that would come too late; the base is on its way all the same."""
    scenario = Scenario(
        duration_s=12, fps=10, deadline_ms=150, device_slowdown=1, grants=False,
        uplink=Direction(trace="synthetic:3g:3", delay_ms=20), downlink=Direction(mbps=20, delay_ms=20),
    )  # fmt: skip
    layers = {
        f"split {p.id}": [Layer(share=0.3, accuracy=0.6 * p.accuracy), Layer(share=0.7, accuracy=p.accuracy)]
        for p in workload.points
    }
    frames = [f for f in simulate(scenario, workload, layers=layers).cameras[0].frames if f.sent_ns]
    again = [f for f in simulate(scenario, workload, layers=layers).cameras[0].frames if f.sent_ns]
    assert [(f.payload_bytes, f.answered_ns) for f in frames] == [(f.payload_bytes, f.answered_ns) for f in again]
    assert frames


def test_layers_that_are_none_are_refused(workload: Workload) -> None:
    for shares in ([0.5, 0.4], [], [1.5, -0.5]):
        with pytest.raises(ConfigError, match="split 0"):
            simulate(LOSSY, workload, layers={"split 0": [Layer(share=s, accuracy=0.5) for s in shares]})


def test_without_loss_the_oracle_bounds_every_policy(workload: Workload) -> None:
    scenario = replace(LOSSY, uplink=Direction(trace="synthetic:lte:2"), downlink=Direction(mbps=20))
    bound = oracle(scenario, workload)
    for policy in POLICIES:
        assert simulate(scenario, workload, policy).summary().score <= bound.score + 0.002, policy
    assert simulate(scenario, workload).summary().score >= 0.9 * bound.score


def test_with_loss_too_the_oracle_bounds_every_policy(workload: Workload) -> None:
    """In expectation: the luck of half a minute may be worth a point."""
    for loss, deadline_ms in ((2.0, 150), (8.0, 400)):
        link = {"loss_percent": loss, "delay_ms": 20.0}
        scenario = Scenario(
            duration_s=30, deadline_ms=deadline_ms, device_slowdown=5, seed=3,
            uplink=Direction(trace="synthetic:lte:2", **link), downlink=Direction(mbps=20, **link),  # type: ignore[arg-type]
        )  # fmt: skip
        bound = oracle(scenario, workload)
        assert bound.on_time <= 1
        for policy in POLICIES:
            assert simulate(scenario, workload, policy).summary().score <= bound.score + 0.01, (policy, loss)


@pytest.mark.parametrize(("rtt_ms", "deadline_ms"), [(80, 200), (200, 400)])
def test_the_oracle_bounds_a_device_a_little_too_slow_for_its_local_model(
    workload: Workload, rtt_ms: float, deadline_ms: float
) -> None:
    """Local answers are worth most at once, and their debt of device time grows: a narrow beam saw nothing else."""
    assert workload.local is not None
    link = {"delay_ms": rtt_ms / 2, "loss_percent": 2.0}
    scenario = Scenario(
        duration_s=20, fps=30, deadline_ms=deadline_ms, device_slowdown=37.7 / workload.local.ms.p50, seed=2, grants=False,
        uplink=Direction(mbps=1.5, **link), downlink=Direction(mbps=20, **link),  # type: ignore[arg-type]
    )  # fmt: skip
    bound = oracle(scenario, workload)
    for policy in POLICIES:
        assert simulate(scenario, workload, policy).summary().score <= bound.score, policy
    assert bound.score > 1.05 * simulate(scenario, workload, "local").summary().score, "it mixes in what is sent"


def test_a_narrower_beam_only_raises_the_bound(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = replace(LOSSY, duration_s=6, fps=30, uplink=Direction(mbps=1, loss_percent=3))
    found = []
    for beam in (400, 40, 4):
        monkeypatch.setattr("deploy.testbed.simulate.oracle._BEAM", beam)
        found.append(oracle(scenario, workload).score)
    assert found == sorted(found)
    assert found[1] < 1.02 * found[0], "and by little"


def test_the_oracle_gives_no_state_away() -> None:
    """Each state that goes has a successor: better and earlier, or so far ahead that it may idle until all of it is free."""
    rng = np.random.default_rng(5)
    interval_ns, most, now_ns = 33e6, 0.7, 1e9
    for beam in (2, 8, 1000):
        states = rng.random((400, 5)) * [150e6, 400e6, 3.0, 5.0, 1e4] + [now_ns - 20e6, now_ns - 20e6, 10.0, 0.0, 0.0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("deploy.testbed.simulate.oracle._BEAM", beam)
            kept, _ = _prune(states.copy(), now_ns, interval_ns, most, 1e6)
        assert 0 < len(kept) <= min(beam, len(states))
        free, kept_free = np.maximum(states[:, :2] - now_ns, 0), np.maximum(kept[:, :2] - now_ns, 0)
        skipped = np.ceil(kept_free.max(axis=1) / interval_ns)
        for (device, link), score in zip(free, states[:, 2], strict=True):
            earlier = (kept_free[:, 0] <= device + 1) & (kept_free[:, 1] <= link + 1) & (kept[:, 2] >= score)
            assert earlier.any() or (kept[:, 2] - most * skipped >= score - 1e-9).any()


def test_the_oracle_loses_by_loss_and_by_a_shorter_deadline(workload: Workload) -> None:
    """A bound that did not feel them would be none of a controller's."""

    def bound(loss: float, deadline_ms: float) -> float:
        link = {"loss_percent": loss, "delay_ms": 40.0}
        return oracle(
            Scenario(
                duration_s=10, deadline_ms=deadline_ms, device_slowdown=5, uplink=Direction(mbps=1.0, **link),  # type: ignore[arg-type]
                downlink=Direction(mbps=20, **link),  # type: ignore[arg-type]
            ),
            replace(workload, local=None),
        ).score  # fmt: skip

    assert bound(0, 200) > bound(5, 200) > bound(20, 200)
    assert bound(5, 400) > bound(5, 200) > bound(5, 130)


def test_ours_beats_the_published_policies_on_a_lossy_link(workload: Workload) -> None:
    scores = {p: simulate(LOSSY, workload, p).summary().score for p in POLICIES}
    assert scores["ours"] >= max(s for p, s in scores.items() if p != "ours") - 0.002


def test_pairwise_conditions_cover_every_pair() -> None:
    conditions = pairwise_conditions()
    assert len(conditions) == 16
    assert len(set(conditions)) == 16
    for a, b in ((100, 10), (400, 0)):
        assert any(c.deadline_ms == a and c.loss_percent == b for c in conditions)


def test_the_command_runs_a_scenario(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture, log = tmp_path / "run.png", tmp_path / "explain.jsonl"
    code = main(
        [
            "run",
            "tunnel",
            "--bundle",
            str(FIXTURES / "placeholder_classifier.json"),
            "--duration-s",
            "6",
            "--json",
            "--plot",
            str(picture),
            "--explain",
            str(log),
        ]
    )
    assert code == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["captured"] == 60
    assert sum(last["outcomes"].values()) == 60
    assert picture.stat().st_size > 10_000
    assert {"candidates", "choice", "delivery_bps"} <= json.loads(log.read_text().splitlines()[-1]).keys()


def test_compare_prints_the_shared_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.log").write_text("0 2\n1 1\n2 3\n")
    code = main(
        [
            "compare",
            "--traces",
            str(tmp_path),
            "--deadline-ms",
            "200",
            "--duration-s",
            "5",
            "--jobs",
            "1",
            "--json",
            "--bundle",
            str(FIXTURES / "placeholder_detector.json"),
        ]
    )
    assert code == 0
    policies = json.loads(capsys.readouterr().out.splitlines()[-1])["policies"]
    assert {"ours", "oracle", "local"} <= policies.keys()
    for row in policies.values():
        assert 0 <= row["on_time"] <= 1
        assert 0 <= row["accuracy"] <= 1
        assert row["bytes_mean"] >= 0


def compared(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> dict[str, Any]:
    arguments = ["compare", "--traces", str(folder), "--duration-s", "4", "--jobs", "1", "--json", *more]
    assert main([*arguments, "--bundle", str(FIXTURES / "placeholder_detector.json")]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("mbps", [0.008, 0.0])
def test_a_link_that_carries_next_to_nothing_is_a_link(mbps: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "puffer_1").write_text(f"0.0\t{mbps}\n2.5\t{mbps}\n")
    policies = compared(capsys, tmp_path, "--loss-percent", "5", "--device-slowdown", "3")["policies"]
    assert policies["oracle"]["score"] == pytest.approx(policies["local"]["score"], abs=0.002)
    assert policies["ours"]["score"] > 0.9 * policies["oracle"]["score"]


def test_every_file_that_reads_as_a_trace_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "no suffix").write_text("0.0\t2\n1.0\t3\n")
    (tmp_path / "mahimahi.of-a-kind").write_text("0\n5\n10\n")
    (tmp_path / "LICENSE").write_text("The traces are free.\nUse them as you like.\n")
    (tmp_path / "picture.log").write_bytes(bytes(range(256)))
    assert compared(capsys, tmp_path, "--policies", "local")["traces"] == 2
    for path in (tmp_path / "deep" / "no suffix", tmp_path / "mahimahi.of-a-kind"):
        path.unlink()
    assert main(["compare", "--traces", str(tmp_path), "--bundle", str(FIXTURES / "placeholder_detector.json")]) == 2
    assert "no file in it reads" in capsys.readouterr().err


def test_several_devices_are_compared_one_by_one_and_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_text("0 2\n1 3\n")
    found = compared(
        capsys, tmp_path, "--device-slowdown", "1,60", "--policies", "local,deploy.testbed.simulate.policies:LocalOnly"
    )
    by = {slowdown: row["policies"]["local"]["score"] for slowdown, row in found["slowdowns"].items()}
    assert by["1"] > by["60"]
    assert found["policies"]["local"]["score"] == pytest.approx(sum(by.values()) / 2, abs=1e-3)
    assert found["policies"]["deploy.testbed.simulate.policies:LocalOnly"] == found["policies"]["local"]


@pytest.mark.parametrize("slowdown", ["0", "3,nan", "3,,5", "-1"])
def test_a_slowdown_that_is_none_is_refused(slowdown: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", f"--device-slowdown={slowdown}"])
    assert stopped.value.code == 2


def test_every_scenario_that_comes_along_is_readable() -> None:
    for path in SCENARIOS.glob("*.toml"):
        assert load_scenario(path).name == path.stem


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="frames_per_second"):
        parse_scenario({"frames_per_second": 3})
    with pytest.raises(ConfigError, match="mbit"):
        parse_scenario({"uplink": {"mbit": 3}})


def test_a_wrong_scenario_name_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere"]) == 2
    assert "no scenario 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        {"fps": "x"},
        {"fps": True},
        {"duration_s": float("nan")},
        {"duration_s": 1e30},
        {"deadline_ms": float("inf")},
        {"uplink": 5},
        {"uplink": {"mbps": "fast"}},
        {"uplink": {"outages_s": [[1]]}},
        {"cameras": 1.5},
    ],
)
def test_settings_of_a_scenario_have_their_types(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse_scenario(data)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--duration-s", "nan"], 2),
        (["--plot", "/nonexistent/x.png"], 2),
        (["--plot", "x.xyz"], 2),
        (["--explain", "/nonexistent/x"], 2),
        (["--mode", "shape", "--frames", "/nonexistent"], 3),
    ],
)
def test_what_a_run_cannot_use_is_told_before_it_begins(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["run", "tunnel", *arguments])
    except SystemExit as end:  # argparse's own
        found = int(str(end.code))
    assert found == code
    assert arguments[-2] in capsys.readouterr().err


def test_a_policy_of_another_package_is_asked_by_its_name(workload: Workload) -> None:
    ours = record(simulate(LOSSY, workload, "deploy.testbed.simulate.policies:Reference"))
    assert ours == record(simulate(LOSSY, workload, "reference"))
    with pytest.raises(ConfigError, match="no policy 'magic'"):
        simulate(LOSSY, workload, "magic")
