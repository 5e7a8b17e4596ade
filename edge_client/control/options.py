"""What can be done with a frame, with times and sizes kept as numbers ready for use."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from edge_client.control.decision import Decision, Offload
from edge_client.control.quantile import SlidingQuantile
from splitters.bundle.offload import OffloadOption
from splitters.bundle.operating_point import Quantiles

_SEGMENT_BYTES = 1448
_OVERHEAD_BYTES = 64
KEY = " key"
"""Added to a video option's name: the same for a frame that depends on no other."""
# Device time over its median, in units of (p95 - median): five equally likely points of a log-normal whose p95 is 1.25 medians.
DEVICE_NOISE = (-0.64, -0.27, 0.0, 0.3, 0.76)


class Option:
    """One thing to do.

    Attributes:
        kind: ``split``, ``jpeg``, ...: choices of one kind cost alike.
        accuracy: 0..1, measured.
        table_bytes: the payload as it was measured elsewhere.
        key_bytes: the same of a video's key frame; None: it is no video.
        typical_bytes, n_bytes: middling and p95 payload, by the table or as learnt.
        packets: TCP segments of a p95 payload.
        mid_ns, high_ns: median and p95 of the device's time, as measured here once there are eight samples.
    """

    __slots__ = (
        "_samples", "accuracy", "decision", "high_ns", "key_bytes", "kind", "mid_ns", "n_bytes", "name", "packets", "table_bytes",
        "typical_bytes",
    )  # fmt: skip

    def __init__(
        self, decision: Decision, accuracy: float, payload: Quantiles, ms: Quantiles, key_bytes: Quantiles | None = None
    ) -> None:
        self.name = decision.name
        self.kind = self.name.partition(" ")[0]
        self.decision = decision
        self.accuracy = accuracy
        self.table_bytes = payload
        self.key_bytes = key_bytes
        self.set_bytes(key_bytes or payload)
        self._samples: SlidingQuantile | None = None  # most are never chosen
        self.mid_ns = self.high_ns = 0.0
        self.set_ms(ms)

    @classmethod
    def of(cls, o: OffloadOption) -> Option:
        """A picture or video to send instead."""
        decision = Offload(format=o.format, quality=o.quality, size_px=o.size_px)
        return cls(decision, o.accuracy, o.payload_bytes, o.encode_ms, o.key_bytes)

    def set_bytes(self, payload: Quantiles) -> None:
        """What a payload is believed to cost."""
        self.set_sizes(payload.p50, payload.p95)

    def set_sizes(self, p50: float, p95: float) -> None:
        """The same by median and 95th percentile."""
        self.n_bytes = p95 if p95 > p50 else p50
        self.typical_bytes = (p50 + self.n_bytes) / 2
        self.packets = int(-(-(self.typical_bytes + _OVERHEAD_BYTES) // _SEGMENT_BYTES))

    def set_ms(self, ms: Quantiles) -> None:
        """Overrides what is believed of the device's time."""
        self.mid_ns = ms.p50 * 1e6
        self.high_ns = max(ms.p50, ms.p95) * 1e6

    def learn(self, elapsed_ns: int, now_ns: int) -> None:
        """A measured device time."""
        if self._samples is None:
            self._samples = SlidingQuantile(size=64, age_ns=60_000_000_000)
        samples = self._samples
        samples.add(elapsed_ns if elapsed_ns > 0 else 0, now_ns)
        if len(samples.ordered) >= 8:
            self.mid_ns = samples.quantile(0.5, self.mid_ns)
            self.high_ns = samples.quantile(0.95, self.high_ns)


def useful(options: Sequence[Option]) -> list[Option]:
    """Those no other beats in bytes, device time and accuracy at once, the most accurate first."""
    kept: list[Option] = []
    # Of those kept the quickest, the next one that is more accurate, and so on: device times, and accuracies.
    highs_ns: list[float] = []
    accuracies: list[float] = []
    for o in sorted(options, key=lambda o: (o.n_bytes, o.high_ns, -o.accuracy, o.name)):
        at = bisect_right(highs_ns, o.high_ns)
        if at and accuracies[at - 1] >= o.accuracy:
            continue
        kept.append(o)
        end = bisect_right(accuracies, o.accuracy, at)
        highs_ns[at:end] = [o.high_ns]
        accuracies[at:end] = [o.accuracy]
    return sorted(kept, key=lambda o: (-o.accuracy, o.n_bytes))


def led_by(first: Option, options: Sequence[Option]) -> list[Option]:
    """The options in their order, but that one of them comes first."""
    led = [first, *options]
    del led[led.index(first, 1)]
    return led
