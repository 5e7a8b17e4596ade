"""A simulated server: a door, tails, batches, earliest deadline first, grants from the real bandwidth manager."""

from __future__ import annotations

import random
from math import exp, log

from deploy.testbed.link.loop import Loop
from deploy.testbed.simulate.frame import Device, Frame
from deploy.testbed.workload import ServerTimes
from edge_server.backends.admission import Work, shed
from edge_server.bandwidth.arrivals import Arrivals
from edge_server.bandwidth.grants import BandwidthManager
from splitters.bundle.operating_point import Quantiles

_GRANT_BYTES = 60
_MARGIN_NS = 5_000_000  # as the real server's


class Server:
    """All sessions' door and tails.

    Args:
        loop: virtual time.
        times: of a tail.
        seed: of the tails' times.
        bandwidth: None: no grants.
        tails: batches that run at a time.
        door_ms: the door's own time for a frame; frames pass it one after the other.

    Attributes:
        refused: frames that were told no.
        served: frames that were answered.
        door_busy_ns, tails_busy_ns: how long the door, and the tails together, worked.
    """

    def __init__(
        self,
        loop: Loop,
        times: ServerTimes,
        *,
        seed: str,
        bandwidth: BandwidthManager | None = None,
        tails: int = 1,
        door_ms: float = 0.0,
    ) -> None:
        self._loop = loop
        self._tails = tails
        self._door_ns = int(door_ms * 1e6)
        self._door_free_ns = 0
        self._times = times
        self._rng = random.Random(f"server/{seed}")  # noqa: S311
        self._queue: list[tuple[int, Frame, int]] = []  # deadline, frame, arrived
        self._busy = 0
        self._bandwidth = bandwidth
        self._sessions: dict[int, str] = {}
        self._arrivals: dict[int, Arrivals] = {}
        self._partial: dict[int, tuple[Frame, int]] = {}  # by camera: a frame of which layers are missing, its deadline
        self.refused = self.served = self.door_busy_ns = self.tails_busy_ns = 0

    def open(self, camera: Device, session_id: str, group: str, fps: float, points: list[tuple[float, float]]) -> None:
        """A camera connects."""
        self._sessions[id(camera)] = session_id
        if self._bandwidth is not None:
            self._bandwidth.open(session_id, group, fps=fps, points=points)

    def arrived(self, frame: Frame) -> None:
        """A whole frame was read."""
        now, waited_ns = self._loop.now_ns, self._note(frame, frame.payload_bytes)
        self._take(frame, now - waited_ns + frame.remaining_ns, now)

    def layer_arrived(self, row: tuple[Frame, int, int]) -> None:
        """A layer was read. Its frame runs when it is whole, when the next one begins, or when its time is up."""
        frame, layer, n_bytes = row
        now, key = self._loop.now_ns, id(frame.camera)
        waited_ns = self._note(frame, n_bytes)
        if frame.taken:
            return
        if layer == 0:
            self._cut((key, None))
            due_ns = now - waited_ns + frame.remaining_ns
            self._partial[key] = (frame, due_ns)
            tail_ns = int((self._times.tail_ms.p95 + self._times.decode_ms) * 1e6)
            self._loop.at(due_ns - tail_ns - _MARGIN_NS, self._cut, (key, frame))
        frame.value, frame.read_ns = frame.layers[layer], now
        if layer == len(frame.layers) - 1:
            self._cut((key, frame))

    def _cut(self, row: tuple[int, Frame | None]) -> None:
        """Takes the camera's unfinished frame as far as it arrived, should it (still) be the one meant; None: any."""
        key, meant = row
        frame, due_ns = self._partial.get(key, (None, 0))
        if frame is not None and (meant is None or meant is frame):
            del self._partial[key]
            frame.taken = True
            self._take(frame, due_ns, frame.read_ns)

    def _note(self, frame: Frame, n_bytes: int) -> int:
        """Tells the grants; returns how long the layer waited in queues, as the server can know it."""
        now = self._loop.now_ns
        if self._bandwidth is None:
            arrivals = self._arrivals.setdefault(id(frame.camera), Arrivals())
            arrivals.add(n_bytes, frame.sent_ns, now)
            return arrivals.queue_ns
        session = self._sessions[id(frame.camera)]
        self._bandwidth.on_layer(session, n_bytes, frame.sent_ns, now)
        waited_ns = self._bandwidth.queue_ns(session)
        grant = self._bandwidth.grant(session, now)
        if grant is not None:
            frame.camera.down.send(_GRANT_BYTES, frame.camera.granted, grant)
        return waited_ns

    def _take(self, frame: Frame, due_ns: int, arrived_ns: int) -> None:
        row = (due_ns, frame, arrived_ns)
        if not self._door_ns:
            self._wait(row)
            return
        self._door_free_ns = max(self._door_free_ns, self._loop.now_ns) + self._door_ns
        self.door_busy_ns += self._door_ns
        self._loop.at(self._door_free_ns, self._wait, row)

    def _wait(self, row: tuple[int, Frame, int]) -> None:
        """A frame has passed the door."""
        self._queue.append(row)
        if self._busy < self._tails:
            self._start()

    def _start(self) -> None:
        times, now = self._times, self._loop.now_ns
        if len(self._queue) > 1:
            self._queue.sort(key=lambda row: row[0])
            if len(self._queue) > times.max_batch:
                self._shed(now)
        batch, self._queue = self._queue[: times.max_batch], self._queue[times.max_batch :]
        if not batch:
            return
        first = max((times.whole_ms if f.whole else times.tail_ms for _, f, _ in batch), key=lambda q: q.p50)
        ms = times.decode_ms + _draw(self._rng, first) * (1 + times.marginal * (len(batch) - 1))
        self._busy += 1
        self.tails_busy_ns += int(ms * 1e6)
        self._loop.at(now + int(ms * 1e6), self._done, batch)

    def _shed(self, now_ns: int) -> None:
        """Work that cannot make it is refused before it costs anything."""
        cost = int(self._times.tail_ms.p50 * 1e6 * self._times.marginal / self._tails)
        rows = dict(enumerate(self._queue))
        _, refused = shed([Work(key=i, deadline_ns=row[0], cost_ns=cost) for i, row in rows.items()], now_ns)
        for work in refused:
            _, frame, arrived_ns = rows.pop(work.key)  # type: ignore[call-overload]
            frame.refused, frame.read_ns = True, now_ns - arrived_ns
            self.refused += 1
            frame.camera.down.send(frame.camera.result_bytes, frame.camera.result, frame)
        self._queue = list(rows.values())

    def _done(self, batch: list[tuple[int, Frame, int]]) -> None:
        now = self._loop.now_ns
        for _, frame, arrived_ns in batch:
            frame.read_ns = now - arrived_ns
            frame.camera.down.send(frame.camera.result_bytes, frame.camera.result, frame)
        self.served += len(batch)
        self._busy -= 1
        if self._queue:
            self._start()


def _draw(rng: random.Random, q: Quantiles) -> float:
    if q.p95 <= q.p50 or q.p50 <= 0:
        return q.p50
    return q.p50 * exp(rng.gauss(0.0, log(q.p95 / q.p50) / 1.645))
