"""A camera, a device and a server of plain Python, for the client's pipelines on virtual time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_client.capture.base import Delivery
from edge_client.control import ControlConfig, Controller, LocalOption
from edge_client.device.engine import Encoded, Features
from edge_client.frames import CapturedFrame
from edge_client.transport.base import Gate, Welcome
from protos.errors import HeadtailError, OverloadedError, PayloadError, UnreachableError
from protos.messages import Classification, ClassScore, Detection, FrameLayer, PayloadKind, Result, ServerTimings
from splitters.bundle.manifest import Preprocess
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.codec import Symbols
from splitters.tasks.classification import ClassificationTask
from tests.fakes.client_loop import VirtualLoop

ANSWER = Classification(top=(ClassScore(class_id=1, score=0.9),))
LOCAL_ANSWER = Classification(top=(ClassScore(class_id=2, score=0.6),))
IMAGE = np.zeros((8, 8, 3), np.uint8)
MS = 1_000_000


class FakeFrames:
    """``count`` frames at ``fps``; live: newest wins."""

    note = ""

    def __init__(self, loop: VirtualLoop, *, count: int, fps: float = 30.0, live: bool = True) -> None:
        self.live, self.fps = live, fps
        self._loop, self._count = loop, count
        self._made = 0
        self._slot: CapturedFrame | None = None
        self._superseded: list[CapturedFrame] = []
        self._changed = asyncio.Event()
        self._closed = False

    async def start(self) -> None:
        if self.live:
            self._publish()

    def _make(self) -> CapturedFrame:
        frame = CapturedFrame(
            index=self._made,
            image=IMAGE,
            captured_ns=self._loop.clock(),
            captured_unix_ns=self._loop.clock(),
            width_px=8,
            height_px=8,
        )
        self._made += 1
        return frame

    def _publish(self) -> None:
        if self._closed or self._made >= self._count:
            self._closed = True
            self._changed.set()
            return
        if self._slot is not None:
            self._superseded.append(replace(self._slot, image=None))
        self._slot = self._make()
        self._changed.set()
        self._loop.call_later(1 / self.fps, self._publish)

    async def next(self) -> Delivery | None:
        if not self.live:
            await asyncio.sleep(0.001)
            if self._closed or self._made >= self._count:
                return None
            return Delivery(frame=self._make())
        while self._slot is None:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        frame, self._slot = self._slot, None
        superseded, self._superseded = tuple(self._superseded), []
        return Delivery(frame=frame, superseded=superseded)

    def close(self) -> tuple[CapturedFrame, ...]:
        self._closed = True
        self._changed.set()
        left = [*self._superseded, *([self._slot] if self._slot else [])]
        self._superseded, self._slot = [], None
        return tuple(left)


POINTS = (
    OperatingPoint(
        id=0, channels=8, bits=8, accuracy=0.75, payload_bytes=Quantiles(p50=4000, p95=5000), head_ms=Quantiles(p50=5, p95=8)
    ),
    OperatingPoint(
        id=1, channels=8, bits=4, accuracy=0.70, payload_bytes=Quantiles(p50=1500, p95=2000), head_ms=Quantiles(p50=5, p95=8)
    ),
)


JPEG = b"\xff\xd8"


class FakeEngine:
    """Costs virtual time through ``FakeDevice``; answers with constants."""

    def __init__(
        self, device: FakeDevice, sha256: str = "a" * 64, *, head_ms: float = 5, local_ms: float = 20, local: bool = True
    ) -> None:
        self.sha256, self.model, self.labels = sha256, "fake", {1: "one", 2: "two"}
        self.task = ClassificationTask({}, Preprocess(resize="stretch", size_px=(8, 8)))
        self.bundle = SimpleNamespace(points=POINTS, point=lambda i: {p.id: p for p in POINTS}[i])
        self._device, self._head_ms, self.local_ms = device, head_ms, local_ms
        self.local: Any = self if local else None

    def abandon(self) -> None:
        raise AssertionError("no job here takes so long")

    def features(self, image: Any, raw: Any = None) -> Features:
        return Features(maps=[], image=image, stem_ns=0, preprocess_ns=0)

    codec = SimpleNamespace(supports_reference=False)

    def encode(self, features: Features, point: OperatingPoint, reference: Any = None) -> Encoded:
        self._device.cost_s += self._head_ms / 1000
        size = int(point.payload_bytes.p50)
        return Encoded(payloads=(bytes(size),), symbols=None, stages_ms={"head": self._head_ms, "codec": 0.0, "preprocess": 0.0})

    picture = features

    def compress(self, features: Features, image_format: str, quality: int, size_px: int = 0) -> Encoded:
        self._device.cost_s += 0.002
        return Encoded(
            payloads=(JPEG + bytes(898),), symbols=None, stages_ms={"preprocess": 0.0, "codec": 2.0}, kind=PayloadKind.IMAGE
        )

    def prepare(self, image: Any) -> Any:
        return image

    def answer(self, image: Any, size_px: tuple[int, int]) -> tuple[Classification, float]:
        self._device.cost_s += self.local_ms / 1000
        return LOCAL_ANSWER, self.local_ms


PREDICTED, NO_FRAME = b"predicted", 2**32 - 1
SYMBOLS = Symbols(point_id="fine", tensors=(np.zeros((1, 1, 1), np.int16),), layers=1, layer_count=1)


class PredictingEngine(FakeEngine):
    """Its payloads say which frame they were predicted from; ``FakeLink`` refuses those whose reference it does not hold."""

    codec = SimpleNamespace(supports_reference=True, prefix=lambda symbols, layers: symbols)

    def encode(self, features: Features, point: OperatingPoint, reference: Any = None) -> Encoded:
        _, frame = reference
        payload = PREDICTED + (NO_FRAME if frame is None else frame).to_bytes(4, "big")
        encoded = super().encode(features, point, reference)
        return replace(encoded, payloads=(payload + encoded.payloads[0],), symbols=SYMBOLS, reference=frame)


class FakeDevice:
    """An executor on virtual time: what a job cost is slept afterwards."""

    def __init__(self) -> None:
        self.cost_s = 0.0

    async def __call__(self, function: Callable[[], Any], /) -> Any:
        self.cost_s = 0.0
        value = function()
        await asyncio.sleep(self.cost_s)
        return value


def fake_controller(engine: Any, fps: float) -> Controller:
    local = LocalOption(accuracy=0.6, ms=Quantiles(p50=engine.local_ms, p95=engine.local_ms * 1.2)) if engine.local else None
    return Controller(ControlConfig(fps=fps or 30.0, initial_bps=20e6), engine.bundle.points, local=local)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """From ``at_s`` for ``for_s``: ``down`` (stream broken), ``hang`` (answers are held back), ``lose`` (never answered),
    ``refuse`` (overloaded), ``error`` (a fault of the frame), ``kind`` (another task's answer),
    ``latents`` (no images), ``drain`` (told to go, then down), ``stuck`` (what is sent waits before it enters the network);
    ``bundle`` (from then on another).
    """

    at_s: float
    for_s: float
    kind: str


@dataclass
class FakeLink:
    """A server behind a link: fixed round trip, one frame at a time through the tail, and faults by the clock."""

    loop: VirtualLoop
    events: Any
    sha256: str = "a" * 64
    rtt_s: float = 0.02
    tail_s: float = 0.005
    faults: Sequence[Fault] = ()
    fatal: HeadtailError | None = None
    up: bool = False
    error: HeadtailError | None = None
    connects: int = 0
    sent: int = 0
    answered: int = 0
    predicted: int = 0
    _closed: bool = False
    _next_id: int = 0
    _epoch: int = 0
    _busy_s: float = 0.0
    _held: list[tuple[float, int, Result, int]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)
    _held_symbols: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.welcomed, self.failed = asyncio.Event(), asyncio.Event()
        self._restarted = asyncio.Event()

    def _fault(self, kind: str) -> Fault | None:
        now = self.loop.time()
        return next((f for f in self.faults if f.kind == kind and f.at_s <= now < f.at_s + f.for_s), None)

    async def run(self) -> None:
        while not self._closed:
            if self.fatal is not None:
                raise self.fatal
            if self._fault("down") or self._fault("drain"):
                self.error = UnreachableError("down")
                self.failed.set()
                await asyncio.sleep(0.3)
                continue
            self.connects += 1
            self._epoch += 1
            self._next_id = 0
            self._held_symbols.clear()
            changed = [f for f in self.faults if f.kind == "bundle" and f.at_s <= self.loop.time()]
            sha = "b" * 64 if changed else self.sha256
            self.up = True
            self.welcomed.set()
            self.events.hello()
            self.events.on_up(Welcome(session_id="s", model="fake", bundle_sha256=sha, max_in_flight=16, max_payload_bytes=1 << 20))
            self._restarted.clear()
            told: set[Fault] = set()
            while not self._closed and not self._fault("down") and not self._restarted.is_set():
                await asyncio.sleep(0.02)
                self._release()
                if (drain := self._fault("drain")) and drain not in told:
                    told.add(drain)
                    self.events.on_draining(100 * MS)
                    self.loop.call_later(0.1, self._restarted.set)
                for f in self.faults:
                    if f.kind == "bundle" and f.at_s <= self.loop.time() and sha == self.sha256 and f not in told:
                        told.add(f)
                        self.events.on_bundle_changed("b" * 64)
            self.up = False
            self._held.clear()
            if not self._closed:
                self.events.on_down(UnreachableError("broken"))

    def _release(self) -> None:
        while self._held and not self._fault("hang"):
            _, _, result, epoch = heapq.heappop(self._held)
            self._deliver(result, epoch)

    def _deliver(self, result: Result, epoch: int) -> None:
        if epoch != self._epoch or not self.up:
            return
        if self._fault("hang"):
            heapq.heappush(self._held, (self.loop.time(), next(self._order), result, epoch))
            return
        self.answered += 1
        self.events.on_result(result, self.loop.clock())

    def send(self, layers: list[FrameLayer], *, deadline_ns: int | None, gate: Gate | None = None) -> int:
        wire_id, self._next_id = self._next_id, self._next_id + 1
        self.loop.call_soon(self._transmit, wire_id, layers, deadline_ns, gate, self._epoch)
        return wire_id

    def _transmit(self, wire_id: int, layers: list[FrameLayer], deadline_ns: int | None, gate: Gate | None, epoch: int) -> None:
        if epoch != self._epoch or not self.up:
            return
        now_ns = self.loop.clock()
        if stuck := self._fault("stuck"):
            in_turn_s = stuck.at_s + stuck.for_s + wire_id * 1e-9
            self.loop.call_at(in_turn_s, self._transmit, wire_id, layers, deadline_ns, gate, epoch)
            return
        if (deadline_ns is not None and now_ns >= deadline_ns) or (gate is not None and not gate(0, len(layers[0].payload))):
            self.events.on_unsent(wire_id)
            return
        self.sent += 1
        self.events.on_sent(wire_id, 0, len(layers[0].payload), now_ns)
        if self._fault("lose"):
            return
        error: HeadtailError | None = None
        if self._fault("refuse"):
            error = OverloadedError("busy")
        elif self._fault("error") or (self._fault("latents") and layers[0].payload[:2] == JPEG):
            error = HeadtailError("no")
        elif not self._holds(wire_id, layers[0].payload):
            error = PayloadError("the server does not hold the frame that this one was predicted from")
        answer = Detection(boxes=()) if self._fault("kind") else ANSWER
        start_s = max(self.loop.time() + self.rtt_s / 2, self._busy_s)
        self._busy_s = start_s + self.tail_s
        timings = ServerTimings(tail_ns=round(self.tail_s * 1e9), total_ns=round(self.tail_s * 1e9))
        held = wire_id in self._held_symbols
        result = Result(
            frame_id=wire_id, answer=None if error else answer, error=error, timings=timings, echo_sent_ns=now_ns,
            layers_decoded=int(held), symbols_crc32=SYMBOLS.crc32() if held else 0,
        )  # fmt: skip
        self.loop.call_at(self._busy_s + self.rtt_s / 2, self._deliver, result, epoch)

    def _holds(self, wire_id: int, payload: bytes) -> bool:
        """Whether the reference of a predicted frame is here; then this one is too."""
        if payload[: len(PREDICTED)] == PREDICTED:
            reference = int.from_bytes(payload[len(PREDICTED) :][:4], "big")
            if reference not in (NO_FRAME, *self._held_symbols):
                return False
            self._held_symbols.add(wire_id)
            self.predicted += reference != NO_FRAME
        return True

    def restart(self) -> None:
        self._restarted.set()

    def close(self) -> None:
        self._closed = True
