"""What a dying replica can show is told apart from everything else, and the frame is asked again."""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import grpc
import grpc.aio
import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from edge_server.backends import TailAnswer, TailWork
from edge_server.backends.ray import cluster
from edge_server.backends.ray.backend import RayBackend
from edge_server.backends.ray.cluster import Cluster
from edge_server.backends.ray.packing import pack_answer
from edge_server.backends.ray.replica import dealt
from edge_server.config import BatchConfig, RayConfig, TailConfig
from protos.errors import DrainingError, ModelError, OverloadedError
from protos.messages import Classification, ClassScore, PayloadKind

DONE = TailAnswer(answer=Classification(top=(ClassScore(class_id=1, score=0.5),)), queue_ns=0, tail_ns=9, batch_size=1)
Made = Callable[[], Any]


class FakeHandle:
    """Answers call after call with what it was given: an exception to raise, or a reply."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.calls = 0

    async def remote(self, call: Any) -> Any:
        self.calls += 1
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, BaseException):
            raise reply
        if reply == "hangs":
            await asyncio.sleep(60)
        if reply == "heeds no cancellation":
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.1)
        return reply


class FakeRoute:
    path = "/bundles/a"

    def __init__(self, handle: FakeHandle) -> None:
        self.infer = handle


def backend(handle: FakeHandle, max_queue: int = 8) -> RayBackend:
    made = RayBackend(BatchConfig(max_queue=max_queue), TailConfig(), RayConfig(), time.monotonic_ns)
    made._routes["a"] = FakeRoute(handle)  # type: ignore[assignment]
    return made


def work(left_s: float | None = 5.0) -> TailWork:
    deadline_ns = None if left_s is None else time.monotonic_ns() + int(left_s * 1e9)
    return TailWork(bundle_sha256="a", kind=PayloadKind.LATENT, arrays=(np.zeros(1),), size_px=(1, 1), deadline_ns=deadline_ns)


def _broken() -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, empty, empty, "Received RST_STREAM with error code 2")


@pytest.mark.parametrize("gone", [RayActorError, _broken, RequestCancelledError, asyncio.CancelledError])
async def test_a_replica_that_goes_is_asked_for_elsewhere(gone: Made) -> None:
    handle = FakeHandle(gone(), gone(), pack_answer(DONE))
    answer = await backend(handle).run(work())
    assert answer.answer == DONE.answer
    assert handle.calls == 3


async def test_no_replica_before_the_deadline_is_an_overload() -> None:
    handle = FakeHandle(RayActorError())
    begun = time.monotonic()
    with pytest.raises(OverloadedError, match="before its deadline"):
        await backend(handle).run(work(0.3))
    assert 0.2 < time.monotonic() - begun < 30
    assert handle.calls >= 2


@pytest.mark.parametrize("how", ["hangs", "heeds no cancellation"])
async def test_a_call_that_hangs_ends_at_the_deadline(how: str) -> None:
    begun = time.monotonic()
    with pytest.raises(OverloadedError, match="before its deadline"):
        await backend(FakeHandle(how)).run(work(0.1))
    assert time.monotonic() - begun < 30  # and not never


async def test_a_client_that_leaves_cancels_and_is_not_taken_for_a_death() -> None:
    handle = FakeHandle("hangs")
    task = asyncio.create_task(backend(handle).run(work(None)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handle.calls == 1


@pytest.mark.parametrize(
    ("raised", "told"), [(BackPressureError(9, 9), OverloadedError), (ValueError("a bug in the replica"), ModelError)]
)
async def test_what_another_replica_would_not_cure_is_not_asked_again(raised: Exception, told: type[Exception]) -> None:
    handle = FakeHandle(raised)
    with pytest.raises(told):
        await backend(handle).run(work())
    assert handle.calls == 1


async def test_more_than_the_queue_holds_is_refused_at_once() -> None:
    full = backend(FakeHandle("hangs"), max_queue=2)
    waiting = [asyncio.create_task(full.run(work(1.0))) for _ in range(2)]
    await asyncio.sleep(0.05)
    with pytest.raises(OverloadedError, match="wait for the tail already"):
        await full.run(work())
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def test_what_another_door_deployed_while_this_one_waited_is_not_deployed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made, inside, runs = Cluster(RayConfig()), [False], list[str]()

    @contextlib.contextmanager
    def turn(name: str, until_s: float) -> Iterator[Callable[[], None]]:
        inside[0] = True  # by now the other one has done it
        yield lambda: None

    monkeypatch.setattr(made, "_turn", turn)
    monkeypatch.setattr(made, "_state", lambda name: name if inside[0] else None)
    monkeypatch.setattr(made, "_wait", lambda name, until_s, prolong: name)
    monkeypatch.setattr(cluster.serve, "run_many", lambda *_args, **_names: runs.append("again"))
    assert made.deploy("app", lambda: None) == "app"
    assert runs == []


def test_bundles_that_load_beside_each_other_deploy_their_shelf_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve could not make two applications at a time: a bundle was missing from a shelf now and then."""
    made, there, built = Cluster(RayConfig()), set[str](), list[str]()
    second = threading.Thread(target=lambda: made.deploy("shelf", lambda: built.append("second")))
    asked = threading.Event()

    @contextlib.contextmanager
    def turn(name: str, until_s: float) -> Iterator[Callable[[], None]]:
        if threading.current_thread() is second:
            asked.set()  # a turn is the door's, so it has it as well
        yield lambda: None

    def build() -> None:
        second.start()
        assert asked.wait(60)
        built.append("first")

    monkeypatch.setattr(made, "_turn", turn)
    monkeypatch.setattr(made, "_state", lambda name: name if name in there else None)
    monkeypatch.setattr(made, "_wait", lambda name, until_s, prolong: name)
    monkeypatch.setattr(cluster.serve, "run_many", lambda *_args, **_names: there.add("shelf"))
    assert made.deploy("shelf", build) == "shelf"
    second.join(60)
    assert built == ["first"]


def test_what_a_start_waited_for_is_said_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(status=SimpleNamespace(value="DEPLOYING"), deployments={}, message="")
    monkeypatch.setattr(cluster.serve, "status", lambda: SimpleNamespace(applications={"app": state}))
    monkeypatch.setattr(cluster.ray, "get", lambda call, *, timeout: call)
    made, register = Cluster(RayConfig()), MagicMock()
    made._register = register
    register.failures.remote.return_value = {"10.0.0.2": (3, "cannot keep bundle abc at /cache"), "10.0.0.3": (1, "no room")}
    wanted = "on node 10.0.0.2, 3 times: cannot keep bundle abc at /cache; on node 10.0.0.3, 1 times: no room"
    with pytest.raises(ModelError, match=f"app did not start within 300 s: {re.escape(wanted)}"):
        made._wait("app", until_s=0.0)


def test_a_start_outlives_the_node_that_held_the_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """The register begins anew on another node; whoever asks meanwhile why replicas do not start is told nothing, and goes on."""
    made, register, states = Cluster(RayConfig()), MagicMock(), iter(["DEPLOYING"] * 3 + ["RUNNING"])
    made._register = register
    away = cluster.ray.exceptions.ActorUnavailableError("it moves", None)
    asked = list[str]()

    def status() -> SimpleNamespace:
        state = SimpleNamespace(status=SimpleNamespace(value=next(states)), deployments={}, message="")
        return SimpleNamespace(applications={"app": state})

    def get(call: Any, *, timeout: float) -> Any:
        if call is register.failures.remote.return_value:
            asked.append("failures")
            raise away
        return True

    monkeypatch.setattr(cluster.serve, "status", status)
    monkeypatch.setattr(cluster.serve, "get_app_handle", lambda name: name)
    monkeypatch.setattr(cluster.ray, "get", get)
    monkeypatch.setattr(cluster.ray, "available_resources", dict)
    monkeypatch.setattr(cluster.ray, "cluster_resources", dict)
    for name in ("_SAID_AFTER_S", "_POLL_S"):
        monkeypatch.setattr(cluster, name, 0.0)
    assert made.deploy("app", lambda: None) == "app"
    assert asked == ["failures", "failures"]


async def test_what_is_being_loaded_is_handed_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replicas may have to start after the node that held the register has gone."""
    made, renewed = backend(FakeHandle()), list[Any]()
    made._routes.clear()
    bundle: Any = SimpleNamespace(sha256="b")
    monkeypatch.setattr(made._cluster, "hand_in", lambda *given: renewed.append(given))
    monkeypatch.setattr(made._cluster, "renew", lambda *given: renewed.append(given))
    monkeypatch.setattr(made._cluster, "missing", lambda _: set())
    async with made._handed_in(bundle, "app"):
        await made._look()
    await made._look()
    assert renewed == [(bundle, "app"), ([("app", "b")], {"b": bundle}), ([], {})]


def test_no_call_goes_into_ray_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one would start another cluster."""
    made = Cluster(RayConfig())
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.serve, "status", lambda: pytest.fail("Ray was called"))
    made.close()
    for call in (made.connect, lambda: made.found("app"), lambda: made.deploy("app", lambda: None), lambda: made.missing(["app"])):
        with pytest.raises(DrainingError):
            call()


@pytest.mark.parametrize(
    ("cpus", "rank", "replicas", "own"),
    [
        ((0, 1), 0, 1, (0, 1)), ((0, 1), 0, 2, (0,)), ((0, 1), 1, 2, (1,)), ((0, 1, 2, 3), 1, 2, (1, 3)),
        ((0, 1), 2, 4, (0,)), ((), 3, 4, ()),
    ],
)  # fmt: skip
def test_cores_are_dealt_out(cpus: tuple[int, ...], rank: int, replicas: int, own: tuple[int, ...]) -> None:
    assert dealt(cpus, rank, replicas) == own


def test_a_register_that_cannot_be_reached_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = cluster.ray
    said = [ray.exceptions.ActorUnavailableError("no route", None), ray.exceptions.GetTimeoutError("late"), True]

    def get(_call: object, *, timeout: float) -> object:
        told = said.pop(0)
        if isinstance(told, Exception):
            raise told
        return told

    made = Cluster(RayConfig(deploy_s=10.0))
    made._register = MagicMock()
    monkeypatch.setattr(ray, "get", get)
    with made._turn("serve", time.monotonic() + 60):
        assert not said
    said = [ray.exceptions.GetTimeoutError("late")]
    with pytest.raises(ModelError, match="register does not answer"), made._turn("serve", time.monotonic() - 1):
        pytest.fail("nobody gave the turn")
