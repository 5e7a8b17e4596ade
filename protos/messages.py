"""The wire's messages as frozen dataclasses, and their translation to and from protobuf.

``from_proto`` functions check what the schema cannot say and raise ``ProtocolError``; ``to_proto`` never fails on a
checked message. All times are nanoseconds, all sizes bytes, all boxes source-frame pixels.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protos.errors import HeadtailError, LimitError, PayloadError, ProtocolError, from_peer
from protos.headtail.v1 import headtail_pb2 as pb

PROTOCOL_VERSION: Final = 1
MAX_LAYERS: Final = 16
SLICES: Final = 4
MAX_PAYLOAD_BYTES: Final = 8 << 20
MAX_SIDE_PX: Final = 32768
CHUNK_BYTES: Final = 256 << 10
MAX_TRACEPARENT_CHARS: Final = 55
MAX_TOP: Final = 1000
MAX_BOXES: Final = 5000
MAX_CLASS_ID: Final = 10**5
MAX_TENSORS: Final = 64
MAX_ANSWER_BYTES: Final = 6 << 20
_MAX_AXES: Final = 8
_MAX_TENSOR_NAME_CHARS: Final = 200
MAX_DURATION_NS: Final = 3600 * 10**9
MAX_BITRATE_BPS: Final = 10**13
MAX_BATCH: Final = 1 << 16
_ROUNDING: Final = 1e-3  # of a probability computed in half precision
_MAX_TREND: Final = 1e9
_DTYPES: Final = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()  # noqa: SIM905 - reads better
)
_HASH = re.compile(r"[0-9a-f]{64}")


def bundle_hash(text: str) -> str:
    """Returns what a peer names a bundle by, where it is a hash; it becomes a directory's name, so nothing else will do.

    Raises:
        ProtocolError: it is not 64 lower-case hex digits.
    """
    if not _HASH.fullmatch(text):
        raise ProtocolError(f"the server names a bundle by {text[:100]!r}, which is not a sha256 of 64 lower-case hex digits")
    return text


class PayloadKind(Enum):
    """What a payload is."""

    LATENT = pb.PAYLOAD_KIND_LATENT
    IMAGE = pb.PAYLOAD_KIND_IMAGE
    VIDEO = pb.PAYLOAD_KIND_VIDEO


_KINDS = frozenset(kind.value for kind in PayloadKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameLayer:
    """One layer of one frame; see the schema for the units."""

    frame_id: int
    layer: int = 0
    layer_count: int = 1
    kind: PayloadKind = PayloadKind.LATENT
    operating_point: int = 0
    deadline_remaining_ns: int = 0
    captured_unix_ns: int = 0
    source_width_px: int
    source_height_px: int
    payload: bytes
    sent_ns: int = 0
    traceparent: str = ""
    slices: int = 0

    def to_proto(self) -> pb.FrameLayer:
        """As protobuf, with the payload's CRC-32."""
        return pb.FrameLayer(
            frame_id=self.frame_id, layer=self.layer, layer_count=self.layer_count, kind=self.kind.value,
            operating_point=self.operating_point, deadline_remaining_ns=self.deadline_remaining_ns,
            captured_unix_ns=self.captured_unix_ns, source_width_px=self.source_width_px,
            source_height_px=self.source_height_px, payload_crc32=zlib.crc32(self.payload), payload=self.payload,
            sent_ns=self.sent_ns, traceparent=self.traceparent, slices=self.slices,
        )  # fmt: skip

    @classmethod
    def from_proto(cls, message: pb.FrameLayer, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> FrameLayer:
        """Reads and checks a layer.

        Raises:
            LimitError: the payload is larger than allowed.
            PayloadError: its CRC-32 is wrong.
            ProtocolError: a field is out of range.
        """
        if len(message.payload) > max_payload_bytes:
            raise LimitError(f"the payload has {len(message.payload)} bytes; this server allows {max_payload_bytes}")
        if not 1 <= message.layer_count <= MAX_LAYERS or message.layer >= message.layer_count:
            raise ProtocolError(f"layer {message.layer} of {message.layer_count} is not possible (at most {MAX_LAYERS} layers)")
        if message.kind not in _KINDS:
            raise ProtocolError(f"payload kind {message.kind} is unknown")
        if not (1 <= message.source_width_px <= MAX_SIDE_PX and 1 <= message.source_height_px <= MAX_SIDE_PX):
            raise ProtocolError(f"source frame {message.source_width_px}x{message.source_height_px} px is out of range")
        latent = message.kind == pb.PAYLOAD_KIND_LATENT and message.layer_count == 1
        if message.slices and not (latent and message.slices == SLICES):
            raise ProtocolError(f"{message.slices} slices are not possible: only a latent in one layer has them, and then {SLICES}")
        if message.operating_point > 0xFFFF:
            raise ProtocolError(f"operating point {message.operating_point} is out of range")
        if zlib.crc32(message.payload) != message.payload_crc32:
            raise PayloadError(f"frame {message.frame_id}, layer {message.layer}: the payload's checksum is wrong")
        return cls(
            frame_id=message.frame_id, layer=message.layer, layer_count=message.layer_count,
            kind=PayloadKind(message.kind), operating_point=message.operating_point,
            deadline_remaining_ns=message.deadline_remaining_ns, captured_unix_ns=message.captured_unix_ns,
            source_width_px=message.source_width_px, source_height_px=message.source_height_px,
            payload=message.payload, sent_ns=message.sent_ns,
            traceparent=message.traceparent if len(message.traceparent) <= MAX_TRACEPARENT_CHARS else "",
            slices=message.slices,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """A class and its probability 0..1."""

    class_id: int
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A detected object: xyxy in source-frame pixels, score 0..1."""

    class_id: int
    score: float
    box_px: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Classification:
    """Highest score first, at most five."""

    top: tuple[ClassScore, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """Highest score first."""

    boxes: tuple[Box, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """The answer of any other task: named arrays, whose meaning is the task's.

    Attributes:
        task: its registered name.
        arrays: of numbers or booleans, without a batch axis.
    """

    task: str
    arrays: Mapping[str, NDArray[Any]]

    def __post_init__(self) -> None:
        if not self.task or len(self.arrays) > MAX_TENSORS:
            raise LimitError(f"an answer has a task's name and at most {MAX_TENSORS} tensors, got {len(self.arrays)}")
        for name, array in self.arrays.items():
            if array.dtype.name not in _DTYPES or array.ndim > _MAX_AXES or len(name) > _MAX_TENSOR_NAME_CHARS:
                raise LimitError(f"the tensor {name[:100]!r} of an answer must hold numbers in at most {_MAX_AXES} axes")
        if self.n_bytes > MAX_ANSWER_BYTES:
            raise LimitError(f"an answer of {self.n_bytes} bytes is too large; {MAX_ANSWER_BYTES} are allowed")

    @property
    def n_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tensors):
            return NotImplemented
        same = self.task == other.task and list(self.arrays) == list(other.arrays)
        pairs = zip(self.arrays.values(), other.arrays.values(), strict=False)
        return same and all(a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]  # arrays have none


Answer = Classification | Detection | Tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerTimings:
    """Durations on the server's monotonic clock, ns; see the schema."""

    decode_ns: int = 0
    queue_ns: int = 0
    tail_ns: int = 0
    total_ns: int = 0
    batch_size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The answer to one frame: ``answer`` or ``error``, never both."""

    frame_id: int
    answer: Answer | None = None
    error: HeadtailError | None = None
    timings: ServerTimings = field(default_factory=ServerTimings)
    layers_decoded: int = 0
    symbols_crc32: int = 0
    echo_sent_ns: int = 0
    slices_held: int = 0

    def to_proto(self) -> pb.Result:
        """As protobuf."""
        t = self.timings
        message = pb.Result(
            frame_id=self.frame_id, layers_decoded=self.layers_decoded, symbols_crc32=self.symbols_crc32,
            echo_sent_ns=self.echo_sent_ns, slices_held=self.slices_held,
            timings=pb.ServerTimings(
                decode_ns=t.decode_ns, queue_ns=t.queue_ns, tail_ns=t.tail_ns, total_ns=t.total_ns, batch_size=t.batch_size
            ),
        )  # fmt: skip
        if self.error is not None:
            message.error.CopyFrom(pb.FrameError(code=self.error.code, message=self.error.message, retryable=self.error.retryable))
        elif isinstance(self.answer, Classification):
            top = [pb.ClassScore(class_id=s.class_id, score=s.score) for s in self.answer.top]
            message.classification.CopyFrom(pb.Classification(top=top))
        elif isinstance(self.answer, Detection):
            message.detection.CopyFrom(pb.Detection(boxes=[_box_to_proto(b) for b in self.answer.boxes]))
        elif isinstance(self.answer, Tensors):
            message.tensors.CopyFrom(_tensors_to_proto(self.answer))
        else:
            raise ProtocolError("a result needs an answer or an error")
        return message

    @classmethod
    def from_proto(cls, message: pb.Result) -> Result:
        """Reads and checks a result; one with impossible numbers is a ``ProtocolError`` of its frame, in ``error``."""
        t = message.timings
        answer: Answer | None = None
        error: HeadtailError | None = None
        try:
            answer, error = _outcome_from_proto(message)
            _check_durations(t.decode_ns, t.queue_ns, t.tail_ns, t.total_ns)
            if message.slices_held >= 1 << SLICES or message.layers_decoded > MAX_LAYERS or t.batch_size > MAX_BATCH:
                raise ProtocolError(f"a result speaks of {message.layers_decoded} layers in a batch of {t.batch_size}")
        except (ProtocolError, LimitError) as failure:
            return cls(frame_id=message.frame_id, error=failure)
        return cls(
            frame_id=message.frame_id, answer=answer, error=error, layers_decoded=message.layers_decoded,
            symbols_crc32=message.symbols_crc32, echo_sent_ns=message.echo_sent_ns, slices_held=message.slices_held,
            timings=ServerTimings(
                decode_ns=t.decode_ns, queue_ns=t.queue_ns, tail_ns=t.tail_ns, total_ns=t.total_ns, batch_size=t.batch_size
            ),
        )  # fmt: skip


def _box_to_proto(box: Box) -> pb.Box:
    x1, y1, x2, y2 = box.box_px
    return pb.Box(class_id=box.class_id, score=box.score, x1_px=x1, y1_px=y1, x2_px=x2, y2_px=y2)


def _outcome_from_proto(message: pb.Result) -> tuple[Answer | None, HeadtailError | None]:
    which = message.WhichOneof("outcome")
    if which == "error":
        e = message.error
        return None, from_peer(e.code, e.message, retryable=e.retryable)
    if which == "classification":
        top = message.classification.top
        _check_count(len(top), MAX_TOP, "classes")
        return Classification(top=tuple(ClassScore(class_id=_class_id(s.class_id), score=_score(s.score)) for s in top)), None
    if which == "detection":
        boxes = message.detection.boxes
        _check_count(len(boxes), MAX_BOXES, "boxes")
        return Detection(boxes=tuple(_box_from_proto(b) for b in boxes)), None
    if which == "tensors":
        return _tensors_from_proto(message.tensors), None
    raise ProtocolError(f"result of frame {message.frame_id} holds neither an answer nor an error")


def _tensors_to_proto(answer: Tensors) -> pb.Tensors:
    little = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in answer.arrays.items()}
    return pb.Tensors(
        task=answer.task,
        tensors=[pb.Tensor(name=n, dtype=a.dtype.name, shape=a.shape, data=a.tobytes()) for n, a in little.items()],
    )


def _tensors_from_proto(message: pb.Tensors) -> Tensors:
    _check_count(len(message.tensors), MAX_TENSORS, "tensors")
    arrays = {tensor.name: _array(tensor) for tensor in message.tensors}
    if len(arrays) != len(message.tensors):
        raise ProtocolError("an answer holds two tensors of one name")
    return Tensors(task=message.task, arrays=arrays)


def _array(tensor: pb.Tensor) -> NDArray[Any]:
    if tensor.dtype not in _DTYPES or len(tensor.shape) > _MAX_AXES:
        raise ProtocolError(f"an answer holds a tensor of {tensor.dtype[:30]!r} with {len(tensor.shape)} axes")
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    if len(tensor.data) > MAX_ANSWER_BYTES or prod(tensor.shape) * dtype.itemsize != len(tensor.data):
        raise ProtocolError(f"an answer's tensor {tensor.name[:100]!r} has {len(tensor.data)} bytes, which its shape does not")
    values = np.frombuffer(tensor.data, np.uint8) != 0 if dtype.kind == "b" else np.frombuffer(tensor.data, dtype)
    try:
        return values.reshape(tensor.shape)
    except ValueError as error:  # no values, and sides whose product no machine can hold
        raise ProtocolError(f"an answer's tensor {tensor.name[:100]!r} has an impossible shape") from error


def _box_from_proto(box: pb.Box) -> Box:
    x1, y1, x2, y2 = (_within(v, -MAX_SIDE_PX, 2 * MAX_SIDE_PX) for v in (box.x1_px, box.y1_px, box.x2_px, box.y2_px))
    if x2 < x1 or y2 < y1:
        raise ProtocolError(f"an answer holds a box whose corners are reversed: {x1:g}, {y1:g}, {x2:g}, {y2:g}")
    return Box(class_id=_class_id(box.class_id), score=_score(box.score), box_px=(x1, y1, x2, y2))


def _class_id(value: int) -> int:
    if value > MAX_CLASS_ID:
        raise ProtocolError(f"an answer names the class {value}; at most {MAX_CLASS_ID} is possible")
    return value


def _score(value: float) -> float:
    return min(1.0, max(0.0, _within(value, -_ROUNDING, 1 + _ROUNDING)))


def _check_count(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise ProtocolError(f"an answer holds {count} {what}; at most {limit} are possible")


def _check_durations(*durations_ns: int) -> None:
    for value in durations_ns:
        if not 0 <= value <= MAX_DURATION_NS:
            raise ProtocolError(f"the server speaks of a duration of {value} ns, which is impossible")


def _within(value: float, low: float, high: float) -> float:
    if not low <= value <= high:  # false for NaN, too
        raise ProtocolError(f"the server sent the number {value:g}; it must lie in {low:g}..{high:g}")
    return value


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """What the server allows a session; zeros mean unknown or unchanged."""

    bitrate_bps: int = 0
    max_in_flight: int = 0
    queue_ns: int = 0
    tail_ns: int = 0
    delivery_bps: float = 0.0
    delay_trend: float = 0.0

    def to_proto(self) -> pb.Grant:
        """As protobuf."""
        return pb.Grant(
            bitrate_bps=self.bitrate_bps, max_in_flight=self.max_in_flight, queue_ns=self.queue_ns, tail_ns=self.tail_ns,
            delivery_bps=self.delivery_bps, delay_trend=self.delay_trend,
        )  # fmt: skip

    @classmethod
    def from_proto(cls, message: pb.Grant) -> Grant:
        """Reads and checks a grant.

        Raises:
            ProtocolError: a number is impossible.
        """
        _check_durations(message.queue_ns, message.tail_ns)
        return cls(
            bitrate_bps=int(_within(message.bitrate_bps, 0, MAX_BITRATE_BPS)), max_in_flight=message.max_in_flight,
            queue_ns=message.queue_ns, tail_ns=message.tail_ns, delivery_bps=_within(message.delivery_bps, 0, MAX_BITRATE_BPS),
            delay_trend=_within(message.delay_trend, -_MAX_TREND, _MAX_TREND),
        )  # fmt: skip
