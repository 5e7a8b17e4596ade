"""From layers to frames: a frame runs when it is complete, when the next one begins, or when its time is up.

Pure: time comes in as an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_server.config import Limits
from protos.errors import HeadtailError, LimitError, PayloadError, ProtocolError
from protos.headtail.v1 import headtail_pb2 as pb
from protos.messages import MAX_LAYERS, FrameLayer, PayloadKind


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrivedFrame:
    """What arrived of one frame.

    Attributes:
        frame_id: of the session.
        kind: latent or image.
        layers: the prefix that arrived, base first; empty when ``error`` is set.
        size_px: (width, height) of the source frame.
        operating_point: as the device says.
        deadline_ns: on the server's monotonic clock; None: none.
        begun_ns, arrived_ns: when the first and the last layer were read, the server's monotonic clock.
        echo_sent_ns: the device's send time of the last layer.
        error: why the frame cannot be answered.
        traceparent: what the device says of the frame's trace; see the schema.
    """

    frame_id: int
    kind: PayloadKind = PayloadKind.LATENT
    layers: tuple[bytes, ...] = ()
    size_px: tuple[int, int] = (1, 1)
    operating_point: int = 0
    deadline_ns: int | None = None
    begun_ns: int = 0
    arrived_ns: int = 0
    echo_sent_ns: int = 0
    error: HeadtailError | None = None
    traceparent: str = ""

    @property
    def payload_bytes(self) -> int:
        """Of all its layers."""
        return sum(map(len, self.layers))


def deadline_of(layer: FrameLayer, now_ns: int, waited_ns: int = 0) -> int | None:
    """The layer's remaining time as a deadline on this machine's clock; it ran while the layer waited in queues on its way."""
    return now_ns - waited_ns + layer.deadline_remaining_ns if layer.deadline_remaining_ns else None


def frame_of(layers: list[FrameLayer], begun_ns: int, now_ns: int, deadline_ns: int | None) -> ArrivedFrame:
    """A frame of a gapless prefix of layers."""
    first, last = layers[0], layers[-1]
    return ArrivedFrame(
        frame_id=first.frame_id, kind=first.kind, layers=tuple(layer.payload for layer in layers),
        size_px=(first.source_width_px, first.source_height_px), operating_point=first.operating_point,
        deadline_ns=deadline_ns, begun_ns=begun_ns, arrived_ns=now_ns, echo_sent_ns=last.sent_ns,
        traceparent=first.traceparent,
    )  # fmt: skip


def read_frame(request: pb.InferRequest, limits: Limits, now_ns: int) -> ArrivedFrame:
    """The frame of a unary request.

    Raises:
        ProtocolError: its layers are no gapless prefix of one frame.
        LimitError: it is too large.
        PayloadError: a layer's checksum is wrong.
    """
    if not 1 <= len(request.layers) <= MAX_LAYERS:
        raise ProtocolError(f"a frame has 1..{MAX_LAYERS} layers, got {len(request.layers)}")
    layers = [FrameLayer.from_proto(layer, max_payload_bytes=limits.max_payload_bytes) for layer in request.layers]
    first = layers[0]
    for index, layer in enumerate(layers):
        same = (layer.frame_id, layer.layer_count, layer.kind) == (first.frame_id, first.layer_count, first.kind)
        if layer.layer != index or not same:
            raise ProtocolError("the layers of one frame must be gapless and of one kind, base first")
    if sum(len(layer.payload) for layer in layers) > limits.max_frame_bytes:
        raise LimitError(f"the frame has more than {limits.max_frame_bytes} bytes")
    return frame_of(layers, now_ns, now_ns, deadline_of(first, now_ns))


@dataclass(slots=True)
class _Partial:
    begun_ns: int
    deadline_ns: int | None
    layers: list[FrameLayer] = field(default_factory=list)
    last_ns: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(len(layer.payload) for layer in self.layers)

    def frame(self) -> ArrivedFrame:
        return frame_of(self.layers, self.begun_ns, self.last_ns, self.deadline_ns)


class Assembler:
    """One session's frames. Layers come in order; a frame's layers end when another frame's begin.

    Args:
        max_frame_bytes: of all layers of one frame.
        wait_ns: how long a frame without deadline waits for its missing layers.
    """

    def __init__(self, *, max_frame_bytes: int, wait_ns: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._wait_ns = wait_ns
        self._partial: _Partial | None = None
        self._last_id = -1

    def add(self, layer: FrameLayer, now_ns: int, waited_ns: int = 0) -> list[ArrivedFrame]:
        """Takes a checked layer; returns the frames that are ready because of it, oldest first.

        Args:
            layer: base first.
            now_ns: when it was read.
            waited_ns: how much longer it was on its way than the fastest lately.

        Raises:
            ProtocolError: a new frame's id does not exceed the last one's.
        """
        ready = []
        partial = self._partial
        if partial is not None and partial.layers[0].frame_id == layer.frame_id:
            return self._extend(partial, layer, now_ns, waited_ns)
        if layer.frame_id <= self._last_id:
            if layer.layer > 0:
                return []  # a layer that comes after its frame was run without it
            raise ProtocolError(
                f"frame id {layer.frame_id} is not above the last one, {self._last_id}; ids count up and are not reused"
            )
        ready += self.flush()
        self._last_id = layer.frame_id
        if layer.layer != 0:
            error = PayloadError(f"frame {layer.frame_id} began with layer {layer.layer}; its base layer is missing")
            return [
                *ready,
                ArrivedFrame(frame_id=layer.frame_id, arrived_ns=now_ns, begun_ns=now_ns, echo_sent_ns=layer.sent_ns, error=error),
            ]
        fresh = _Partial(begun_ns=now_ns, deadline_ns=deadline_of(layer, now_ns, waited_ns), layers=[layer], last_ns=now_ns)
        if layer.layer_count == 1:
            return [*ready, fresh.frame()]
        self._partial = fresh
        return ready

    def damaged(self, frame_id: int, layer: int, error: HeadtailError, now_ns: int) -> list[ArrivedFrame]:
        """A layer that failed its checks: without its base layer a frame is lost, without a later one it is coarser."""
        partial = self._partial
        if partial is not None and partial.layers[0].frame_id == frame_id:
            partial.last_ns = now_ns
            return self.flush()
        if frame_id <= self._last_id and layer > 0:
            return []
        if frame_id <= self._last_id:
            raise ProtocolError(f"frame id {frame_id} is not above the last one, {self._last_id}; ids count up and are not reused")
        ready = self.flush()
        self._last_id = frame_id
        return [*ready, ArrivedFrame(frame_id=frame_id, arrived_ns=now_ns, begun_ns=now_ns, error=error)]

    def flush(self) -> list[ArrivedFrame]:
        """The frame that still waits for layers, as far as it arrived."""
        partial, self._partial = self._partial, None
        return [] if partial is None else [partial.frame()]

    def due_ns(self, tail_ns: int) -> int | None:
        """When the waiting frame must run although layers are missing; None: none waits.

        Args:
            tail_ns: what decoding and the tail need before the deadline.
        """
        partial = self._partial
        if partial is None:
            return None
        latest_ns = partial.begun_ns + self._wait_ns
        return latest_ns if partial.deadline_ns is None else max(partial.begun_ns, min(latest_ns, partial.deadline_ns - tail_ns))

    def _extend(self, partial: _Partial, layer: FrameLayer, now_ns: int, waited_ns: int) -> list[ArrivedFrame]:
        first = partial.layers[0]
        partial.last_ns = now_ns
        if layer.layer != len(partial.layers) or (layer.layer_count, layer.kind) != (first.layer_count, first.kind):
            return self.flush()
        if partial.size_bytes + len(layer.payload) > self._max_frame_bytes:
            self._partial = None
            error = LimitError(f"frame {layer.frame_id} has more than {self._max_frame_bytes} bytes")
            return [
                ArrivedFrame(
                    frame_id=layer.frame_id, begun_ns=partial.begun_ns, arrived_ns=now_ns, echo_sent_ns=layer.sent_ns, error=error
                )
            ]
        partial.layers.append(layer)
        later_ns = deadline_of(layer, now_ns, waited_ns)
        if later_ns is not None:
            partial.deadline_ns = later_ns if partial.deadline_ns is None else min(partial.deadline_ns, later_ns)
        return self.flush() if len(partial.layers) == first.layer_count else []
