"""What live and file pipelines share: the session's events, answers, the local model's turn, a new bundle.

One event loop; head and local model run on the device's worker. Every captured frame gets exactly one outcome, whatever
fails: the ledger says so at every moment, and ``run`` does not return before it is empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from edge_client.capture import Delivery
from edge_client.control import Decision, Local, Offload
from edge_client.engine import NO_REFERENCE, Encoded, Engine, Features, learn_reference
from edge_client.flights import Flight, next_turn
from edge_client.frames import NS_PER_MS, NS_PER_S, CapturedFrame, Ledger, Outcome
from edge_client.parts import Link, Parts, PipelineConfig, Shot
from edge_client.references import ReferenceAges
from edge_client.session import Gate, Welcome
from edge_client.timings import SCHEDULING_NS, DevicePace, Timings
from edge_client.update import BundleUpdate
from protos.errors import HeadtailError, OverloadedError, ProtocolError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, Answer, FrameLayer, Grant, PayloadKind, Result
from splitters.bundle.operating_point import OperatingPoint, Quantiles
from splitters.codec import Predictor

log = logging.getLogger(__name__)

Make = Callable[[Engine, Features], Encoded]

LATE_GRACE_NS = 100 * NS_PER_MS
_HISTORY = 16  # frames back that a latent may be predicted from; every server remembers so many
_FORGET_NS = 6 * NS_PER_S  # longer than a session waits for a silent server: else frames would go on entering a dead network
_STOP_S = 8.0
_HEAD_ENDS_S = 5.0
_UNANSWERED_NS = 60 * NS_PER_S
_LAST_JOB_S = 1.0


class Pipeline:
    """Base of ``LivePipeline`` and ``FilePipeline``; see the module."""

    def __init__(self, config: PipelineConfig, parts: Parts, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.ledger = Ledger()
        self.late_results = 0
        self.bundle_switches = 0
        self.link: Link
        self._parts = parts
        self._clock = parts.clock
        self._frames = parts.frames
        self._worker = parts.worker
        self._worker.overdue = self._abandon
        self.controller = parts.controller(engine, 0.0)
        self.timings = Timings()
        self._pace = self._new_pace()
        self.predictor = self._new_predictor()
        self.ages = ReferenceAges()
        self.interest = parts.interest(engine)
        self._flights: dict[int, Flight] = {}
        self._orphans: list[Flight] = []
        self._server_sha256 = ""
        self._welcome_limit = 0
        self._draining = False
        self._changed = asyncio.Event()
        self._update = BundleUpdate(parts.fetch, lambda: self.link.up, self._notify)
        self._stopping = False
        self._stop_asked = asyncio.Event()
        self._finished = False

    # ------------------------------------------------------------------ life

    async def run(self, link: Link) -> None:
        """Runs to the source's end or ``stop``; afterwards every captured frame has its outcome.

        Raises:
            HeadtailError: the source failed, or the server refused us before it ever took us.
        """
        self.link = link
        session = asyncio.create_task(link.run())
        main = asyncio.create_task(self._main())
        rescue = asyncio.create_task(self._rescue_loop())
        patience = asyncio.create_task(self._patience())
        try:
            await asyncio.wait({session, main, rescue, patience}, return_when=asyncio.FIRST_COMPLETED)
            if session.done() and session.exception() is None:
                await asyncio.wait({main, rescue, patience}, return_when=asyncio.FIRST_COMPLETED)
            for task in (main, rescue, session):
                if task.done():
                    task.result()
        finally:
            self._finished = True
            for frame in self._frames.close():
                self._capture(frame)
                self._settle_frame(frame, Outcome.DROPPED, "stopped")
            self._update.cancel()
            for task in (main, rescue, patience):
                task.cancel()
            for flight in [*self._flights.values(), *self._orphans, *self._waiting()]:
                self._settle(flight, Outcome.DROPPED, "stopped")
            link.close()
            with suppress(TimeoutError, HeadtailError):
                await asyncio.wait_for(session, 1.5)
            await asyncio.gather(main, rescue, return_exceptions=True)
            hopeless = asyncio.get_running_loop().call_later(_LAST_JOB_S, self._abandon)
            with suppress(TimeoutError):  # a head that does not come back holds nobody up
                await asyncio.wait_for(self._worker.join(), _HEAD_ENDS_S)
            hopeless.cancel()

    async def _patience(self) -> None:
        """Ends, and the run with it, some time after ``stop``, whatever the last frame waits for."""
        await self._stop_asked.wait()
        await asyncio.sleep(_STOP_S)

    def _abandon(self) -> None:
        """The device is at a job that does not end by itself."""
        log.error("a model has been at one frame for too long; it is given up")
        engines = [self.engine, *(f.engine for f in [*self._in_flight(), *self._waiting()])]
        for engine in {id(e): e for e in engines}.values():
            engine.abandon()

    def stop(self) -> None:
        """Ends the source; what is in flight is still waited for, shortly."""
        self._stopping = True
        self._stop_asked.set()
        for frame in self._frames.close():
            self._capture(frame)
            self._settle_frame(frame, Outcome.DROPPED, "stopped")
        self._notify()

    async def _main(self) -> None:
        raise NotImplementedError

    def _waiting(self) -> list[Flight]:
        """Frames a subclass holds outside of ``_flights``."""
        return []

    @property
    def note(self) -> str:
        """One line for the status, mostly empty."""
        return self._update.note

    @property
    def connected(self) -> bool:
        """Whether the server takes frames of our bundle now."""
        return self.link.up and not self._draining and self._server_sha256 == self.engine.sha256

    def _notify(self) -> None:
        self._changed.set()

    async def _wait_changed(self, timeout_s: float | None = None) -> None:
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # wait_for may swallow a cancellation that comes with the event
                await self._changed.wait()

    async def _wait_for_server(self, limit_s: float) -> bool:
        """Waits until the first welcome, or until ``limit_s`` have passed and an attempt has failed."""
        until_ns = self._clock() + int(limit_s * NS_PER_S)
        while not self.link.welcomed.is_set():
            left_s = (until_ns - self._clock()) / NS_PER_S
            if self._stopping or (left_s <= 0 and self.link.failed.is_set()):
                return False
            await self._wait_changed(max(0.05, min(left_s, 0.25)))
        return True

    def _new_predictor(self) -> Predictor | None:
        codec = self.engine.codec
        if not (self.config.temporal and codec.supports_reference):
            return None
        return Predictor(codec, max_frames=_HISTORY, reliable=True)  # a stream: what is sent arrives, or the session ends

    # ------------------------------------------------------------------ frames and their outcomes

    def _capture(self, frame: CapturedFrame) -> None:
        self.ledger.capture(frame.index)

    def _take(self, delivery: Delivery) -> Flight:
        """Accounts for a delivery and makes a flight of its frame."""
        for frame in delivery.superseded:
            self._capture(frame)
            self._settle_frame(frame, Outcome.DROPPED, "superseded")
        frame = delivery.frame
        self._capture(frame)
        deadline_ns = frame.captured_ns + int(self.config.deadline_ms * NS_PER_MS) if self.config.deadline_ms > 0 else None
        stages = {"capture": (self._clock() - frame.captured_ns) / NS_PER_MS}
        return Flight(frame=frame, engine=self.engine, deadline_ns=deadline_ns, stages_ms=stages)

    def _settle_frame(self, frame: CapturedFrame, outcome: Outcome, reason: str = "") -> None:
        self._settle(Flight(frame=frame, engine=self.engine, deadline_ns=None), outcome, reason)

    def _settle(self, flight: Flight, outcome: Outcome, reason: str = "", answer: Answer | None = None, detail: str = "") -> bool:
        frame = flight.frame
        if not self.ledger.settle(frame.index, outcome, reason):
            return False
        answer = self.config.floor.cut(answer, flight.engine.bundle)
        report = flight.report(outcome, reason, answer, detail, now_ns=self._clock())
        self._parts.emit(report if self.config.keep_images else replace(report, frame=replace(frame, image=None)))
        self._on_settled(flight, outcome, answer)
        self._notify()
        return True

    def _on_settled(self, flight: Flight, outcome: Outcome, answer: Answer | None) -> None:
        """A hook for what learns from outcomes."""

    # ------------------------------------------------------------------ head and sending

    def _shoot(self, flight: Flight, make: Make, *, keep_local: bool) -> Shot:
        """Runs on the worker: everything the device does before the network."""
        engine, image = flight.engine, flight.frame.image
        assert image is not None  # noqa: S101 - flights keep it until they are encoded
        features = flight.features or engine.features(image)
        flight.features = None
        encoded = make(engine, features)
        local_image = engine.local.prepare(image) if keep_local and engine.local else None
        return Shot(encoded=encoded, input_image=features.image, local_image=local_image)

    async def _encode(self, flight: Flight, point: OperatingPoint, *, keep_local: bool) -> Shot:
        """Head and codec at an operating point."""
        reference = self.predictor.choose() if self.predictor is not None else NO_REFERENCE
        flight.point_id = point.id
        return await self._run_head(flight, lambda e, f: e.encode(f, point, reference), keep_local=keep_local)

    async def _run_head(self, flight: Flight, make: Make, *, keep_local: bool) -> Shot:
        start_ns = self._clock()
        due_ns = flight.deadline_ns if flight.deadline_ns is not None else start_ns + 3600 * NS_PER_S
        shot = await self._worker.run(partial(self._shoot, flight, make, keep_local=keep_local), due_ns=due_ns)
        flight.encoded_ns = self._clock()
        flight.stages_ms |= shot.encoded.stages_ms
        flight.local_image = shot.local_image
        self.timings.head.add(flight.encoded_ns - start_ns)
        if flight.decision is not None:
            self._on_device(flight.decision, flight.encoded_ns - start_ns)
            self.controller.on_payload(flight.decision, shot.encoded.payload_bytes, flight.encoded_ns)
        if flight.frame.image is not None:
            self._parts.sample(flight.frame.image, shot.input_image)
        return shot

    def _on_device(self, decision: Decision, elapsed_ns: int) -> None:
        """Tells the controller how long the device took, and what that means for the choices not made."""
        self.controller.on_device(decision, elapsed_ns, self._clock())
        factors = self._pace.add(decision.name, elapsed_ns)
        if factors:
            for other, ms in self._parts.times().choices().items():
                if (factor := factors.get(other.name)) is not None:
                    self.controller.set_device_ms(other, Quantiles(p50=ms.p50 * factor, p95=ms.p95 * factor))

    def _new_pace(self) -> DevicePace:
        return DevicePace({d.name: ms.p50 * NS_PER_MS for d, ms in self._parts.times().choices().items()})

    def _send(self, flight: Flight, encoded: Encoded, payloads: tuple[bytes, ...], *, gate: Gate | None = None) -> None:
        frame = flight.frame
        kind = PayloadKind.LATENT if encoded.symbols is not None else PayloadKind.IMAGE
        trace = self._parts.traceparent(frame)
        layers = [
            FrameLayer(
                frame_id=0, layer=i, layer_count=len(payloads), kind=kind, operating_point=flight.point_id or 0, payload=payload,
                captured_unix_ns=frame.captured_unix_ns, source_width_px=frame.width_px, source_height_px=frame.height_px,
                traceparent="" if i else trace,
            )
            for i, payload in enumerate(payloads)
        ]  # fmt: skip
        if not self.config.keep_images:
            flight.frame = self._let_go(flight)
        flight.tries += 1
        flight.payload_bytes = 0
        wire_id = self.link.send(layers, deadline_ns=flight.deadline_ns, gate=gate)
        self._flights[wire_id], flight.wire_id = flight, wire_id
        if self.predictor is not None and encoded.symbols is not None:
            self.ages.sent(wire_id, frame.index)
            self.predictor.sent(wire_id, encoded.symbols, reference=encoded.reference)
        self._notify()

    def _let_go(self, flight: Flight) -> CapturedFrame:
        """The frame as it is kept in flight; a camera's is answered from ``local_image``."""
        return flight.frame

    # ------------------------------------------------------------------ the local model

    async def _answer_locally(self, flight: Flight, *, reason: str = "offline") -> None:
        """Gives a frame the local model's answer, or says why it cannot have one."""
        now_ns = self._clock()
        local = flight.engine.local
        flight.answering = True
        if local is None or (flight.local_image is None and flight.frame.image is None):
            late = flight.deadline_ns is not None and now_ns >= flight.deadline_ns
            self._settle(flight, Outcome.EXPIRED if late else Outcome.DROPPED, "" if late else flight.refusal or reason)
            return
        limit_ns = flight.deadline_ns + LATE_GRACE_NS if flight.deadline_ns is not None else None
        if limit_ns is not None and now_ns + self.timings.local.quantile(0.5) > limit_ns:
            self._settle(flight, Outcome.EXPIRED)
            return
        size_px = (flight.frame.width_px, flight.frame.height_px)

        def work() -> tuple[Answer, float] | None:
            if not self.ledger.is_open(flight.frame.index):
                return None  # the server's answer came while this job waited
            image = flight.local_image
            if image is None:
                assert flight.frame.image is not None  # noqa: S101 - checked above
                image = local.prepare(flight.frame.image)
            return local.answer(image, size_px)

        due_ns = (flight.deadline_ns or now_ns) - int(self.timings.local.quantile(0.95))
        done = await self._worker.run(work, due_ns=due_ns)
        if done is None:
            return
        answer, elapsed_ms = done
        end_ns = self._clock()
        self.timings.local.add(int(elapsed_ms * NS_PER_MS))
        self._on_device(Local(), int(elapsed_ms * NS_PER_MS))
        flight.stages_ms["local"] = elapsed_ms
        if limit_ns is not None and end_ns > limit_ns:
            self._settle(flight, Outcome.EXPIRED)
        else:
            self._settle(flight, Outcome.LOCAL, answer=answer)

    async def _rescue_loop(self) -> None:
        """Steps in for frames in flight: at once where the stream broke, when it is due where the server is silent."""
        while True:
            now_ns = self._clock()
            self._forget(now_ns)
            waiting = [f for f in self._in_flight() if self.ledger.is_open(f.frame.index)]
            local = self.engine.local is not None and self._local_allowed
            local_ns, margin_ns = self.timings.local_turn_ns() if local else (0, 0)
            turn = next_turn(waiting, local_ns=local_ns, margin_ns=margin_ns, wake_ns=SCHEDULING_NS, now_ns=now_ns)
            if turn is None:
                await self._wait_changed(self._unanswered_s(now_ns))
            elif turn[0] > now_ns:
                await self._wait_changed((turn[0] - now_ns) / NS_PER_S)
            else:
                await self._step_in(turn[1], now_ns)
            self._orphans = [f for f in self._orphans if self.ledger.is_open(f.frame.index)]

    async def _step_in(self, flight: Flight, now_ns: int) -> None:
        """A flight's turn has come: the local model's, or the end of the wait."""
        if flight.given_up or not self._local_allowed:
            self._settle(flight, Outcome.EXPIRED)
        elif flight.urgent or self._wants_fallback(flight, now_ns):
            await self._answer_locally(flight)
        else:
            flight.given_up = True

    def _wants_fallback(self, flight: Flight, now_ns: int) -> bool:  # noqa: ARG002
        """Whether the local model should answer a frame whose answer may still come; asked once, when it is due."""
        return True

    def _unanswered_s(self, now_ns: int) -> float | None:
        """Seconds until a frame without deadline has waited too long; a stream that swallows frames is begun anew."""
        oldest_ns = min((f.encoded_ns for f in self._flights.values()), default=None)
        if oldest_ns is None:
            return None
        if now_ns - oldest_ns >= _UNANSWERED_NS:
            log.warning("a frame has been unanswered for %.0f s; the stream is begun anew", _UNANSWERED_NS / NS_PER_S)
            self.link.restart()
            return 1.0
        return (oldest_ns + _UNANSWERED_NS - now_ns) / NS_PER_S

    def _in_flight(self) -> list[Flight]:
        """Frames that may need rescue."""
        return [*self._flights.values(), *self._orphans]

    @property
    def _local_allowed(self) -> bool:
        """Whether a frame in flight may be answered by the local model."""
        return True

    def _forget(self, now_ns: int) -> None:
        """Frames answered here long ago, whose result the server never sent, fill the window no longer."""
        for wire_id, flight in list(self._flights.items()):
            if not self.ledger.is_open(flight.frame.index) and now_ns - flight.encoded_ns > _FORGET_NS:
                del self._flights[wire_id]
                self.controller.on_lost(wire_id, now_ns)

    # ------------------------------------------------------------------ a new bundle

    def _swap_engine(self) -> None:
        """Between two frames: takes the bundle that was fetched in the background."""
        engine = self._update.take()
        if engine is None:
            return
        log.info("bundle %s takes over from %s", engine.sha256[:12], self.engine.sha256[:12])
        self.engine = engine
        self.controller = self._parts.controller(self.engine, self._frames.fps)
        try:
            self.interest = self._parts.interest(self.engine)
        except HeadtailError as error:  # the new bundle knows other classes: better every frame than none
            log.warning("the prefilter is off: %s", error.message)
            self.interest = None
        self.predictor, self._pace = self._new_predictor(), self._new_pace()
        self.bundle_switches += 1
        if self.link.up:
            self.link.restart()

    def _want_bundle(self, sha256: str) -> None:
        self._update.want(sha256 if sha256 != self.engine.sha256 else "")

    # ------------------------------------------------------------------ SessionEvents

    def hello(self) -> pb.Hello:
        """See ``SessionEvents``."""
        return pb.Hello(
            protocol_version=PROTOCOL_VERSION, model=self.config.model, bundle_sha256=self.engine.sha256,
            client_version=self.config.client_version, max_in_flight=self.config.max_in_flight, fps=self._frames.fps,
            group=self.config.group,
        )  # fmt: skip

    def on_up(self, welcome: Welcome) -> None:
        """See ``SessionEvents``."""
        self._draining = False
        if self.predictor is not None:
            self.predictor.reset()
        self._server_sha256 = welcome.bundle_sha256
        limits = [n for n in (welcome.max_in_flight, self.config.max_in_flight) if n > 0]
        self._welcome_limit = min(limits, default=0)
        self.controller.set_limit(self._welcome_limit)
        if welcome.bundle_sha256 == self.engine.sha256:
            self.controller.on_connect(self._clock())
            log.info("connected: model %s, session %s", welcome.model, welcome.session_id)
        self._want_bundle(welcome.bundle_sha256)
        self._notify()

    def on_down(self, error: HeadtailError) -> None:
        """See ``SessionEvents``."""
        if self._server_sha256 == self.engine.sha256 and not self._finished:  # else it ends because we wanted it to
            log.warning("the session is down: %s", error.message)
        self.controller.on_disconnect(self._clock())
        self._server_sha256 = ""
        lost, self._flights = list(self._flights.values()), {}
        self._on_lost([f for f in lost if self.ledger.is_open(f.frame.index)])
        self._notify()

    def _on_lost(self, flights: list[Flight]) -> None:
        raise NotImplementedError

    def on_result(self, result: Result, now_ns: int) -> None:
        """See ``SessionEvents``."""
        flight = self._flights.pop(result.frame_id, None)
        if flight is not None and result.error is None:
            try:
                flight.engine.task.check(result.answer)
            except ProtocolError as failure:
                result = replace(result, answer=None, error=failure)
        if self.predictor is not None:
            learn_reference(self.predictor, result)
        if isinstance(result.error, OverloadedError):
            self.controller.on_refused(result.frame_id, now_ns)
        elif result.error is not None:
            self.controller.on_lost(result.frame_id, now_ns)
        else:
            self.controller.on_ack(result.frame_id, now_ns, result.timings.total_ns)
        self._notify()
        if flight is None or not self.ledger.is_open(flight.frame.index):
            self.late_results += 1
            return
        if result.error is not None:
            self._on_refused(flight, result.error)
            return
        t = result.timings
        sent_ns = result.echo_sent_ns or flight.encoded_ns
        flight.stages_ms |= {
            "send": max(0, sent_ns - flight.encoded_ns) / NS_PER_MS,
            "network": max(0, now_ns - sent_ns - t.total_ns) / NS_PER_MS,
            "decode": t.decode_ns / NS_PER_MS,
            "queue": t.queue_ns / NS_PER_MS,
            "tail": t.tail_ns / NS_PER_MS,
        }
        if flight.deadline_ns is not None and now_ns > flight.deadline_ns + LATE_GRACE_NS:
            self.late_results += 1
            self._settle(flight, Outcome.EXPIRED)
            return
        self._on_answer(flight, result)
        self._settle(flight, Outcome.RESULT, answer=result.answer)

    def _on_answer(self, flight: Flight, result: Result) -> None:
        """A hook for what learns from the server's answers."""

    def _on_refused(self, flight: Flight, error: HeadtailError) -> None:
        """The server answered this frame with an error; the session goes on."""
        log.debug("frame %d was refused: %s", flight.frame.index, error.message)
        flight.refusal, flight.refusal_text = error.code, error.message
        if isinstance(error, VersionMismatchError):
            self.link.restart()  # its welcome will name the bundle it has now
        elif isinstance(flight.decision, Offload) and not error.retryable and self.controller.withdraw_offloads():
            log.warning("the server takes no images (%s); from here on frames are split or answered locally", error.message)
        self._on_lost([flight])

    def on_sent(self, frame_id: int, layer: int, n_bytes: int, now_ns: int) -> None:
        """See ``SessionEvents``."""
        if self.predictor is not None:
            self.predictor.delivered(frame_id, layer)
        flight = self._flights.get(frame_id)
        if flight is not None:
            flight.payload_bytes += n_bytes
        self.controller.on_sent(frame_id, n_bytes, now_ns)

    def on_unsent(self, frame_id: int) -> None:
        """See ``SessionEvents``."""
        if self.predictor is not None:
            self.predictor.lost(frame_id)
        flight = self._flights.pop(frame_id, None)
        if flight is not None and self.ledger.is_open(flight.frame.index):
            self._on_lost([flight])

    def on_grant(self, grant: Grant, now_ns: int) -> None:
        """See ``SessionEvents``."""
        self.controller.on_grant(
            now_ns, bitrate_bps=grant.bitrate_bps, max_in_flight=grant.max_in_flight, queue_ns=grant.queue_ns,
            tail_ns=grant.tail_ns,
        )  # fmt: skip
        self._notify()

    def on_pong(self, rtt_ns: int, now_ns: int) -> None:
        """See ``SessionEvents``."""
        self.controller.on_pong(rtt_ns, now_ns)

    def on_bundle_changed(self, sha256: str) -> None:
        """See ``SessionEvents``; frames of the old bundle go on until the new one is here or the server refuses them."""
        self._want_bundle(sha256)

    def on_draining(self, grace_ns: int) -> None:
        """See ``SessionEvents``."""
        log.warning("the server is going away within %.1f s", grace_ns / NS_PER_S)
        self._draining = True
        self.controller.on_disconnect(self._clock())
        self._notify()

    def ping_due(self, now_ns: int) -> bool:
        """See ``SessionEvents``."""
        return self.controller.ping_due(now_ns)
