"""The change gate: where nothing moved since the last frame that was answered, its answer is used again.

A frame is shrunk to 64 × 48 grey pixels, averaged in blocks of 8 × 8; the largest change of a block against the frame
last let through decides. Small noise averages out, a person in a corner does not. Once open, the gate stays open until
several frames in a row are calm (hysteresis), and however calm it is, a frame passes now and then.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edge_client.frames import NS_PER_S
from protos.errors import ConfigError
from splitters.tasks.preprocess import Frame

_WIDTH_PX, _HEIGHT_PX, _BLOCK_PX = 64, 48, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeConfig:
    """When a frame counts as changed.

    Attributes:
        open_level: grey levels (0..255) a block must change to open the gate.
        close_level: below this, against the frame before, a frame is calm.
        calm_frames: this many calm frames in a row close the gate.
        refresh_s: a frame passes at the latest after so long.
    """

    open_level: float = 4.0
    close_level: float = 2.5
    calm_frames: int = 3
    refresh_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.close_level <= self.open_level or self.calm_frames < 1 or self.refresh_s <= 0:
            raise ConfigError("the change gate needs 0 < close_level <= open_level, calm_frames >= 1 and refresh_s > 0")


class ChangeGate:
    """Pure but for the frames it remembers; time comes in as an argument."""

    def __init__(self, config: ChangeConfig | None = None) -> None:
        self._config = config or ChangeConfig()
        self._passed: NDArray[np.float32] | None = None
        self._before: NDArray[np.float32] | None = None
        self._passed_ns = 0
        self._open = True
        self._calm = 0

    def changed(self, frame: Frame, now_ns: int) -> bool:
        """Whether the frame should go on; if so, later ones are compared with it."""
        blocks = _blocks(frame)
        passed, before, self._before = self._passed, self._before, blocks
        if passed is None or before is None:
            return self._pass(blocks, now_ns)
        moved = float(np.abs(blocks - passed).max())
        stirred = float(np.abs(blocks - before).max())
        if self._open:
            self._calm = self._calm + 1 if stirred < self._config.close_level else 0
            self._open = self._calm < self._config.calm_frames
        if not self._open and moved >= self._config.open_level:
            self._open, self._calm = True, 0
        overdue = now_ns - self._passed_ns >= self._config.refresh_s * NS_PER_S
        return self._pass(blocks, now_ns) if self._open or overdue else False

    def reset(self) -> None:
        """The next frame passes: there is no answer to use again."""
        self._passed = self._before = None
        self._open, self._calm = True, 0

    def _pass(self, blocks: NDArray[np.float32], now_ns: int) -> bool:
        self._passed, self._passed_ns = blocks, now_ns
        return True


def _blocks(frame: Frame) -> NDArray[np.float32]:
    """Block means, (6, 8) for any frame."""
    small = cv2.resize(frame, (_WIDTH_PX, _HEIGHT_PX), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32)
    means: NDArray[np.float32] = grey.reshape(_HEIGHT_PX // _BLOCK_PX, _BLOCK_PX, _WIDTH_PX // _BLOCK_PX, _BLOCK_PX).mean(
        axis=(1, 3)
    )
    return means
