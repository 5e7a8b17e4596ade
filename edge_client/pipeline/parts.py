"""What a pipeline is made of: its settings, and the contracts of what it works with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from edge_client.capture.base import Frames
from edge_client.control import Policy
from edge_client.device.choices import DeviceTimes
from edge_client.device.engine import Encoded, Engine
from edge_client.device.worker import DeviceWorker
from edge_client.frames import Clock, FrameReport
from edge_client.gates.floor import ScoreFloor
from edge_client.gates.interest import InterestGate
from edge_client.observe.tracing import Traceparent, untraced
from splitters.tasks.preprocess import Frame


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """What a pipeline is asked to do.

    Attributes:
        model: the name asked for at the server; empty: its default.
        deadline_ms: from capture to answer; 0: none.
        max_in_flight: frames unanswered at a time; 0: what controller and server allow.
        wait_for_server_s: how long frames wait for a server before the local model answers them (files), or the start
            does (cameras).
        point_id: always this operating point; None: the controller chooses (cameras), or the most accurate (files).
        keep_images: reports carry the frame, for sinks that draw on it.
        client_version: for the server's log.
        group: cameras that share a bottleneck link.
        floor: from which score on a box counts.
        change_gate: reuse the last answer where nothing moved.
        temporal: predict latents from frames the server has acknowledged; for sources that are video.
    """

    model: str = ""
    deadline_ms: float = 0.0
    max_in_flight: int = 0
    wait_for_server_s: float = 0.0
    point_id: int | None = None
    keep_images: bool = False
    client_version: str = ""
    group: str = ""
    floor: ScoreFloor = field(default_factory=ScoreFloor)
    change_gate: bool = False
    temporal: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a pipeline works with.

    Attributes:
        emit: is given every frame's report, in the order the frames were settled.
        fetch: fetches the bundle of a hash and makes an engine of it, in the background.
        traceparent: what travels with a frame for its trace; called when it is sent.
        sample: is shown some frames beside the model's input, for the comparison with JPEG.
        controller: makes the controller of an engine, its link unknown as yet.
        times: of the device, as measured for an engine.
        paced: told by which factor frames take longer on this device than an engine's times say, once that lasts.
        interest: makes the prefilter's gate of an engine; None: every frame goes on.
    """

    frames: Frames
    worker: DeviceWorker
    clock: Clock
    emit: Callable[[FrameReport], None]
    fetch: Callable[[str], Awaitable[Engine]]
    controller: Callable[[Engine, float], Policy]
    times: Callable[[Engine], DeviceTimes] = lambda _engine: DeviceTimes()
    paced: Callable[[Engine, float], None] = lambda _engine, _factor: None
    interest: Callable[[Engine], InterestGate | None] = lambda _engine: None
    traceparent: Traceparent = untraced
    sample: Callable[[Frame, Frame], None] = lambda _frame, _image: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """What the worker made of a frame."""

    encoded: Encoded
    input_image: Frame
    local_image: Frame | None
