"""Several servers, their tails and doors in simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deploy.testbed.scenario import Direction, Scenario
from deploy.testbed.simulate.fleet import sampled, simulate_fleet, spread
from deploy.testbed.simulate.run import simulate
from deploy.testbed.workload import Workload, load_workload
from protos.errors import ConfigError

WIDE = Direction(mbps=50, delay_ms=5)


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Without a local model: what the server does not answer in time is missed."""
    found = load_workload(Path(__file__).parents[2] / "fixtures" / "placeholder_classifier.json")
    return replace(found, local=None, offloads=())


def scenario(**fields: object) -> Scenario:
    given = {
        "cameras": 12,
        "fps": 10.0,
        "duration_s": 6.0,
        "device_slowdown": 1.0,
        "deadline_ms": 200.0,
        "uplink": WIDE,
        "downlink": WIDE,
    }
    return Scenario(**{**given, **fields})  # type: ignore[arg-type]


def test_every_camera_falls_to_one_server_and_no_server_is_empty() -> None:
    counts = spread(1000, 10, seed=3)
    assert sum(counts) == 1000
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert spread(1000, 10, seed=3) == counts
    assert spread(7, 7, seed=1) == [1] * 7


def test_a_sample_holds_the_most_crowded_server() -> None:
    counts = list(range(1, 101))
    assert sampled(counts, 0) == counts
    assert sampled(counts, 1) == [100]
    assert sampled(counts, 3) == [1, 51, 100] or sampled(counts, 3) == [1, 50, 100]


def test_a_fleet_of_one_kind_is_the_sum_of_its_servers(workload: Workload) -> None:
    fleet = simulate_fleet(scenario(servers=3), workload)
    assert sum(s.cameras for s in fleet.shares) == 12
    assert 12 * 50 < sum(s.summary.captured for s in fleet.shares) == fleet.summary()["captured"] <= 12 * 60
    alone = simulate(scenario(cameras=fleet.shares[0].cameras), workload)
    assert fleet.shares[0].summary == alone.summary()


def test_processes_change_nothing(workload: Workload) -> None:
    asked = scenario(servers=3, duration_s=2.0)
    assert simulate_fleet(asked, workload, processes=2).to_json() == simulate_fleet(asked, workload).to_json()


def test_a_server_with_too_few_tails_refuses_and_one_with_more_does_not(workload: Workload) -> None:
    slow = replace(workload, server=replace(workload.server, marginal=1.0))
    few = simulate_fleet(scenario(servers=2, cameras=60), slow)
    many = simulate_fleet(scenario(servers=2, cameras=60, tails=8), slow)
    assert few.summary()["tail_busy"] > 0.8
    assert few.summary()["refused"] > 0.0
    assert many.summary()["refused"] < few.summary()["refused"]
    assert many.summary()["on_time"] > few.summary()["on_time"] + 0.1
    assert few.summary()["worst_on_time"] <= few.summary()["on_time"]


def test_a_door_that_is_full_makes_everybody_late(workload: Workload) -> None:
    quick, full = (simulate_fleet(scenario(servers=2, tails=4, door_ms=ms), workload).summary() for ms in (0.1, 40.0))
    assert quick["door_busy"] < 0.05
    assert full["door_busy"] > 0.7
    assert full["on_time"] < quick["on_time"] - 0.2


def test_what_cannot_be_is_refused(workload: Workload) -> None:
    with pytest.raises(ConfigError, match="share no link"):
        scenario(servers=2, shared_link=True)
    with pytest.raises(ConfigError, match="servers must be"):
        scenario(servers=13)
    with pytest.raises(ConfigError, match="at least 1"):
        simulate_fleet(scenario(servers=2), workload, processes=0)
