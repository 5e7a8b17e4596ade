from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PayloadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PAYLOAD_KIND_UNSPECIFIED: _ClassVar[PayloadKind]
    PAYLOAD_KIND_LATENT: _ClassVar[PayloadKind]
    PAYLOAD_KIND_IMAGE: _ClassVar[PayloadKind]
    PAYLOAD_KIND_VIDEO: _ClassVar[PayloadKind]
PAYLOAD_KIND_UNSPECIFIED: PayloadKind
PAYLOAD_KIND_LATENT: PayloadKind
PAYLOAD_KIND_IMAGE: PayloadKind
PAYLOAD_KIND_VIDEO: PayloadKind

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "protocol_version", "server_version")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    protocol_version: int
    server_version: str
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., protocol_version: _Optional[int] = ..., server_version: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "task", "bundle_sha256", "device_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    task: str
    bundle_sha256: str
    device_bytes: int
    def __init__(self, name: _Optional[str] = ..., task: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., device_bytes: _Optional[int] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("path",)
    PATH_FIELD_NUMBER: _ClassVar[int]
    path: str
    def __init__(self, path: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: int
    def __init__(self, sessions: _Optional[int] = ...) -> None: ...

class FetchBundleRequest(_message.Message):
    __slots__ = ("model", "bundle_sha256", "have")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    model: str
    bundle_sha256: str
    have: _containers.RepeatedCompositeFieldContainer[PartOffset]
    def __init__(self, model: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., have: _Optional[_Iterable[_Union[PartOffset, _Mapping]]] = ...) -> None: ...

class PartOffset(_message.Message):
    __slots__ = ("path", "offset")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class BundleChunk(_message.Message):
    __slots__ = ("manifest_json", "part")
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    manifest_json: bytes
    part: PartChunk
    def __init__(self, manifest_json: _Optional[bytes] = ..., part: _Optional[_Union[PartChunk, _Mapping]] = ...) -> None: ...

class PartChunk(_message.Message):
    __slots__ = ("path", "offset", "data")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    data: bytes
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class FrameLayer(_message.Message):
    __slots__ = ("frame_id", "layer", "layer_count", "kind", "operating_point", "deadline_remaining_ns", "captured_unix_ns", "source_width_px", "source_height_px", "payload_crc32", "payload", "sent_ns", "traceparent", "slices")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    OPERATING_POINT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_REMAINING_NS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    SOURCE_HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_CRC32_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    layer: int
    layer_count: int
    kind: PayloadKind
    operating_point: int
    deadline_remaining_ns: int
    captured_unix_ns: int
    source_width_px: int
    source_height_px: int
    payload_crc32: int
    payload: bytes
    sent_ns: int
    traceparent: str
    slices: int
    def __init__(self, frame_id: _Optional[int] = ..., layer: _Optional[int] = ..., layer_count: _Optional[int] = ..., kind: _Optional[_Union[PayloadKind, str]] = ..., operating_point: _Optional[int] = ..., deadline_remaining_ns: _Optional[int] = ..., captured_unix_ns: _Optional[int] = ..., source_width_px: _Optional[int] = ..., source_height_px: _Optional[int] = ..., payload_crc32: _Optional[int] = ..., payload: _Optional[bytes] = ..., sent_ns: _Optional[int] = ..., traceparent: _Optional[str] = ..., slices: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("frame_id", "classification", "detection", "error", "tensors", "timings", "layers_decoded", "symbols_crc32", "echo_sent_ns", "slices_held")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    DETECTION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_DECODED_FIELD_NUMBER: _ClassVar[int]
    SYMBOLS_CRC32_FIELD_NUMBER: _ClassVar[int]
    ECHO_SENT_NS_FIELD_NUMBER: _ClassVar[int]
    SLICES_HELD_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    classification: Classification
    detection: Detection
    error: FrameError
    tensors: Tensors
    timings: ServerTimings
    layers_decoded: int
    symbols_crc32: int
    echo_sent_ns: int
    slices_held: int
    def __init__(self, frame_id: _Optional[int] = ..., classification: _Optional[_Union[Classification, _Mapping]] = ..., detection: _Optional[_Union[Detection, _Mapping]] = ..., error: _Optional[_Union[FrameError, _Mapping]] = ..., tensors: _Optional[_Union[Tensors, _Mapping]] = ..., timings: _Optional[_Union[ServerTimings, _Mapping]] = ..., layers_decoded: _Optional[int] = ..., symbols_crc32: _Optional[int] = ..., echo_sent_ns: _Optional[int] = ..., slices_held: _Optional[int] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("top",)
    TOP_FIELD_NUMBER: _ClassVar[int]
    top: _containers.RepeatedCompositeFieldContainer[ClassScore]
    def __init__(self, top: _Optional[_Iterable[_Union[ClassScore, _Mapping]]] = ...) -> None: ...

class ClassScore(_message.Message):
    __slots__ = ("class_id", "score")
    CLASS_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    class_id: int
    score: float
    def __init__(self, class_id: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class Detection(_message.Message):
    __slots__ = ("boxes",)
    BOXES_FIELD_NUMBER: _ClassVar[int]
    boxes: _containers.RepeatedCompositeFieldContainer[Box]
    def __init__(self, boxes: _Optional[_Iterable[_Union[Box, _Mapping]]] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("class_id", "score", "x1_px", "y1_px", "x2_px", "y2_px")
    CLASS_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    X1_PX_FIELD_NUMBER: _ClassVar[int]
    Y1_PX_FIELD_NUMBER: _ClassVar[int]
    X2_PX_FIELD_NUMBER: _ClassVar[int]
    Y2_PX_FIELD_NUMBER: _ClassVar[int]
    class_id: int
    score: float
    x1_px: float
    y1_px: float
    x2_px: float
    y2_px: float
    def __init__(self, class_id: _Optional[int] = ..., score: _Optional[float] = ..., x1_px: _Optional[float] = ..., y1_px: _Optional[float] = ..., x2_px: _Optional[float] = ..., y2_px: _Optional[float] = ...) -> None: ...

class Tensors(_message.Message):
    __slots__ = ("task", "tensors")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    task: str
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, task: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ServerTimings(_message.Message):
    __slots__ = ("decode_ns", "queue_ns", "tail_ns", "total_ns", "batch_size")
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    TAIL_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    decode_ns: int
    queue_ns: int
    tail_ns: int
    total_ns: int
    batch_size: int
    def __init__(self, decode_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., tail_ns: _Optional[int] = ..., total_ns: _Optional[int] = ..., batch_size: _Optional[int] = ...) -> None: ...

class FrameError(_message.Message):
    __slots__ = ("code", "message", "retryable")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retryable: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: bool = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("protocol_version", "model", "bundle_sha256", "layers")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model: str
    bundle_sha256: str
    layers: _containers.RepeatedCompositeFieldContainer[FrameLayer]
    def __init__(self, protocol_version: _Optional[int] = ..., model: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[FrameLayer, _Mapping]]] = ...) -> None: ...

class InferResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: Result
    def __init__(self, result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("hello", "layer", "goodbye", "ping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    layer: FrameLayer
    goodbye: Goodbye
    ping: Ping
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., layer: _Optional[_Union[FrameLayer, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "model", "bundle_sha256", "client_version", "max_in_flight", "fps", "group", "datagrams")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DATAGRAMS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model: str
    bundle_sha256: str
    client_version: str
    max_in_flight: int
    fps: float
    group: str
    datagrams: bool
    def __init__(self, protocol_version: _Optional[int] = ..., model: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., client_version: _Optional[str] = ..., max_in_flight: _Optional[int] = ..., fps: _Optional[float] = ..., group: _Optional[str] = ..., datagrams: bool = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ping(_message.Message):
    __slots__ = ("sent_ns",)
    SENT_NS_FIELD_NUMBER: _ClassVar[int]
    sent_ns: int
    def __init__(self, sent_ns: _Optional[int] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "result", "grant", "bundle_changed", "draining", "pong")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    result: Result
    grant: Grant
    bundle_changed: BundleChanged
    draining: Draining
    pong: Pong
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., grant: _Optional[_Union[Grant, _Mapping]] = ..., bundle_changed: _Optional[_Union[BundleChanged, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "session_id", "model", "bundle_sha256", "max_in_flight", "max_payload_bytes", "server_version", "datagrams", "payload_kinds")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    DATAGRAMS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_KINDS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    session_id: str
    model: str
    bundle_sha256: str
    max_in_flight: int
    max_payload_bytes: int
    server_version: str
    datagrams: DatagramOffer
    payload_kinds: _containers.RepeatedScalarFieldContainer[PayloadKind]
    def __init__(self, protocol_version: _Optional[int] = ..., session_id: _Optional[str] = ..., model: _Optional[str] = ..., bundle_sha256: _Optional[str] = ..., max_in_flight: _Optional[int] = ..., max_payload_bytes: _Optional[int] = ..., server_version: _Optional[str] = ..., datagrams: _Optional[_Union[DatagramOffer, _Mapping]] = ..., payload_kinds: _Optional[_Iterable[_Union[PayloadKind, str]]] = ...) -> None: ...

class DatagramOffer(_message.Message):
    __slots__ = ("ticket", "certificate_der", "port")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_DER_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    certificate_der: bytes
    port: int
    def __init__(self, ticket: _Optional[bytes] = ..., certificate_der: _Optional[bytes] = ..., port: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("frame", "result")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    frame: FramePiece
    result: ResultPiece
    def __init__(self, frame: _Optional[_Union[FramePiece, _Mapping]] = ..., result: _Optional[_Union[ResultPiece, _Mapping]] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("count", "index", "whole_bytes")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WHOLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    count: int
    index: int
    whole_bytes: int
    def __init__(self, count: _Optional[int] = ..., index: _Optional[int] = ..., whole_bytes: _Optional[int] = ...) -> None: ...

class FramePiece(_message.Message):
    __slots__ = ("layer", "part")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    layer: FrameLayer
    part: Part
    def __init__(self, layer: _Optional[_Union[FrameLayer, _Mapping]] = ..., part: _Optional[_Union[Part, _Mapping]] = ...) -> None: ...

class ResultPiece(_message.Message):
    __slots__ = ("frame_id", "body", "part")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    body: bytes
    part: Part
    def __init__(self, frame_id: _Optional[int] = ..., body: _Optional[bytes] = ..., part: _Optional[_Union[Part, _Mapping]] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("bitrate_bps", "max_in_flight", "queue_ns", "tail_ns", "delivery_bps", "delay_trend")
    BITRATE_BPS_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    TAIL_NS_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_BPS_FIELD_NUMBER: _ClassVar[int]
    DELAY_TREND_FIELD_NUMBER: _ClassVar[int]
    bitrate_bps: int
    max_in_flight: int
    queue_ns: int
    tail_ns: int
    delivery_bps: float
    delay_trend: float
    def __init__(self, bitrate_bps: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., queue_ns: _Optional[int] = ..., tail_ns: _Optional[int] = ..., delivery_bps: _Optional[float] = ..., delay_trend: _Optional[float] = ...) -> None: ...

class BundleChanged(_message.Message):
    __slots__ = ("bundle_sha256",)
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    bundle_sha256: str
    def __init__(self, bundle_sha256: _Optional[str] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("grace_ns",)
    GRACE_NS_FIELD_NUMBER: _ClassVar[int]
    grace_ns: int
    def __init__(self, grace_ns: _Optional[int] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("echo_sent_ns",)
    ECHO_SENT_NS_FIELD_NUMBER: _ClassVar[int]
    echo_sent_ns: int
    def __init__(self, echo_sent_ns: _Optional[int] = ...) -> None: ...
