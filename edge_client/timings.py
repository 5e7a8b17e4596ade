"""What this device's own work takes: recent quantiles of head and local model."""

from __future__ import annotations

from collections import deque

_DEFAULT_NS = 30_000_000


class Recent:
    """Quantiles of the last few durations, ns."""

    def __init__(self, size: int = 64) -> None:
        self._samples: deque[int] = deque(maxlen=size)

    def add(self, elapsed_ns: int) -> None:
        """Takes a sample."""
        self._samples.append(max(0, elapsed_ns))

    def quantile(self, q: float) -> float:
        """The q-quantile; 30 ms before the first sample."""
        if not self._samples:
            return _DEFAULT_NS
        ordered = sorted(self._samples)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Timings:
    """Head (preprocess to payload) and local model."""

    def __init__(self) -> None:
        self.head = Recent()
        self.local = Recent()
