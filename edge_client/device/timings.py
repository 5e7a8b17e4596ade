"""What this device's own work takes: recent quantiles of head and local model."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

_DEFAULT_NS = 30_000_000
SCHEDULING_NS = 5_000_000  # how late this process may wake up


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

    def local_turn_ns(self) -> tuple[int, int]:
        """One local answer at its slow end, and what may stand in front of it: a job that runs is not interrupted."""
        local_ns, head_ns = int(self.local.quantile(0.95)), int(self.head.quantile(0.95))
        return local_ns, SCHEDULING_NS + max(local_ns, head_ns)


class DevicePace:
    """How fast the device is now, against when its times were measured.

    A device that was busy then, or is throttled now, is so for all it does: what one kind of work shows is applied to
    the kinds that are not being done, and so would never be measured again.

    Args:
        measured_ns: median by the choice's name, at the start.

    Attributes:
        lasting: the factor over some 250 frames, the median of blocks of sixteen; None before there are four blocks.
    """

    _EVERY, _BLOCKS, _LEAST_BLOCKS = 16, 16, 4

    def __init__(self, measured_ns: Mapping[str, float]) -> None:
        self._measured_ns = measured_ns
        self._recent: deque[tuple[str, int]] = deque(maxlen=self._EVERY)
        self._seen = 0
        self._blocks: deque[float] = deque(maxlen=self._BLOCKS)
        self.lasting: float | None = None

    def add(self, name: str, elapsed_ns: int) -> dict[str, float]:
        """Takes a sample; every sixteen, returns the factor for each choice that was not among them."""
        self._recent.append((name, elapsed_ns))
        self._seen += 1
        if self._seen % self._EVERY:
            return {}
        ratios = sorted(ns / self._measured_ns[n] for n, ns in self._recent if self._measured_ns.get(n, 0) > 0)
        if len(ratios) < self._EVERY // 2:
            return {}
        factor = ratios[len(ratios) // 2]
        self._blocks.append(factor)
        if len(self._blocks) >= self._LEAST_BLOCKS:
            self.lasting = sorted(self._blocks)[len(self._blocks) // 2]
        done = {n for n, _ in self._recent}
        return {n: factor for n in self._measured_ns if n not in done}
