"""When does splitting pay? The ways to answer a frame, and the best of them for a device, an uplink and a deadline.

A frame is answered *alone* (by the device), *split* (a payload is sent) or by *offload* (a picture is sent). Of the ways that meet
the deadline the most accurate is best. Ways whose accuracies lie within half a point of it count as equally accurate: of those the
one that sends the fewest bytes is best, so a device that can answer alone as well needs no server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protos.errors import ConfigError
from splitters.profiling.table import Profile

Kind = Literal["alone", "split", "offload"]
KINDS: tuple[Kind, ...] = ("alone", "split", "offload")
ALIKE = 0.005
BITRATES_BPS = (1e4, 1e8)
SLOWDOWNS = (0.5, 200.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way to answer a frame.

    Attributes:
        kind: who does what.
        name: which setting of it.
        accuracy: 0..1, all ways of a model in one metric.
        device_ms: on the machine that measured; a device's is that times its slowdown.
        sent_bytes: on the uplink.
        server_ms: on one core of the machine that measured.
    """

    kind: Kind
    name: str
    accuracy: float
    device_ms: float
    sent_bytes: float
    server_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The network and the time there is.

    Attributes:
        rtt_ms: round trip without the payload's own time on the link.
        deadline_ms: capture to answer.
    """

    rtt_ms: float
    deadline_ms: float

    def __post_init__(self) -> None:
        if not (0 <= self.rtt_ms < np.inf and 0 < self.deadline_ms < np.inf):
            raise ConfigError(f"rtt_ms must not be negative and deadline_ms positive, got {self.rtt_ms} and {self.deadline_ms}")


def latency_ms(way: Way, slowdown: NDArray[np.float64], bitrate_bps: NDArray[np.float64], rtt_ms: float) -> NDArray[np.float64]:
    """Capture to answer for every slowdown and bitrate; the two arrays broadcast."""
    network = 0.0 if way.kind == "alone" else rtt_ms + way.sent_bytes * 8e3 / bitrate_bps
    return way.device_ms * slowdown + network + way.server_ms


def best(
    ways: Sequence[Way], place: Place, slowdown: NDArray[np.float64] | float, bitrate_bps: NDArray[np.float64] | float
) -> NDArray[np.int64]:
    """Index of the best way for every slowdown and bitrate (broadcast against each other); -1 where none meets the deadline.

    Raises:
        ConfigError: a slowdown or bitrate is not positive.
    """
    slow, bps = np.asarray(slowdown, np.float64), np.asarray(bitrate_bps, np.float64)
    if not (np.all(slow > 0) and np.all(bps > 0)):
        raise ConfigError("bitrate and device slowdown must be positive")
    meets = np.stack([np.broadcast_arrays(latency_ms(w, slow, bps, place.rtt_ms), slow * bps)[0] for w in ways])
    meets = meets <= place.deadline_ms
    accuracy = np.array([w.accuracy for w in ways]).reshape(-1, *[1] * (meets.ndim - 1))
    reached = np.where(meets, accuracy, -np.inf).max(0)
    order = sorted(range(len(ways)), key=lambda i: (ways[i].sent_bytes, -ways[i].accuracy, ways[i].device_ms))
    found = np.full(reached.shape, -1, np.int64)
    for i in reversed(order):
        found[meets[i] & (ways[i].accuracy >= reached - ALIKE)] = i
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """A range of the uplink's bitrate over which one kind of way is best; ``kind`` None: nothing meets the deadline."""

    from_bps: float
    to_bps: float
    kind: Kind | None


def stretches(ways: Sequence[Way], place: Place, slowdown: float) -> list[Stretch]:
    """Which kind is best on a device of that slowdown, from 10 kbit/s to 100 Mbit/s; where two meet is a break-even bitrate."""
    bps = np.geomspace(*BITRATES_BPS, 2001)
    found: list[Stretch] = []
    for at, i in zip(bps, best(ways, place, slowdown, bps), strict=True):
        kind = ways[i].kind if i >= 0 else None
        if found and found[-1].kind == kind:
            found[-1] = Stretch(from_bps=found[-1].from_bps, to_bps=float(at), kind=kind)
        else:
            found.append(Stretch(from_bps=float(at), to_bps=float(at), kind=kind))
    return found


def slowest_alone(ways: Sequence[Way], deadline_ms: float) -> float:
    """The slowdown up to which the device answers alone in time; 0 where no way does without a server."""
    return max((deadline_ms / w.device_ms for w in ways if w.kind == "alone" and w.device_ms > 0), default=0.0)


def ways_of(profile: Profile) -> list[Way]:
    """Of a model that is not trained to be split: all its ways give the same answer, 8-bit tensors or a JPEG cross."""
    server_ms = min(profile.local_ms, profile.local_torch_ms)
    return [
        Way(kind="alone", name="whole model", accuracy=1.0, device_ms=profile.local_ms, sent_bytes=0, server_ms=0.0),
        Way(kind="offload", name="jpeg 90", accuracy=1.0, device_ms=0.0, sent_bytes=profile.picture_bytes, server_ms=server_ms),
        *(
            Way(
                kind="split", name=r.name, accuracy=1.0, device_ms=r.head_ms, sent_bytes=r.zstd_bytes,
                server_ms=min(r.tail_ms, r.tail_torch_ms),
            )
            for r in profile.rows
        ),
    ]  # fmt: skip


def told(ways: Sequence[Way], place: Place, slowdown: float, bitrate_bps: float | None) -> list[str]:
    """The answer in lines for people."""
    limit = slowest_alone(ways, place.deadline_ms)
    lines = [
        f"when does splitting pay? {place.deadline_ms:g} ms from capture to answer, {place.rtt_ms:g} ms round trip:",
        f"  alone: in time on a device up to {limit:.3g} times slower than this machine" if limit else "  alone: no such way",
        f"  a device {slowdown:g} times slower, by its uplink: "
        + "; ".join(
            f"{_bps(s.from_bps)} to {_bps(s.to_bps)} {s.kind or 'nothing in time'}" for s in stretches(ways, place, slowdown)
        ),
    ]
    if bitrate_bps is not None:
        chosen = int(best(ways, place, slowdown, bitrate_bps))
        what = "nothing meets the deadline"
        if chosen >= 0:
            w = ways[chosen]
            total = float(latency_ms(w, np.asarray(slowdown), np.asarray(bitrate_bps), place.rtt_ms))
            what = f"{w.kind} ({w.name}): accuracy {w.accuracy:.3f}, {w.sent_bytes:,.0f} bytes, {total:.0f} ms"
        lines.append(f"  at {_bps(bitrate_bps)}: {what}")
    return lines


def _bps(value: float) -> str:
    return f"{value / 1e6:.3g} Mbit/s" if value >= 1e6 else f"{value / 1e3:.3g} kbit/s"
