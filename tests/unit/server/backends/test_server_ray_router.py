"""Frames go where the fewest of them are, by this door's own count."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'headtail[ray]'")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from edge_server.backends.ray import router as ray_router
from edge_server.backends.ray.replica import ROUTER
from edge_server.backends.ray.router import LeastOutstandingRouter

TAIL = DeploymentID("tail", "app")


class FakeReplica:
    max_ongoing_requests = 1024
    multiplexed_model_ids = frozenset[str]()

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, TAIL)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


@pytest.fixture
async def replicas() -> list[FakeReplica]:
    return [FakeReplica(name) for name in "ab"]


@pytest.fixture
async def router(replicas: list[FakeReplica]) -> LeastOutstandingRouter:
    made = LeastOutstandingRouter(
        deployment_id=TAIL, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    made.update_replicas(replicas)
    await asyncio.sleep(0)
    return made


def asked(model: str = "") -> Any:
    return SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=model))


async def place(router: LeastOutstandingRouter) -> ReplicaID:
    """One frame, sent."""
    chosen = (await router._choose_replica_for_request(asked())).replica_id
    router.on_send_request(chosen)
    return chosen


async def test_serve_loads_the_router_by_the_name_that_deployments_carry() -> None:
    from ray._common.utils import import_attr

    assert import_attr(ROUTER) is LeastOutstandingRouter


async def test_frames_are_shared_out_evenly_whatever_a_replica_said_a_while_ago(
    router: LeastOutstandingRouter, replicas: list[FakeReplica]
) -> None:
    a, b = (r.replica_id for r in replicas)
    held: list[ReplicaID] = []
    for _ in range(20):
        held.append(await place(router))
        router.on_new_queue_len_info(a, 0)  # what was true when the frame that is answered now came in
        router.on_new_queue_len_info(b, 15)
        assert abs(held.count(a) - held.count(b)) <= 1
    for _ in range(6):  # one answers faster: what it gives back it gets again
        router.on_request_completed(b, "")
        assert await place(router) == b


async def test_a_burst_is_not_placed_on_one(router: LeastOutstandingRouter, replicas: list[FakeReplica]) -> None:
    placed = await asyncio.gather(*(place(router) for _ in range(16)))
    assert placed.count(replicas[0].replica_id) == 8


async def test_a_replica_that_cannot_be_reached_does_not_draw_all_frames(
    router: LeastOutstandingRouter, replicas: list[FakeReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (r.replica_id for r in replicas)
    now_s = 100.0
    monkeypatch.setattr(ray_router, "time", SimpleNamespace(monotonic=lambda: now_s))
    router.on_replica_actor_unavailable(a)
    assert [await place(router) for _ in range(5)] == [b] * 5
    ranks = await router.choose_replicas(replicas, asked())
    assert [[r.replica_id for r in rank] for rank in ranks] == [[b], [a]]  # asked all the same when there is no other
    now_s += 1.1
    assert await place(router) == a


async def test_a_replica_that_left_is_forgotten(router: LeastOutstandingRouter, replicas: list[FakeReplica]) -> None:
    for _ in range(4):
        await place(router)
    router.update_replicas(replicas[1:])
    assert {await place(router) for _ in range(3)} == {replicas[1].replica_id}
    router.update_replicas(replicas)
    assert await place(router) == replicas[0].replica_id  # back, and with nothing in hand
