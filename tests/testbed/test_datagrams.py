"""The simulated datagram path: what arrives, what it costs, and that no policy beats its bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.testbed.link.datagrams import Datagrams
from deploy.testbed.link.loop import Loop
from deploy.testbed.link.model import Link, LinkConfig, LossModel
from deploy.testbed.link.trace import constant
from deploy.testbed.scenario import Direction, Scenario
from deploy.testbed.simulate.oracle import oracle
from deploy.testbed.simulate.run import simulate
from deploy.testbed.workload import Workload, load_workload
from protos.errors import ConfigError

MS = 1_000_000
FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module")
def workload() -> Workload:
    return load_workload(FIXTURES / "placeholder_detector.json")


def sent(loss: float, burst: float, *, n_bytes: int = 3000, messages: int = 400) -> tuple[list[int], Datagrams]:
    """Latencies in ms of the messages that arrived, of one every 100 ms over 8 Mbit/s and 40 ms."""
    loop = Loop()
    config = LinkConfig(trace=constant(8e6), delay_ns=40 * MS, loss=LossModel(loss=loss, burst_packets=burst))
    path = Datagrams(loop, Link(config, "up"), reverse_delay_ns=40 * MS)
    found: list[int] = []

    def leave(k: int) -> None:
        path.send(n_bytes, lambda begun: found.append((loop.now_ns - begun) // MS), loop.now_ns)
        if k + 1 < messages:
            loop.at(loop.now_ns + 100 * MS, leave, k + 1)

    begin: Callable[[Any], None] = leave
    loop.at(0, begin, 0)
    loop.run(messages * 100 * MS + 1000 * MS)
    return found, path


@pytest.mark.parametrize(("loss", "burst"), [(0.0, 1.0), (0.05, 1.0), (0.2, 1.0), (0.1, 3.0), (0.5, 1.0)])
def test_nearly_every_message_arrives_and_none_waits_for_a_repair(loss: float, burst: float) -> None:
    arrived, _ = sent(loss, burst)
    assert len(arrived) >= 0.97 * 400
    assert max(arrived) < 40 + 25, "transmission and propagation, nothing else"


def test_parity_grows_with_the_loss() -> None:
    spent = [sent(loss, 1.0)[1].bytes_sent for loss in (0.0, 0.05, 0.3)]
    assert spent[0] < spent[1] < spent[2]
    assert spent[0] < 400 * 4.1 * 1120, "three pieces and, for want of better knowledge, at most one of parity"


def lossy(transport: str, loss: float, **more: Any) -> Scenario:
    link: dict[str, Any] = {"delay_ms": 40, "loss_percent": loss, **more}
    return Scenario(
        duration_s=25, fps=10, deadline_ms=200, device_slowdown=3, grants=False, transport=transport,
        uplink=Direction(mbps=4, **link), downlink=Direction(mbps=20, **link),
    )  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"burst_packets": 3}, {"outages_s": ((5.0, 8.0),)}])
def test_over_datagrams_frames_are_on_time_where_a_stream_is_late(workload: Workload, more: dict[str, Any]) -> None:
    stream, datagrams = (simulate(lossy(t, 10, **more), workload).summary() for t in ("grpc", "quic"))
    assert datagrams.score > stream.score + 0.01
    assert datagrams.on_time > 0.95


def test_auto_is_a_stream_without_loss_and_comes_near_datagrams_with_it(workload: Workload) -> None:
    assert simulate(lossy("auto", 0), workload).summary() == simulate(lossy("grpc", 0), workload).summary()
    stream, datagrams, auto = (simulate(lossy(t, 20), workload).summary().score for t in ("grpc", "quic", "auto"))
    assert auto > stream + 0.5 * (datagrams - stream)


@pytest.mark.parametrize("loss", [0, 10, 40])
def test_the_datagram_bound_bounds_and_lies_above_the_streams(workload: Workload, loss: float) -> None:
    scenario = lossy("quic", loss)
    bound = oracle(scenario, workload)
    for policy in ("ours", "local", "split_fixed", "reference"):
        assert simulate(scenario, workload, policy).summary().score <= bound.score + 0.003
    stream = oracle(replace(scenario, transport="grpc"), workload)
    assert bound.score >= stream.score - 0.003
    assert oracle(replace(scenario, transport="auto"), workload).score == max(bound.score, stream.score)


def test_runs_over_datagrams_repeat_to_the_byte_and_account_for_every_frame(workload: Workload) -> None:
    first, second = (simulate(lossy("auto", 20), workload).summary() for _ in range(2))
    assert first == second
    assert sum(first.outcomes.values()) == first.captured == 250


def test_a_transport_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="transport"):
        Scenario(transport="smtp")
