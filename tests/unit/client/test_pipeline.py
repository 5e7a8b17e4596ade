"""Every captured frame ends in exactly one outcome, whatever fails; on virtual time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_client.control import ControlConfig, Controller, LocalOption, OffloadOption, Split
from edge_client.device.worker import DeviceWorker, Lanes
from edge_client.frames import FrameReport, Ledger, Outcome
from edge_client.pipeline.files import FileStrategy
from edge_client.pipeline.live import LiveStrategy
from edge_client.pipeline.parts import Parts, PipelineConfig
from edge_client.pipeline.pipeline import LATE_GRACE_NS
from edge_client.pipeline.runner import Runner
from protos.errors import InternalError, StorageError, UnknownModelError, UnreachableError
from splitters.bundle.operating_point import Quantiles
from tests.fakes.client_loop import VirtualLoop, run_virtual
from tests.fakes.client_parts import FakeDevice, FakeEngine, FakeFrames, FakeLink, Fault, PredictingEngine, fake_controller


@dataclass
class Run:
    runner: Runner
    link: FakeLink
    reports: list[FrameReport]

    def count(self, outcome: Outcome, *, first: int = 0, last: int = 10**9) -> int:
        return sum(r.outcome is outcome and first <= r.frame.index <= last for r in self.reports)


def run(
    *,
    live: bool = True,
    frames: int = 300,
    fps: float = 30.0,
    faults: Sequence[Fault] = (),
    deadline_ms: float = 500.0,
    wait_s: float = 0.0,
    head_ms: float = 5.0,
    local_ms: float = 20.0,
    local: bool = True,
    rtt_s: float = 0.02,
    fatal: Any = None,
    stop_at_s: float | None = None,
    fetches: list[float] | None = None,
    refuse_fetches: int = 0,
    controller: Any = fake_controller,
    point_id: int | None = None,
    temporal: bool = False,
    make_engine: Any = FakeEngine,
    limit_s: float = 120.0,
) -> Run:
    async def main(loop: VirtualLoop) -> Run:
        device = FakeDevice()
        engine: Any = make_engine(device, head_ms=head_ms, local_ms=local_ms, local=local)
        reports: list[FrameReport] = []

        async def fetch(sha256: str) -> Any:
            if fetches is not None:
                fetches.append(loop.time())
                if len(fetches) <= refuse_fetches:
                    raise StorageError("the disk is full")
            await asyncio.sleep(0.4)
            return make_engine(device, sha256, head_ms=head_ms, local_ms=local_ms, local=local)

        parts = Parts(
            frames=FakeFrames(loop, count=frames, fps=fps, live=live), worker=DeviceWorker(Lanes(device)), clock=loop.clock,
            emit=reports.append, fetch=fetch, controller=controller,
        )  # fmt: skip
        config = PipelineConfig(deadline_ms=deadline_ms, wait_for_server_s=wait_s, point_id=point_id, temporal=temporal)
        runner = Runner(config, parts, engine, LiveStrategy if live else FileStrategy)
        link = FakeLink(loop, runner.exchange, faults=faults, rtt_s=rtt_s, fatal=fatal)
        if stop_at_s is not None:
            loop.call_later(stop_at_s, runner.stop)
        await runner.run(link)
        return Run(runner, link, reports)

    return run_virtual(main, limit_s=limit_s)


def check(r: Run, *, deadline_ms: float = 500.0, frames: int | None = 300) -> None:
    ledger = r.runner.pipeline.ledger
    assert ledger.balanced
    assert ledger.open_count == 0
    assert sorted(report.frame.index for report in r.reports) == list(range(ledger.captured))
    if frames is not None:
        assert ledger.captured == frames
    for report in r.reports:
        if report.outcome in (Outcome.LOCAL, Outcome.RESULT) and deadline_ms:
            assert report.stages_ms["total"] <= deadline_ms + LATE_GRACE_NS / 1e6
            assert report.answer is not None


def test_a_quiet_network_gives_results() -> None:
    r = run()
    check(r)
    assert r.count(Outcome.RESULT) >= 295


def test_the_session_breaks_for_three_seconds_and_comes_back() -> None:
    r = run(faults=[Fault(at_s=2.0, for_s=3.0, kind="down")])
    check(r)
    assert r.count(Outcome.RESULT, last=59) >= 50
    assert r.count(Outcome.LOCAL, first=60, last=149) >= 60
    assert r.count(Outcome.RESULT, first=165) >= 100
    assert r.count(Outcome.EXPIRED) == 0


def test_a_server_that_hangs_is_answered_for_just_in_time() -> None:
    r = run(faults=[Fault(at_s=2.0, for_s=3.0, kind="hang")])
    check(r)
    local = [report for report in r.reports if report.outcome is Outcome.LOCAL]
    assert len(local) > 40
    # Those that were in flight waited for the server as long as they could, and no longer.
    waited = [report for report in local if report.payload_bytes]
    assert waited
    assert all(300 < report.stages_ms["total"] <= 505 for report in waited)
    assert r.runner.exchange.late_results >= len(waited)


def test_a_fallback_that_would_displace_better_frames_is_not_begun() -> None:
    """A local answer of 150 ms costs three frames of a camera of 30 fps: what the server lost is left to expire."""
    faults = [Fault(at_s=2.0, for_s=0.2, kind="lose")]
    r = run(faults=faults, local_ms=150)
    check(r)
    lost = [report for report in r.reports if report.payload_bytes and report.outcome is not Outcome.RESULT]
    assert len(lost) >= 2
    assert {report.outcome for report in lost} == {Outcome.EXPIRED}
    assert all(report.stages_ms["total"] == pytest.approx(500, abs=1) for report in lost), "the server might still have answered"
    cheap = run(faults=faults, local_ms=20)
    check(cheap)
    assert cheap.count(Outcome.LOCAL) >= 2
    assert cheap.count(Outcome.EXPIRED) == 0


class Told(Controller):
    """Sends every frame, with a fallback 150 ms after its capture."""

    wanted = True
    asked: list[tuple[int, int]]

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Split:
        return Split(point_id=0, fallback_ns=deadline_ns - 350_000_000)

    def may_send(self, *_: Any, **__: Any) -> bool:
        return True

    def wants_fallback(self, frame_id: int, now_ns: int, deadline_ns: int) -> bool:
        self.asked.append((frame_id, deadline_ns - now_ns))
        return self.wanted


def told(wanted: bool) -> Any:
    asked: list[tuple[int, int]] = []

    def make(engine: Any, fps: float) -> Controller:
        local = LocalOption(accuracy=0.6, ms=Quantiles(p50=20, p95=24))
        controller = Told(ControlConfig(fps=fps or 30.0, initial_bps=20e6), engine.bundle.points, local=local)
        controller.wanted, controller.asked = wanted, asked
        return controller

    return make, asked


@pytest.mark.parametrize("wanted", [True, False])
def test_a_fallback_begins_when_the_controller_said_and_only_if_it_says_so_again(wanted: bool) -> None:
    make, asked = told(wanted)
    r = run(fps=10, frames=40, faults=[Fault(at_s=0.5, for_s=1.0, kind="lose")], controller=make)
    check(r, frames=40)
    stuck = [report for report in r.reports if report.outcome is not Outcome.RESULT]
    assert 9 <= len(stuck) <= 11
    assert len(asked) == len(stuck), "each is asked about once, and no frame whose answer is there"
    assert [wire_id for wire_id, _ in asked] == [report.frame.index for report in sorted(stuck, key=lambda s: s.frame.index)]
    for report, (_, left_ns) in zip(stuck, asked, strict=True):
        assert 350e6 <= left_ns <= 356e6
        assert report.outcome is (Outcome.LOCAL if wanted else Outcome.EXPIRED)
        assert report.stages_ms["total"] == pytest.approx(165 if wanted else 500, abs=1.5)


@pytest.mark.parametrize("silent", [False, True])
def test_a_held_local_answer_waits_for_the_servers_and_no_longer_than_the_deadline(silent: bool) -> None:
    class Held(Told):
        def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Split:
            return Split(point_id=0, fallback_ns=now_ns, hold=True)

    asked: list[tuple[int, int]] = []

    def make(engine: Any, fps: float) -> Controller:
        local = LocalOption(accuracy=0.6, ms=Quantiles(p50=20, p95=24))
        controller = Held(ControlConfig(fps=fps or 30.0, initial_bps=20e6), engine.bundle.points, local=local)
        controller.asked = asked
        return controller

    faults = [Fault(at_s=0.5, for_s=1.0, kind="lose")] if silent else []
    r = run(fps=5, frames=20, faults=faults, controller=make, rtt_s=0.2)
    check(r, frames=20)
    assert all("local" in report.stages_ms for report in r.reports), "the local model did answer each, long before the server"
    local = [report for report in r.reports if report.outcome is Outcome.LOCAL]
    assert len(local) == (5 if silent else 0)
    for report in local:
        assert report.answer is not None
        assert 490 <= report.stages_ms["total"] <= 500


def test_a_point_set_by_hand_has_its_frames_answered_just_in_time_whatever_the_controller_thinks() -> None:
    make, asked = told(wanted=False)
    r = run(fps=10, frames=40, faults=[Fault(at_s=0.5, for_s=1.0, kind="lose")], controller=make, point_id=0)
    check(r, frames=40)
    assert not asked
    assert r.count(Outcome.LOCAL) >= 9
    assert r.count(Outcome.EXPIRED) == 0


def test_without_a_local_model_frames_in_flight_expire_and_others_are_dropped() -> None:
    hang = run(faults=[Fault(at_s=2.0, for_s=3.0, kind="lose")], local=False)
    check(hang)
    assert hang.count(Outcome.EXPIRED) >= 1
    down = run(faults=[Fault(at_s=2.0, for_s=3.0, kind="down")], local=False)
    check(down)
    assert down.runner.pipeline.ledger.dropped["offline"] > 50


def with_images(engine: Any, fps: float) -> Controller:
    option = OffloadOption(
        format="jpeg", quality=50, payload_bytes=Quantiles(p50=900, p95=900), accuracy=0.99, encode_ms=Quantiles(p50=2, p95=3)
    )
    return Controller(ControlConfig(fps=fps or 30.0, initial_bps=20e6), engine.bundle.points, offloads=[option])


def test_images_are_sent_where_they_are_the_best_choice() -> None:
    r = run(controller=with_images, local=False)
    check(r)
    assert sum(report.operating_point is None for report in r.reports if report.outcome is Outcome.RESULT) > 280


def test_a_server_that_takes_no_images_is_sent_none_after_the_first() -> None:
    r = run(controller=with_images, local=False, faults=[Fault(at_s=0.0, for_s=99.0, kind="latents")])
    check(r)
    assert sum(report.operating_point is not None for report in r.reports if report.outcome is Outcome.RESULT) > 280
    assert r.count(Outcome.DROPPED) + r.count(Outcome.EXPIRED) <= 8, "those in flight when the first was refused"


def test_a_slow_device_supersedes_frames_and_counts_them() -> None:
    r = run(head_ms=80, local=False)
    check(r)
    assert r.runner.pipeline.ledger.dropped["superseded"] > 100
    assert r.count(Outcome.RESULT) > 80


def test_an_answer_of_another_task_is_an_error_of_its_frame() -> None:
    r = run(faults=[Fault(at_s=0.0, for_s=1e9, kind="kind")])
    check(r)
    assert r.count(Outcome.RESULT) == 0
    assert r.count(Outcome.LOCAL) > 250


def test_an_overloaded_server_is_answered_for_locally() -> None:
    r = run(faults=[Fault(at_s=2.0, for_s=2.0, kind="refuse")])
    check(r)
    assert r.count(Outcome.LOCAL) > 10
    assert r.count(Outcome.EXPIRED) == 0


def test_a_new_bundle_is_fetched_and_taken_between_two_frames() -> None:
    r = run(faults=[Fault(at_s=3.0, for_s=1e9, kind="bundle")])
    check(r)
    assert r.runner.pipeline.bundle_switches == 1
    hashes = [report.bundle_sha256[0] for report in r.reports]
    assert hashes == sorted(hashes)
    assert r.count(Outcome.RESULT, first=130) > 100


def test_a_bundle_that_cannot_be_stored_is_tried_ever_more_seldom_and_taken_when_there_is_room() -> None:
    fetches: list[float] = []
    r = run(frames=1200, faults=[Fault(at_s=1.0, for_s=1, kind="bundle")], fetches=fetches, refuse_fetches=3)
    check(r, frames=1200)
    assert [round(b - a) for a, b in itertools.pairwise(fetches)] == [2, 4, 8]
    assert r.runner.pipeline.bundle_switches == 1
    assert r.runner.note == ""
    assert r.count(Outcome.RESULT, first=600) >= 500


def test_a_server_that_returns_with_another_bundle() -> None:
    faults = [Fault(at_s=2.0, for_s=1.0, kind="down"), Fault(at_s=2.5, for_s=1e9, kind="bundle")]
    r = run(faults=faults)
    check(r)
    assert r.runner.pipeline.bundle_switches == 1
    assert r.count(Outcome.RESULT, first=120) > 120


def test_draining_is_no_catastrophe() -> None:
    r = run(faults=[Fault(at_s=2.0, for_s=1.0, kind="drain")])
    check(r)
    assert r.count(Outcome.RESULT, first=120) > 150


def test_stopping_answers_what_is_in_flight() -> None:
    r = run(stop_at_s=4.0)
    check(r, frames=None)
    assert 100 < r.runner.pipeline.ledger.captured < 130
    assert r.runner.pipeline.ledger.dropped["stopped"] <= 2


def test_stopping_while_the_server_hangs_takes_no_longer_than_an_answer() -> None:
    r = run(stop_at_s=4.0, faults=[Fault(at_s=3.5, for_s=1e9, kind="hang")])
    check(r, frames=None)


def test_a_refused_hello_ends_the_run_with_its_error() -> None:
    with pytest.raises(UnknownModelError):
        run(fatal=UnknownModelError("no such model"))


def test_live_without_server_and_without_local_model_is_an_error() -> None:
    with pytest.raises(UnreachableError):
        run(local=False, faults=[Fault(at_s=0, for_s=1e9, kind="down")])


def test_live_without_server_answers_locally() -> None:
    r = run(faults=[Fault(at_s=0, for_s=1e9, kind="down")])
    check(r)
    assert r.count(Outcome.LOCAL) > 290


# ---------------------------------------------------------------- files


def test_files_are_all_results() -> None:
    r = run(live=False, deadline_ms=0)
    check(r, deadline_ms=0)
    assert r.count(Outcome.RESULT) == 300


def test_files_wait_for_a_server_and_send_again_what_was_in_flight() -> None:
    r = run(live=False, deadline_ms=0, wait_s=30, faults=[Fault(at_s=1.0, for_s=10.0, kind="down")])
    check(r, deadline_ms=0)
    assert r.count(Outcome.RESULT) == 300
    assert r.link.sent > 300


def test_files_use_the_local_model_only_when_the_patience_is_over() -> None:
    r = run(live=False, deadline_ms=0, wait_s=2, frames=400, faults=[Fault(at_s=1.0, for_s=10.0, kind="down")])
    check(r, deadline_ms=0, frames=400)
    assert r.count(Outcome.LOCAL) > 50
    gone = run(live=False, deadline_ms=0, wait_s=1, frames=20, faults=[Fault(at_s=0, for_s=1e9, kind="down")])
    check(gone, deadline_ms=0, frames=20)
    assert gone.count(Outcome.LOCAL) == 20


def test_files_without_server_and_local_model_end_with_an_error() -> None:
    with pytest.raises(UnreachableError):
        run(live=False, deadline_ms=0, wait_s=1, local=False, faults=[Fault(at_s=0, for_s=1e9, kind="down")])


def test_files_overload_is_retried_and_a_frame_that_fails_is_named() -> None:
    r = run(live=False, deadline_ms=0, faults=[Fault(at_s=0.5, for_s=1.0, kind="refuse")])
    check(r, deadline_ms=0)
    assert r.count(Outcome.RESULT) == 300
    r = run(live=False, deadline_ms=0, faults=[Fault(at_s=0.5, for_s=0.1, kind="error")])
    check(r, deadline_ms=0)
    assert isinstance(r.runner.strategy, FileStrategy)
    assert r.runner.strategy.failure is not None
    assert r.runner.pipeline.ledger.dropped["headtail"] > 0


def test_files_give_up_on_a_server_that_takes_frames_and_never_answers() -> None:
    r = run(live=False, deadline_ms=0, wait_s=30, frames=100, faults=[Fault(at_s=0.0, for_s=1e9, kind="lose")], limit_s=400)
    assert isinstance(r.runner.strategy, FileStrategy)
    assert isinstance(r.runner.strategy.failure, UnreachableError)
    assert r.count(Outcome.RESULT) == 0
    assert r.runner.pipeline.ledger.balanced


def test_files_do_not_wait_for_a_bundle_that_cannot_be_had() -> None:
    changed = [Fault(at_s=0.2, for_s=1.0, kind="down"), Fault(at_s=0.5, for_s=1e9, kind="bundle")]
    r = run(live=False, deadline_ms=0, wait_s=30, frames=600, faults=changed, fetches=[], refuse_fetches=10**9, limit_s=300)
    assert r.count(Outcome.LOCAL) > 300
    assert r.runner.pipeline.ledger.balanced


def test_a_frame_is_sent_again_although_the_source_has_no_other_yet() -> None:
    """Frames that a program hands in come when they come; what was in flight when the stream broke does not wait for the next."""

    async def main(loop: VirtualLoop) -> Run:
        device = FakeDevice()
        engine: Any = FakeEngine(device)
        reports: list[FrameReport] = []
        frames = Rare(loop, count=2, live=False)
        parts = Parts(
            frames=frames, worker=DeviceWorker(Lanes(device)), clock=loop.clock, emit=reports.append,
            fetch=lambda _: asyncio.sleep(0),
            controller=fake_controller,
        )  # fmt: skip
        runner = Runner(PipelineConfig(wait_for_server_s=30), parts, engine, FileStrategy)
        link = FakeLink(loop, runner.exchange, faults=[Fault(at_s=0.01, for_s=1.0, kind="down")], rtt_s=0.1)
        await runner.run(link)
        return Run(runner, link, reports)

    r = run_virtual(main, limit_s=200)
    check(r, deadline_ms=0, frames=2)
    assert r.count(Outcome.RESULT) == 2
    assert r.link.sent > 2
    assert max(report.stages_ms["total"] for report in r.reports) < 5_000


class Rare(FakeFrames):
    """A frame, and a minute later another."""

    async def next(self) -> Any:
        if self._made:
            await asyncio.sleep(60)
        return await super().next()


def test_files_take_a_new_bundle() -> None:
    r = run(live=False, deadline_ms=0, wait_s=30, frames=600, faults=[Fault(at_s=1.0, for_s=1e9, kind="bundle")])
    check(r, deadline_ms=0, frames=600)
    assert r.count(Outcome.RESULT) == 600
    assert r.runner.pipeline.bundle_switches == 1


def test_files_with_a_deadline_expire() -> None:
    r = run(live=False, deadline_ms=100, wait_s=30, faults=[Fault(at_s=1.0, for_s=1.0, kind="hang")])
    check(r, deadline_ms=100)
    assert r.count(Outcome.EXPIRED) > 0
    assert r.count(Outcome.LOCAL) == 0


# ---------------------------------------------------------------- whatever fails

FAULTS = st.builds(
    Fault,
    at_s=st.floats(0, 4),
    for_s=st.floats(0.01, 3),
    kind=st.sampled_from(["down", "hang", "lose", "refuse", "error", "drain", "bundle"]),
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    faults=st.lists(FAULTS, max_size=4),
    live=st.booleans(),
    fps=st.sampled_from([5.0, 30.0, 60.0]),
    deadline_ms=st.sampled_from([0.0, 100.0, 500.0]),
    head_ms=st.sampled_from([1.0, 20.0, 120.0]),
    local_ms=st.sampled_from([2.0, 40.0, 300.0]),
    rtt_s=st.sampled_from([0.001, 0.05, 0.4]),
    stop_at_s=st.none() | st.floats(0, 4),
)
def test_outcomes_add_up_under_every_fault(
    live: bool, fps: float, deadline_ms: float, stop_at_s: float | None, **kwargs: Any
) -> None:
    frames = int(4 * fps)
    r = run(live=live, fps=fps, deadline_ms=deadline_ms, frames=frames, wait_s=0.0 if live else 2.0, stop_at_s=stop_at_s, **kwargs)
    check(r, deadline_ms=deadline_ms, frames=frames if stop_at_s is None else None)


def test_the_ledger_counts_a_frame_once() -> None:
    ledger = Ledger()
    ledger.capture(0)
    with pytest.raises(InternalError):
        ledger.capture(0)
    assert ledger.settle(0, Outcome.RESULT)
    assert not ledger.settle(0, Outcome.LOCAL)
    assert ledger.balanced
    assert sum(ledger.outcomes.values()) == 1


def test_the_controller_is_told_what_payloads_cost_and_how_old_their_reference_was(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []

    class Newest:
        """Refers to the frame sent last, as on a stream."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.last: int | None = None

        def choose(self) -> tuple[Any, int | None]:
            return None, self.last

        def sent(self, frame_id: int, symbols: Any, *, reference: int | None) -> None:
            del symbols, reference
            self.last = frame_id

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    class Told(Controller):
        def on_reference(self, age: int) -> None:
            told.append(("age", age))
            super().on_reference(age)

        def on_payload(self, decision: Any, n_bytes: int, now_ns: int) -> None:
            told.append((decision.name, n_bytes))
            super().on_payload(decision, n_bytes, now_ns)

    def controller(engine: Any, fps: float) -> Controller:
        return Told(ControlConfig(fps=fps or 30.0, initial_bps=20e6), engine.bundle.points)

    encode = FakeEngine.encode
    monkeypatch.setattr("edge_client.pipeline.active_model.Predictor", Newest)
    monkeypatch.setattr(FakeEngine, "codec", SimpleNamespace(supports_reference=True))
    monkeypatch.setattr(FakeEngine, "encode", lambda *args: replace(encode(*args), symbols=object()))
    # The head takes one and a half intervals, so some frames are superseded and some references two frames old.
    r = run(frames=30, fps=30.0, head_ms=50.0, local=False, controller=controller, temporal=True)
    check(r, frames=30)
    ages, payloads = [n for name, n in told if name == "age"], [n for name, n in told if name.startswith("split")]
    assert ages[0] == 0
    assert set(ages[2:]) <= {1, 2}
    assert ages.count(2) >= 5
    assert len(payloads) >= 10
    assert all(n > 0 for n in payloads)


def test_no_frame_is_predicted_from_one_that_the_session_may_still_hold_back() -> None:
    """While a write waits for the network, frames pile up behind it; those that became too late there are never sent."""
    stuck = [Fault(at_s=at_s, for_s=0.45, kind="stuck") for at_s in (1.0, 2.0, 3.0)]
    r = run(frames=150, deadline_ms=300, faults=stuck, local=False, temporal=True, make_engine=PredictingEngine, point_id=0)
    check(r, deadline_ms=300, frames=150)
    lost = [report for report in r.reports if report.outcome is not Outcome.RESULT]
    assert lost  # some were held back
    assert "payload" not in {report.reason for report in lost}
    assert r.link.predicted > 90
