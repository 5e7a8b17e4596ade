"""A captured frame, what became of it, and the ledger in which both must add up.

Times are nanoseconds of the device's monotonic clock unless a name says ``unix``; sizes are pixels or bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from protos.errors import InternalError
from protos.messages import Answer
from splitters.runtime.inputs import Raw
from splitters.tasks.preprocess import Frame

Clock = Callable[[], int]
"""Monotonic nanoseconds."""

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000


class Outcome(StrEnum):
    """How a captured frame ended; every frame has exactly one."""

    RESULT = "result"
    LOCAL = "local"
    FILTERED = "filtered"
    UNCHANGED = "unchanged"
    DROPPED = "dropped"
    EXPIRED = "expired"


@dataclass(frozen=True, kw_only=True, slots=True)
class CapturedFrame:
    """One frame a source delivered.

    Attributes:
        index: counts the source's frames from 0, those replaced by a newer one included.
        image: (H, W, 3) uint8 BGR; None once it was replaced or is needed no longer.
        camera: the camera's name as the user gave it, or the source as people may see it.
        source: the file's name, where the frame comes from one; otherwise as ``camera`` where nobody named it.
        raw: arrays that came with it, for models that take such.
        position_ns: the frame's time since its source began, by the source's own stamps; None: it has no time, like a picture.
    """

    index: int
    image: Frame | None
    captured_ns: int
    captured_unix_ns: int
    camera: str = ""
    source: str = ""
    position_ns: int | None = None
    raw: Raw | None = None
    width_px: int
    height_px: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Age:
    """How old the boxes of a frame are: frames captured, and milliseconds passed, since the frame they were found in."""

    frames: int
    ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameReport:
    """The whole story of one frame, as sinks and the summary need it.

    Attributes:
        frame: the captured frame; its image is kept only where a sink draws on it.
        reason: of ``dropped`` (superseded, skipped, offline, ...); empty otherwise.
        operating_point: id of the point sent; None where no latent was.
        payload_bytes: all layers handed to the transport.
        stages_ms: milliseconds by stage (capture, head, codec, network, queue, tail, ...) and ``total``.
        answer: what is known of the frame: the server's, the local model's, or the last one where nothing changed.
        decision: what was chosen for the frame, ``split 3`` for instance; empty where nothing was.
        detail: a few words for people (the choice made, the frame an answer was taken from).
        age: of the boxes in ``answer``, where boxes are tracked; None where they are not.
    """

    frame: CapturedFrame
    model: str
    bundle_sha256: str
    outcome: Outcome
    reason: str = ""
    operating_point: int | None = None
    payload_bytes: int = 0
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    answer: Answer | None = None
    decision: str = ""
    detail: str = ""
    age: Age | None = None

    @property
    def latency_ms(self) -> float:
        """From the frame's capture to its outcome."""
        return self.stages_ms.get("total", 0.0)


class Ledger:
    """Counts frames; ``captured == sum(outcomes) + open`` holds at every moment."""

    def __init__(self) -> None:
        self.captured = 0
        self.outcomes: Counter[Outcome] = Counter()
        self.dropped: Counter[str] = Counter()
        self._open: set[int] = set()

    def capture(self, index: int) -> None:
        """A source delivered frame ``index``.

        Raises:
            InternalError: it was delivered before.
        """
        if index in self._open or index < self.captured:
            raise InternalError(f"frame {index} was captured twice")
        self._open.add(index)
        self.captured += 1

    def settle(self, index: int, outcome: Outcome, reason: str = "") -> bool:
        """Gives a frame its outcome; False (and nothing counted) when it already has one."""
        if index not in self._open:
            return False
        self._open.remove(index)
        self.outcomes[outcome] += 1
        if outcome is Outcome.DROPPED:
            self.dropped[reason] += 1
        return True

    def is_open(self, index: int) -> bool:
        """Whether the frame still waits for its outcome."""
        return index in self._open

    @property
    def open_count(self) -> int:
        """Frames without an outcome yet."""
        return len(self._open)

    @property
    def balanced(self) -> bool:
        """Whether every captured frame is open or has exactly one outcome."""
        return self.captured == sum(self.outcomes.values()) + len(self._open)
