"""A simulated device: captures frames, asks its policy, spends device time, sends, waits, falls back, answers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from deploy.testbed.link.layering import Layer, Layers, split_bytes
from deploy.testbed.link.loop import Loop
from deploy.testbed.link.path import Path
from deploy.testbed.simulate.frame import Frame
from deploy.testbed.simulate.server import Server
from deploy.testbed.workload import Workload
from edge_client.control import Decision, Explanation, Local, Offload, Policy, Skip, Split
from edge_client.device.timings import SCHEDULING_NS
from protos.messages import Grant
from splitters.bundle.operating_point import Quantiles

# HTTP/2, gRPC and protobuf around a layer, as measured on the wire for a small payload.
OVERHEAD_BYTES = 64
PING_BYTES = 40
HELD_BEFORE_NS = SCHEDULING_NS
"""A local answer that waits for the server's is given so long before the deadline, as in the real client."""
_REMOTE = (Split, Offload)
_GRACE_NS = 100_000_000  # beyond a frame's deadline nothing is waited for any longer: as the real client


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraConfig:
    """Of one simulated camera."""

    fps: float
    deadline_ns: int
    start_ns: int
    stop_ns: int
    seed: str
    base_rtt_ns: int = 0


class Camera:
    """One device. Its inference thread does one thing at a time; a due fallback goes first, then the newest frame."""

    def __init__(
        self,
        loop: Loop,
        config: CameraConfig,
        workload: Workload,
        policy: Policy,
        up: Path,
        down: Path,
        server: Server,
        layers: Layers | None = None,
    ) -> None:
        """``workload`` has the device's own times, slowdown included."""
        self._layers: Layers = layers or {}
        self.loop, self.config, self.policy = loop, config, policy
        self.up, self.down, self.server = up, down, server
        self.result_bytes = workload.result_bytes
        self.frames: list[Frame] = []
        self.explanations: list[Explanation] = []
        self.busy = False
        self._waiting: Frame | None = None
        self._fallbacks: deque[Frame] = deque()
        self._rng = random.Random(f"device/{config.seed}")  # noqa: S311
        self._clip = workload.clip
        self._reference: int | None = None  # the newest frame sent that another may be predicted from
        self._costs: dict[str, tuple[Quantiles, float, Quantiles]] = {}
        for p in workload.points:
            self._costs[f"split {p.id}"] = (p.head_ms, p.accuracy, p.payload_bytes)
        for o in workload.offloads:
            name = Offload(format=o.format, quality=o.quality, size_px=o.size_px).name
            self._costs[name] = (o.encode_ms, o.accuracy, o.payload_bytes)
        if workload.local:
            self._costs["local"] = (workload.local.ms, workload.local.accuracy, Quantiles(p50=0, p95=0))
        policy.on_connect(0)
        loop.at(config.start_ns, self._capture)

    # ------------------------------------------------------------------ frames in

    def _capture(self, _: object) -> None:
        now, c = self.loop.now_ns, self.config
        frame = Frame(self, len(self.frames), now, now + c.deadline_ns)
        self.frames.append(frame)
        later = c.start_ns + int(len(self.frames) * 1e9 / c.fps)
        if later < c.stop_ns:
            self.loop.at(later, self._capture)
        if self.policy.ping_due(now):
            self.up.send(PING_BYTES, self._ping_arrived, now)
        if self.busy:
            if self._waiting is not None:
                self._drop(self._waiting, "superseded")
            self._waiting = frame
        else:
            self._begin(frame)

    def _begin(self, frame: Frame) -> None:
        now = self.loop.now_ns
        age = frame.frame_id - self._reference if self._reference is not None and self._clip is not None else 0
        self.policy.on_reference(age)
        self.policy.on_transport(reliable=not self.up.unreliable, lost=self.up.lost)
        decision = self.policy.decide(frame.frame_id, now, frame.deadline_ns)
        name = frame.choice = decision.name
        if decision.explain is not None:
            self.explanations.append(decision.explain)
        if isinstance(decision, Skip):
            self._drop(frame, "skipped" if decision.reason != "late" else "late")
            return
        self.busy = True
        ms, frame.value, size = self._costs[name]
        elapsed = int(log_normal(self._rng, ms) * 1e6)
        found = self._clip.bytes_of(name, age, frame.frame_id) if self._clip is not None else None
        frame.payload_bytes = found if found is not None else int(log_normal(self._rng, size)) if size.p50 else 0
        self.loop.at(now + elapsed, self._device_done, (frame, decision, elapsed))

    def _device_done(self, done: tuple[Frame, Decision, int]) -> None:
        frame, decision, elapsed = done
        self.busy = False
        self.policy.on_device(decision, elapsed, self.loop.now_ns)
        if isinstance(decision, Local) and frame.hold and self.loop.now_ns < frame.deadline_ns - HELD_BEFORE_NS:
            self.loop.at(frame.deadline_ns - HELD_BEFORE_NS, self._release, frame)
        elif isinstance(decision, Local):
            self._answer(
                frame, "local", frame.value if not frame.choice.startswith(("split", "jpeg", "webp")) else self._costs["local"][1]
            )
        elif isinstance(decision, _REMOTE):
            self.policy.on_payload(decision, frame.payload_bytes, self.loop.now_ns)
            sent, fallback_ns = self._send(frame, self._layers.get(frame.choice, ())), decision.fallback_ns
            if sent:
                frame.whole, frame.hold = isinstance(decision, Offload), decision.hold
                if self.up.unreliable:
                    self.loop.at(frame.deadline_ns + _GRACE_NS, self._give_up, frame)
                elif not frame.whole:
                    self._reference = frame.frame_id
                if fallback_ns is not None:
                    self.loop.at(fallback_ns, self._fall_back, frame)
            elif fallback_ns is not None:
                self._fallbacks.append(frame)
            else:
                self._drop(frame, "window")
        self._next()

    def _send(self, frame: Frame, layers: Sequence[Layer]) -> bool:
        """The base first, each further layer while it may; whether the base left."""
        now = self.loop.now_ns
        self.up.allow(self.policy.frame_bytes())
        sizes = split_bytes(frame.payload_bytes, layers) if layers else [frame.payload_bytes]
        for i, n_bytes in enumerate(sizes):
            if not self.policy.may_send(frame.frame_id, n_bytes, now, frame.deadline_ns, layer=i):
                break
            if i == 0:
                frame.sent_ns, frame.payload_bytes = now, 0
                frame.remaining_ns = max(0, frame.deadline_ns - now - self.config.base_rtt_ns)
                frame.layers = tuple(layer.accuracy for layer in layers)
            frame.payload_bytes += n_bytes
            self.policy.on_sent(frame.frame_id, n_bytes, now)
            if layers:
                self.up.send(n_bytes + OVERHEAD_BYTES, self.server.layer_arrived, (frame, i, n_bytes))
            else:
                self.up.send(n_bytes + OVERHEAD_BYTES, self.server.arrived, frame)
        return bool(frame.sent_ns)

    def _next(self) -> None:
        while not self.busy and self._fallbacks:
            self._run_local(self._fallbacks.popleft())
        while not self.busy and self._waiting is not None:
            frame, self._waiting = self._waiting, None
            self._begin(frame)

    def _fall_back(self, frame: Frame) -> None:
        if frame.outcome or not self.policy.wants_fallback(frame.frame_id, self.loop.now_ns, frame.deadline_ns):
            return
        if self.busy:
            self._fallbacks.append(frame)
        else:
            self._run_local(frame)

    def _run_local(self, frame: Frame) -> None:
        now = self.loop.now_ns
        ms = self._costs["local"][0]
        if frame.outcome or now + ms.p50 * 1e6 > frame.deadline_ns:
            return
        self.busy = True
        elapsed = int(log_normal(self._rng, ms) * 1e6)
        self.loop.at(now + elapsed, self._device_done, (frame, Local(), elapsed))

    # ------------------------------------------------------------------ answers

    def result(self, frame: Frame) -> None:
        """The server's answer to a frame arrived."""
        now = self.loop.now_ns
        if frame.refused:
            frame.acknowledged = True
            self.policy.on_refused(frame.frame_id, now)
            return
        frame.acknowledged = True
        self.policy.on_ack(frame.frame_id, now, frame.read_ns)
        if self.up.unreliable and not frame.whole:
            self._reference = max(self._reference or 0, frame.frame_id)
        self._answer(frame, "result", frame.value)

    def granted(self, grant: Grant) -> None:
        """A grant arrived."""
        self.policy.on_grant(
            self.loop.now_ns,
            bitrate_bps=grant.bitrate_bps,
            max_in_flight=grant.max_in_flight,
            queue_ns=grant.queue_ns,
            tail_ns=grant.tail_ns,
        )

    def _answer(self, frame: Frame, outcome: str, accuracy: float) -> None:
        now = self.loop.now_ns
        if not frame.outcome and now <= frame.deadline_ns:
            frame.outcome, frame.accuracy, frame.answered_ns = outcome, accuracy, now

    def _give_up(self, frame: Frame) -> None:
        """No answer will come any more."""
        if not frame.acknowledged:
            self.policy.on_lost(frame.frame_id, self.loop.now_ns)

    def _release(self, frame: Frame) -> None:
        """The local answer that was held: no better one came."""
        self._answer(frame, "local", self._costs["local"][1])

    def _drop(self, frame: Frame, reason: str) -> None:
        frame.outcome, frame.reason = "dropped", reason

    def _ping_arrived(self, sent_ns: int) -> None:
        self.down.send(PING_BYTES, self._pong, sent_ns)

    def _pong(self, sent_ns: int) -> None:
        self.policy.on_pong(self.loop.now_ns - sent_ns, self.loop.now_ns)

    def finish(self) -> None:
        """Every frame without an answer in time is expired."""
        for frame in self.frames:
            if not frame.outcome:
                frame.outcome = "expired"


def log_normal(rng: random.Random, q: Quantiles) -> float:
    """Drawn from the log-normal with these quantiles."""
    if q.p95 <= q.p50 or q.p50 <= 0:
        return q.p50
    return q.p50 * exp(rng.gauss(0.0, log(q.p95 / q.p50) / 1.645))
