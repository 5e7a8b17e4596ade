"""The model in use, and everything that is only true of it: swapped as one object when the server's bundle changes."""

from __future__ import annotations

import logging

from edge_client.control import Decision
from edge_client.device.engine import NO_REFERENCE, Encoded, Engine, Reference, learn_reference
from edge_client.device.references import ReferenceAges
from edge_client.device.timings import DevicePace
from edge_client.device.video import VideoChain
from edge_client.frames import NS_PER_MS
from edge_client.gates.interest import InterestGate
from edge_client.pipeline.parts import Parts
from protos.errors import HeadtailError, OverloadedError
from protos.messages import Answer, PayloadKind, Result
from splitters.codec import Predictor

log = logging.getLogger(__name__)

_HISTORY = 16  # frames back that a latent may be predicted from; every server remembers this many


class ActiveModel:
    """One bundle's engine; its controller, predictor and prefilter gate; and how fast the device runs it now.

    Args:
        engine: the opened bundle.
        parts: what makes the rest.
        temporal: whether latents are predicted from earlier frames, where the codec can.
        fps: of the source; 0: not known yet.
        lenient: a prefilter that does not fit the bundle is left out, with a warning: better every frame than none.

    Raises:
        HeadtailError: the prefilter does not know the classes asked for.
    """

    def __init__(self, engine: Engine, parts: Parts, *, temporal: bool, fps: float = 0.0, lenient: bool = False) -> None:
        self.engine = engine
        self.reliable = True  # whether what is sent arrives, in order, or the session ends
        self.controller = parts.controller(engine, fps)
        self.interest = self._open_interest(parts, lenient=lenient)
        self._make_controller, self._paced = parts.controller, parts.paced
        self._predictor = _open_predictor(engine) if temporal else None
        self._ages = ReferenceAges()
        self.video = VideoChain()
        self._choices = parts.times(engine).choices()
        self._pace = DevicePace({decision.name: ms.p50 * NS_PER_MS for decision, ms in self._choices.items()})

    def _open_interest(self, parts: Parts, *, lenient: bool) -> InterestGate | None:
        try:
            return parts.interest(self.engine)
        except HeadtailError as error:
            if not lenient:
                raise
            log.warning("the prefilter is off: %s", error.message)
            return None

    @property
    def sha256(self) -> str:
        """The bundle's hash."""
        return self.engine.sha256

    def set_fps(self, fps: float) -> None:
        """The source is open and says how fast it is: the controller begins with that."""
        self.controller = self._make_controller(self.engine, fps)

    # ------------------------------------------------------------------ what is learnt

    def reference(self) -> Reference:
        """What the next frame's latent is predicted from."""
        return self._predictor.choose() if self._predictor is not None else NO_REFERENCE

    def on_frame(self, index: int) -> None:
        """Frame ``index`` is to be decided: what it costs depends on how old its reference is."""
        self.controller.on_reference(self._ages.age(self.reference()[1], index))
        self.controller.on_video(self.video.standing_px)

    def on_encoded(self, decision: Decision, encoded: Encoded, now_ns: int) -> None:
        """A frame's payload is there, sent or not."""
        self.controller.on_payload(decision, encoded.payload_bytes, now_ns)

    def forget_references(self) -> None:
        """A new session: the server holds nothing yet."""
        self.video.reset()
        if self._predictor is not None:
            self._predictor.reset()

    def on_queued(self, wire_id: int, index: int, encoded: Encoded, *, certain: bool) -> None:
        """Frame ``index`` was handed to the session under ``wire_id``.

        Args:
            wire_id: of its answer.
            index: as captured.
            encoded: its payloads.
            certain: the session never holds it back, however long it waits there: the next frame may refer to it at once.
        """
        if encoded.kind is PayloadKind.VIDEO:
            self.video.queued(wire_id, encoded.reference)
        if self._predictor is not None and encoded.symbols is not None:
            self._ages.sent(wire_id, index)
            self._predictor.sent(wire_id, encoded.symbols, reference=encoded.reference)
            if certain:
                self._predictor.delivered(wire_id, encoded.symbols.layer_count - 1)

    def on_sent(self, wire_id: int, layer: int, n_bytes: int, now_ns: int) -> None:
        """The session handed one of its layers to the transport."""
        if self._predictor is not None:
            self._predictor.delivered(wire_id, layer)
        self.controller.on_sent(wire_id, n_bytes, now_ns)

    def on_unsent(self, wire_id: int) -> None:
        """The session held the frame back."""
        self.video.lost(wire_id)
        if self._predictor is not None:
            self._predictor.lost(wire_id)

    def on_lost(self, wire_id: int, now_ns: int) -> None:
        """The frame was sent and never answered. The server may hold it all the same; it is not relied upon."""
        self.controller.on_lost(wire_id, now_ns)

    def set_reliable(self, reliable: bool, lost: tuple[float, float] | None = None) -> None:
        """Whether what is sent from now on arrives, in order, or the session ends; else how the path loses packets."""
        self.controller.on_transport(reliable=reliable, lost=lost)
        self.reliable = reliable
        if self._predictor is not None:
            self._predictor.reliable = reliable

    def on_result(self, result: Result, now_ns: int) -> None:
        """A result of the server, wanted or not."""
        self.video.answered(result)
        if self._predictor is not None:
            learn_reference(self._predictor, result)
        if isinstance(result.error, OverloadedError):
            self.controller.on_refused(result.frame_id, now_ns)
        elif result.error is not None:
            self.controller.on_lost(result.frame_id, now_ns)
        else:
            self.controller.on_ack(result.frame_id, now_ns, result.timings.total_ns)

    def on_answer(self, index: int, answer: Answer | None) -> None:
        """The server's answer to frame ``index``: what the prefilter would have missed."""
        if self.interest is not None and self.interest.learn(index, answer):
            log.warning(
                "the prefilter misses more than it promised here: its threshold is now %.3f (promised at %.3f)",
                self.interest.threshold,
                self.interest.promise.threshold,
            )

    def on_device(self, decision: Decision, elapsed_ns: int, now_ns: int) -> None:
        """How long the device took for a choice, and what that means for the choices not made."""
        self.controller.on_device(decision, elapsed_ns, now_ns)
        factors = self._pace.add(decision.name, elapsed_ns)
        if self._pace.lasting is not None:
            self._paced(self.engine, self._pace.lasting)
        if factors:
            for other, ms in self._choices.items():
                if (factor := factors.get(other.name)) is not None:
                    self.controller.set_device_ms(other, ms.scaled(factor))


def _open_predictor(engine: Engine) -> Predictor | None:
    if not engine.codec.supports_reference:
        return None
    return Predictor(engine.codec, max_frames=_HISTORY, reliable=True)  # a stream: what is sent arrives, or the session ends
