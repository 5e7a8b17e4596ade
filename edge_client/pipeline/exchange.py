"""What is said to the server and what comes back: frames in flight, the session's events, and the server's new bundle."""

from __future__ import annotations

import logging
from dataclasses import replace

from edge_client.bundles.update import BundleUpdate
from edge_client.control import Offload
from edge_client.device.engine import Encoded
from edge_client.device.video import is_hopeless
from edge_client.frames import NS_PER_MS, NS_PER_S, Outcome
from edge_client.pipeline.flights import Flight
from edge_client.pipeline.pipeline import LATE_GRACE_NS, Pipeline
from edge_client.pipeline.strategy import Strategy
from edge_client.transport.base import Gate, Link, Welcome
from protos.errors import HeadtailError, ProtocolError, VersionMismatchError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import PROTOCOL_VERSION, FrameLayer, Grant, PayloadKind, Result
from splitters.bundle.offload import VIDEO

log = logging.getLogger(__name__)

_FORGET_NS = 6 * NS_PER_S  # longer than a session waits for a silent server: else frames would go on entering a dead network


class Exchange:
    """Frames out, answers in. Implements ``session.SessionEvents``.

    Attributes:
        link: the session, from the run's beginning.
        strategy: who is told what was lost.
        flights: frames that the server has, by the id they were last sent under.
        late_results: answers that came when nobody waited for them any more.
        limit: frames that may be unanswered, by the welcome and the user; 0: no limit.
        closing: the session is ended by us.
    """

    link: Link
    strategy: Strategy

    def __init__(self, pipeline: Pipeline) -> None:
        self.flights: dict[int, Flight] = {}
        self.late_results = 0
        self.limit = 0
        self.closing = False
        self._pipeline = pipeline
        self._config = pipeline.config
        self._clock = pipeline.clock
        self._update = BundleUpdate(pipeline.parts.fetch, lambda: self.link.up, pipeline.notify)
        self._server_sha256 = ""
        self._draining = False

    @property
    def connected(self) -> bool:
        """Whether the server takes frames of our bundle now."""
        return self.link.up and not self._draining and self._server_sha256 == self._pipeline.model.sha256

    @property
    def fetching(self) -> bool:
        """Whether the server's new bundle is on the way."""
        return self._update.running

    @property
    def note(self) -> str:
        """What is under way, in a few words; mostly empty."""
        return self._update.note

    async def wait_for_server(self, limit_s: float) -> bool:
        """Waits until the first welcome, or until ``limit_s`` have passed and an attempt has failed."""
        until_ns = self._clock() + int(limit_s * NS_PER_S)
        while not self.link.welcomed.is_set():
            left_s = (until_ns - self._clock()) / NS_PER_S
            if self._pipeline.stopping or (left_s <= 0 and self.link.failed.is_set()):
                return False
            await self._pipeline.wait_changed(max(0.05, min(left_s, 0.25)))
        return True

    def send(self, flight: Flight, encoded: Encoded, payloads: tuple[bytes, ...], *, gate: Gate | None = None) -> None:
        """Hands a frame's layers to the session; of a frame whose local input is kept, the picture is let go."""
        frame = flight.frame
        trace = self._pipeline.parts.traceparent(frame)
        layers = [
            FrameLayer(
                frame_id=0, layer=i, layer_count=len(payloads), kind=encoded.kind, operating_point=flight.point_id or 0,
                payload=payload,
                captured_unix_ns=frame.captured_unix_ns, source_width_px=frame.width_px, source_height_px=frame.height_px,
                traceparent="" if i else trace, slices=encoded.slices,
            )
            for i, payload in enumerate(payloads)
        ]  # fmt: skip
        if not self._config.keep_images and flight.local_image is not None:
            flight.frame = replace(frame, image=None)
        flight.tries += 1
        flight.payload_bytes = 0
        wire_id = self.link.send(layers, deadline_ns=flight.deadline_ns, gate=gate)
        self.flights[wire_id], flight.wire_id = flight, wire_id
        flight.video, flight.key = encoded.kind is PayloadKind.VIDEO, encoded.reference is None
        certain = gate is None and flight.deadline_ns is None and len(payloads) == len(encoded.payloads)
        self._pipeline.model.on_queued(wire_id, frame.index, encoded, certain=certain)
        self._pipeline.notify()

    def forget(self, now_ns: int) -> None:
        """Frames answered here long ago, whose result the server never sent, fill the window no longer."""
        for wire_id, flight in list(self.flights.items()):
            if not self._pipeline.is_open(flight) and now_ns - flight.encoded_ns > _FORGET_NS:
                del self.flights[wire_id]
                self._pipeline.model.controller.on_lost(wire_id, now_ns)

    def close(self) -> None:
        """The run is over; no bundle is fetched any more."""
        self.closing = True
        self._update.cancel()

    # ------------------------------------------------------------------ a new bundle

    def take_new_bundle(self) -> None:
        """Between two frames: goes over to the bundle that was fetched in the background."""
        engine = self._update.take()
        if engine is not None:
            self._pipeline.replace_model(engine)
            if self.link.up:
                self.link.restart()

    def set_fps(self, fps: float) -> None:
        """The source's fps is known only now, and with it the controller's interval: it is told of the link again."""
        self._pipeline.model.set_fps(fps)
        self._pipeline.model.controller.set_limit(self.limit)
        if self.connected:
            self._pipeline.model.controller.on_connect(self._clock())

    def _want_bundle(self, sha256: str) -> None:
        self._update.want(sha256 if sha256 != self._pipeline.model.sha256 else "")

    # ------------------------------------------------------------------ SessionEvents

    def hello(self) -> pb.Hello:
        """See ``SessionEvents``."""
        return pb.Hello(
            protocol_version=PROTOCOL_VERSION, model=self._config.model, bundle_sha256=self._pipeline.model.sha256,
            client_version=self._config.client_version, max_in_flight=self._config.max_in_flight,
            fps=self._pipeline.frames.fps, group=self._config.group,
        )  # fmt: skip

    def on_up(self, welcome: Welcome) -> None:
        """See ``SessionEvents``."""
        model = self._pipeline.model
        self._draining = False
        model.forget_references()
        if not welcome.takes_video:
            model.controller.withdraw_offloads(VIDEO)
        self._server_sha256 = welcome.bundle_sha256
        self.limit = min([n for n in (welcome.max_in_flight, self._config.max_in_flight) if n > 0], default=0)
        model.controller.set_limit(self.limit)
        if welcome.bundle_sha256 == model.sha256:
            model.controller.on_connect(self._clock())
            log.info("connected: model %s, session %s", welcome.model, welcome.session_id)
        self._want_bundle(welcome.bundle_sha256)
        self._pipeline.notify()

    def on_down(self, error: HeadtailError) -> None:
        """See ``SessionEvents``."""
        model = self._pipeline.model
        if self._server_sha256 == model.sha256 and not self.closing:  # else it ends because we wanted it to
            log.warning("the session is down: %s", error.message)
        self.strategy.on_down()
        model.controller.on_disconnect(self._clock())
        self._server_sha256 = ""
        lost, self.flights = list(self.flights.values()), {}
        self.strategy.on_lost([f for f in lost if self._pipeline.is_open(f)])
        self._pipeline.notify()

    def on_result(self, result: Result, now_ns: int) -> None:
        """See ``SessionEvents``."""
        self.strategy.on_result()
        flight = self.flights.pop(result.frame_id, None)
        if flight is not None and result.error is None:
            try:
                flight.engine.task.check(result.answer)
            except ProtocolError as failure:
                result = replace(result, answer=None, error=failure)
        self._pipeline.model.on_result(result, now_ns)
        self._pipeline.notify()
        if flight is None or not self._pipeline.is_open(flight):
            self.late_results += 1
        elif result.error is not None:
            self._on_refused(flight, result.error)
        else:
            self._on_answer(flight, result, now_ns)

    def _on_answer(self, flight: Flight, result: Result, now_ns: int) -> None:
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
            self._pipeline.settle(flight, Outcome.EXPIRED)
            return
        self._pipeline.model.on_answer(flight.frame.index, result.answer)
        self._pipeline.settle(flight, Outcome.RESULT, answer=result.answer)

    def _on_refused(self, flight: Flight, error: HeadtailError) -> None:
        """The server answered this frame with an error; the session goes on."""
        log.debug("frame %d was refused: %s", flight.frame.index, error.message)
        flight.refusal, flight.refusal_text = error.code, error.message
        if isinstance(error, VersionMismatchError):
            self.link.restart()  # its welcome will name the bundle it has now
        elif flight.video:
            if is_hopeless(error, key=flight.key) and self._pipeline.model.controller.withdraw_offloads(VIDEO):
                log.warning("the server takes no video (%s); from here on none is sent", error.message)
        elif isinstance(flight.decision, Offload) and not error.retryable and self._pipeline.model.controller.withdraw_offloads():
            log.warning("the server takes no images (%s); from here on frames are split or answered locally", error.message)
        self.strategy.on_lost([flight])

    def on_sent(self, frame_id: int, layer: int, n_bytes: int, now_ns: int) -> None:
        """See ``SessionEvents``."""
        flight = self.flights.get(frame_id)
        if flight is not None:
            flight.payload_bytes += n_bytes
        self._pipeline.model.on_sent(frame_id, layer, n_bytes, now_ns)

    def on_unsent(self, frame_id: int) -> None:
        """See ``SessionEvents``."""
        self._pipeline.model.on_unsent(frame_id)
        flight = self.flights.pop(frame_id, None)
        if flight is not None and self._pipeline.is_open(flight):
            self.strategy.on_lost([flight])

    def on_lost(self, frame_id: int, now_ns: int) -> None:
        """See ``SessionEvents``."""
        self._pipeline.model.on_lost(frame_id, now_ns)
        flight = self.flights.pop(frame_id, None)
        if flight is not None and self._pipeline.is_open(flight):
            self.strategy.on_lost([flight])
        self._pipeline.notify()

    def on_reliable(self, reliable: bool, lost: tuple[float, float] | None = None) -> None:
        """See ``SessionEvents``."""
        self._pipeline.model.set_reliable(reliable, lost)

    def frame_bytes(self) -> float:
        """See ``SessionEvents``."""
        return self._pipeline.model.controller.frame_bytes()

    def on_grant(self, grant: Grant, now_ns: int) -> None:
        """See ``SessionEvents``."""
        self._pipeline.model.controller.on_grant(
            now_ns, bitrate_bps=grant.bitrate_bps, max_in_flight=grant.max_in_flight, queue_ns=grant.queue_ns,
            tail_ns=grant.tail_ns,
        )  # fmt: skip
        self._pipeline.notify()

    def on_pong(self, rtt_ns: int, now_ns: int) -> None:
        """See ``SessionEvents``."""
        self._pipeline.model.controller.on_pong(rtt_ns, now_ns)

    def on_bundle_changed(self, sha256: str) -> None:
        """See ``SessionEvents``; frames of the old bundle go on until the new one is here or the server refuses them."""
        self._want_bundle(sha256)

    def on_draining(self, grace_ns: int) -> None:
        """See ``SessionEvents``."""
        log.warning("the server is going away within %.1f s", grace_ns / NS_PER_S)
        self._draining = True
        self._pipeline.model.controller.on_disconnect(self._clock())
        self._pipeline.notify()

    def ping_due(self, now_ns: int) -> bool:
        """See ``SessionEvents``."""
        return self._pipeline.model.controller.ping_due(now_ns)
