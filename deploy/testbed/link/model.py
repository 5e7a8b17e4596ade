"""One direction of a link: capacity, propagation, jitter, a finite drop-tail queue, loss. Pure and seeded.

Whoever sends hands packets over in order of time; the link answers at once when each will arrive, or that it will
not. That is possible because the queue is first in, first out: nothing sent later changes what happened to a packet.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from deploy.testbed.link.trace import NEVER_NS, Trace, constant
from protos.errors import ConfigError

LOST = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class LossModel:
    """Packet loss of a Gilbert-Elliott channel; with the defaults of the last three, independent loss.

    Attributes:
        loss: mean share of packets lost, 0..1.
        burst_packets: mean length of a bad period, in packets; 1: losses are independent.
        loss_in_bad: share lost in a bad period.
    """

    loss: float = 0.0
    burst_packets: float = 1.0
    loss_in_bad: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.loss < 1 or self.burst_packets < 1 or not 0 < self.loss_in_bad <= 1:
            raise ConfigError("loss must be 0..1 (below 1), burst_packets at least 1, loss_in_bad above 0 and at most 1")
        if self.loss >= self.loss_in_bad and self.burst_packets > 1:
            raise ConfigError("loss must be below loss_in_bad: bad periods cannot lose more than that")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkConfig:
    """One direction.

    Attributes:
        trace: capacity.
        delay_ns: propagation.
        jitter_ns: standard deviation of a half-normal extra delay; packets never overtake each other.
        queue_bytes: what may wait; more is dropped. 0: 200 ms of the mean capacity, at least 30 kB.
        loss: the channel's.
        loss_from_ns: nothing is lost before.
    """

    trace: Trace = field(default_factory=lambda: constant(10e6))
    delay_ns: int = 20_000_000
    jitter_ns: int = 0
    queue_bytes: int = 0
    loss: LossModel = field(default_factory=LossModel)
    loss_from_ns: int = 0

    def __post_init__(self) -> None:
        if self.delay_ns < 0 or self.jitter_ns < 0 or self.queue_bytes < 0:
            raise ConfigError("delay, jitter and queue must not be negative")

    @property
    def room_bytes(self) -> float:
        """The queue's length."""
        return self.queue_bytes or max(30_000, self.trace.mean_bps() / 8 * 0.2)


class Link:
    """A running link. The same seed and the same packets give the same fates."""

    __slots__ = (
        "_bad", "_bad_to_good", "_busy_until", "_delay", "_fastest", "_good_to_bad", "_jitter", "_last_arrival", "_loss",
        "_loss_from", "_loss_in_bad", "_queue_bits", "_rng", "bytes_carried", "dropped", "lost", "trace",
    )  # fmt: skip

    def __init__(self, config: LinkConfig, seed: int | str) -> None:
        self.trace = config.trace
        self._delay = config.delay_ns
        self._jitter = config.jitter_ns
        self._queue_bits = 8.0 * config.room_bytes
        self._fastest = 1.001 * config.trace.peak_bps() * 1e-9  # bits per ns, a little more for rounding
        self._rng = random.Random(f"link/{seed}")  # noqa: S311
        m = config.loss
        self._loss = m.loss
        self._loss_in_bad = m.loss_in_bad
        self._loss_from = config.loss_from_ns
        self._bad = False
        self._bad_to_good = 1 / m.burst_packets
        share_bad = m.loss / m.loss_in_bad
        self._good_to_bad = self._bad_to_good * share_bad / (1 - share_bad) if m.burst_packets > 1 else 0.0
        self._busy_until = 0.0
        self._last_arrival = 0.0
        self.bytes_carried = 0
        self.dropped = 0
        self.lost = 0

    @property
    def delay_ns(self) -> int:
        """Propagation."""
        return self._delay

    @property
    def loss(self) -> float:
        """Mean share of packets lost, 0..1."""
        return self._loss

    def queued_bytes(self, now_ns: int) -> float:
        """What waits for capacity."""
        if self._busy_until <= now_ns:
            return 0.0
        return (self.trace.bits_until(self._busy_until) - self.trace.bits_until(now_ns)) / 8

    def send(self, n_bytes: int, now_ns: int) -> int:
        """A packet enters at ``now_ns``; returns its arrival in ns, or ``LOST``. Calls must be in order of time."""
        bits = 8.0 * n_bytes
        busy = self._busy_until
        if busy > now_ns:
            # No need to count what waits while not even the fastest of the link could have let the queue grow full.
            if (busy - now_ns) * self._fastest + bits > self._queue_bits and (
                self.trace.bits_until(busy) - self.trace.bits_until(now_ns) + bits > self._queue_bits
            ):
                self.dropped += 1
                return LOST
        else:
            busy = now_ns
        done = self.trace.finish_ns(busy, bits)
        if done >= NEVER_NS:
            self.dropped += 1
            return LOST
        self._busy_until = done
        if self._loss and now_ns >= self._loss_from and self._loses():
            self.lost += 1  # after the bottleneck: a lost packet has cost its capacity
            return LOST
        self.bytes_carried += n_bytes
        arrival = done + self._delay
        if self._jitter:
            arrival += abs(self._rng.gauss(0.0, self._jitter))
        if arrival < self._last_arrival:
            arrival = self._last_arrival
        self._last_arrival = arrival
        return int(arrival)

    def _loses(self) -> bool:
        if self._good_to_bad == 0.0:
            return self._rng.random() < self._loss
        self._bad = self._rng.random() >= self._bad_to_good if self._bad else self._rng.random() < self._good_to_bad
        return self._bad and (self._loss_in_bad >= 1 or self._rng.random() < self._loss_in_bad)
