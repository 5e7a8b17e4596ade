"""A simulated frame on its way from its device to the server and back."""

from __future__ import annotations

from typing import Protocol

from deploy.testbed.link.path import Path
from protos.messages import Grant


class Device(Protocol):
    """What the server needs of the device that a frame is of."""

    down: Path
    result_bytes: int

    def result(self, frame: Frame) -> None:
        """The server's answer to a frame arrived."""
        ...

    def granted(self, grant: Grant) -> None:
        """A grant arrived."""
        ...


class Frame:
    """One captured frame and what became of it."""

    __slots__ = (
        "accuracy",
        "acknowledged",
        "answered_ns",
        "arrived_bytes",
        "camera",
        "captured_ns",
        "choice",
        "deadline_ns",
        "frame_id",
        "hold",
        "layers",
        "outcome",
        "payload_bytes",
        "read_ns",
        "reason",
        "refused",
        "remaining_ns",
        "sent_ns",
        "taken",
        "value",
        "whole",
    )  # fmt: skip

    def __init__(self, camera: Device, frame_id: int, captured_ns: int, deadline_ns: int) -> None:
        self.camera = camera
        self.frame_id = frame_id
        self.captured_ns = captured_ns
        self.deadline_ns = deadline_ns
        self.answered_ns = 0
        self.outcome = ""
        self.reason = ""
        self.choice = ""
        self.accuracy = 0.0
        self.value = 0.0  # accuracy of the answer that is on its way
        self.payload_bytes = 0
        self.sent_ns = self.read_ns = self.remaining_ns = 0
        self.whole = False
        self.acknowledged = False
        self.hold = False  # a local answer waits for the server's
        self.refused = False
        self.layers: tuple[float, ...] = ()  # accuracy with the first one, two ... of its layers; empty: it travels whole
        self.taken = False  # by the server, with what had arrived
