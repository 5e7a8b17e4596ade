"""What waiting and the tail took lately, summed up now and then rather than for every frame."""

from __future__ import annotations

from collections import deque

import numpy as np

from edge_server.backends import Load

_FRAMES = 256
_SUMMARY_NS = 100_000_000


class Recent:
    """The last frames' times."""

    def __init__(self) -> None:
        self._times: deque[tuple[int, int]] = deque(maxlen=_FRAMES)
        self._summed_ns: int | None = None
        self.load = Load(waiting=0, queue_ns=0, tail_ns=0)

    def add(self, queue_ns: int, tail_ns: int) -> None:
        """One frame."""
        self._times.append((queue_ns, tail_ns))

    def sum_up(self, waiting: int, now_ns: int) -> None:
        """Renews `load` when it is older than a tenth of a second."""
        if self._summed_ns is not None and now_ns - self._summed_ns < _SUMMARY_NS:
            return
        self._summed_ns = now_ns
        queue, tail = np.percentile(np.array(self._times), 95, axis=0).tolist()
        self.load = Load(waiting=waiting, queue_ns=int(queue), tail_ns=int(tail))
