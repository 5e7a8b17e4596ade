"""Which replica gets a frame: the one that has the fewest of this door's frames in hand.

Serve's own router takes the shorter of two queues, by lengths that each replica reports when it accepts a call. Between
processes it speaks gRPC, where a unary call's report arrives together with its answer: by then it is as old as the queue is
long. Two replicas under a full load took all frames in turns, one idle while the other had a queue of 15 (measured with
Ray 2.60; 1.3 to 1.5 times the throughput of one replica). The door itself knows at once what it has sent and what has come back.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

from edge_server.backends.ray.imports import request_router as base

_SHUNNED_S = 1.0  # a replica that could not be reached; its death is noticed by then, or it is there again


class LeastOutstandingRouter(base.MultiplexMixin, base.RequestRouter):  # type: ignore[misc]
    """Runs in the process that makes the calls. Serve calls the ``on_…`` methods."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outstanding: Counter[base.ReplicaID] = Counter()
        self._shunned_until_s: dict[base.ReplicaID, float] = {}

    async def choose_replicas(
        self, candidate_replicas: list[base.RunningReplica], pending_request: base.PendingRequest | None = None
    ) -> list[list[base.RunningReplica]]:
        """The candidates, best first; on a shelf only those that hold the tail, or may load it."""
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            able = self.apply_multiplex_routing(pending_request)
            candidate_replicas = [r for r in candidate_replicas if r.replica_id in able]
        return [[r] for r in sorted(candidate_replicas, key=self._rank)]

    def _rank(self, replica: base.RunningReplica) -> tuple[bool, int, float]:
        return (self._shunned(replica.replica_id), self._outstanding[replica.replica_id], random.random())  # noqa: S311

    def _shunned(self, replica_id: base.ReplicaID) -> bool:
        return time.monotonic() < self._shunned_until_s.get(replica_id, 0.0)

    async def _choose_replica_for_request(
        self, pending_request: base.PendingRequest, *, is_retry: bool = False
    ) -> base.RunningReplica:
        """Chooses without a task and a queue in between, so that no second frame is placed before this one counts.

        Serve's general way is left to what it is for: shelves, no replica to reach, a replica that refused.
        """
        if not is_retry and not pending_request.metadata.multiplexed_model_id:
            able = [r for r in self.curr_replicas.values() if not self._shunned(r.replica_id)]
            if able:
                return min(able, key=self._rank)
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    def on_send_request(self, replica_id: base.ReplicaID) -> None:
        """A frame is on its way."""
        super().on_send_request(replica_id)
        self._outstanding[replica_id] += 1

    def on_request_completed(self, replica_id: base.ReplicaID, internal_request_id: str) -> None:
        """It came back, failed or was given up."""
        super().on_request_completed(replica_id, internal_request_id)
        self._outstanding[replica_id] = max(0, self._outstanding[replica_id] - 1)

    def on_replica_actor_unavailable(self, replica_id: base.ReplicaID) -> None:
        """A replica that fails at once has nothing outstanding; without this it would get every frame."""
        super().on_replica_actor_unavailable(replica_id)
        self._shunned_until_s[replica_id] = time.monotonic() + _SHUNNED_S

    def update_replicas(self, replicas: list[base.RunningReplica]) -> None:
        """Which there are now."""
        super().update_replicas(replicas)
        for known in (self._outstanding, self._shunned_until_s):
            for gone in set(known) - set(self.curr_replicas):
                del known[gone]
