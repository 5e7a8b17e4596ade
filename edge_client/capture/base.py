"""What a source of frames is to a pipeline; ``Capture`` reads real ones, ``given`` takes a program's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edge_client.frames import CapturedFrame


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A frame, and those it replaced (without their images), oldest first."""

    frame: CapturedFrame
    superseded: tuple[CapturedFrame, ...] = ()


class Frames(Protocol):
    """Where frames come from; ``capture.Capture`` in earnest."""

    live: bool

    @property
    def fps(self) -> float:
        """Frames a second; 0: not known, or not yet."""
        ...

    @property
    def note(self) -> str:
        """What is wrong with the source now; mostly empty."""
        ...

    async def start(self) -> None:
        """Opens the source."""

    async def next(self) -> Delivery | None:
        """The next frame, None at the end."""
        ...

    def close(self) -> tuple[CapturedFrame, ...]:
        """Ends it; frames never taken."""
        ...
