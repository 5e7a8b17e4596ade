"""A bounded, fair sample of what a server decoded: short runs of successive frames, by bundle.

Symbols are kept, no pictures: from a bundle's latents alone nobody is shown. Shape legend: T frames, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from splitters.codec import Symbols

RUN_FRAMES = 8
MAX_RUNS = 24
_WATCHED = 4  # sessions whose runs are under way at a time
_GAP_FRAMES = 3  # a later frame than this many after the last one belongs to no run


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Successive frames of one camera.

    Attributes:
        point_id: the codec point of all of them.
        values: (T, C, H, W) symbols.
    """

    point_id: str
    values: NDArray[np.int16]


@dataclass(slots=True)
class _Kept:
    runs: list[Run] = field(default_factory=list)
    offered: int = 0


@dataclass(slots=True)
class _Open:
    sha256: str
    point_id: str
    last: int
    values: list[NDArray[np.int16]]


class Seen:
    """The sample. Every run of a bundle has the same chance to be in it, however long the server runs.

    Args:
        seed: of the chance.
        max_runs: kept of each bundle.
        run_frames: of a run.
    """

    def __init__(self, seed: int = 0, max_runs: int = MAX_RUNS, run_frames: int = RUN_FRAMES) -> None:
        self._rng = np.random.default_rng(seed)
        self._max_runs, self._run_frames = max_runs, run_frames
        self._kept: dict[str, _Kept] = {}
        self._open: dict[Hashable, _Open] = {}

    def add(self, session: Hashable, sha256: str, frame_id: int, symbols: Symbols) -> None:
        """Notes a decoded frame; one that does not follow the session's last one begins another run.

        Args:
            session: whose frame it is.
            sha256: the bundle's hash.
            frame_id: as the session counts.
            symbols: whole; one with missing layers or slices ends the run.
        """
        run = self._open.get(session)
        whole = symbols.layers == symbols.layer_count and not symbols.held
        follows = run is not None and (run.sha256, run.point_id) == (sha256, symbols.point_id)
        if run is not None and not (whole and follows and run.last < frame_id <= run.last + _GAP_FRAMES):
            del self._open[session]
            run = None
        if not whole or (run is None and len(self._open) >= _WATCHED):
            return
        if run is None:
            run = self._open[session] = _Open(sha256, symbols.point_id, frame_id, [])
        run.last = frame_id
        run.values.append(symbols.tensors[0])
        if len(run.values) == self._run_frames:
            del self._open[session]
            self._offer(sha256, Run(point_id=run.point_id, values=np.stack(run.values)))

    def _offer(self, sha256: str, run: Run) -> None:
        kept = self._kept.setdefault(sha256, _Kept())
        kept.offered += 1
        if len(kept.runs) < self._max_runs:
            kept.runs.append(run)
        elif (place := int(self._rng.integers(kept.offered))) < self._max_runs:
            kept.runs[place] = run

    def end(self, session: Hashable) -> None:
        """The session sends nothing more."""
        self._open.pop(session, None)

    def runs(self, sha256: str) -> list[Run]:
        """What is kept of a bundle."""
        kept = self._kept.get(sha256)
        return list(kept.runs) if kept is not None else []

    def forget(self, sha256: str) -> None:
        """A bundle that is out of use, or fitted."""
        self._kept.pop(sha256, None)
