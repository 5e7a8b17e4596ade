"""Settings of the control loop."""

from __future__ import annotations

from dataclasses import dataclass

from protos.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlConfig:
    """What the controller aims at, and how fast it learns.

    Attributes:
        fps: frames/s the source delivers; the controller keeps the device and the link within it.
        target_on_time: P(answer before the deadline) every choice should reach, (0, 1).
        miss_price: taken off a choice's value for each unit by which its P(answer in time) is below the target, in units of
            the best accuracy.
        switch_margin: expected accuracy another choice must gain before the controller leaves the last one, in the same units.
        rate_memory_ns: time constant of the delivery bitrate's estimate.
        window_ns: age at which a sample leaves the quantile windows.
        initial_bps: bitrate assumed before the first acknowledgement, bits/s.
        initial_rtt_ns: round trip assumed before the first acknowledgement or pong.
        ping_interval_ns: a ping is due when nothing was heard for this long and no frame is in flight.
        grant_burst_ns: how much unused grant may be saved up, as time at the granted bitrate.
        learn_sizes: learn what payloads cost here (see ``sizes``); else the table is believed.
        explain: attach an ``Explanation`` to every decision.
    """

    fps: float = 10.0
    target_on_time: float = 0.95
    miss_price: float = 1.0
    switch_margin: float = 0.009
    rate_memory_ns: int = 700_000_000
    window_ns: int = 8_000_000_000
    initial_bps: float = 2_000_000.0
    initial_rtt_ns: int = 60_000_000
    ping_interval_ns: int = 250_000_000
    grant_burst_ns: int = 500_000_000
    learn_sizes: bool = True
    explain: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.target_on_time < 1:
            raise ConfigError(f"target_on_time must lie between 0 and 1, got {self.target_on_time}")
        if not 0 <= self.miss_price < 1000:
            raise ConfigError(f"miss_price must be 0 or more, got {self.miss_price}")
        if not 0 <= self.switch_margin < 1:
            raise ConfigError(f"switch_margin must be 0..1, got {self.switch_margin}")
        if not 0 < self.fps <= 1000:
            raise ConfigError(f"fps must be above 0 and at most 1000, got {self.fps}")
        for name in ("rate_memory_ns", "window_ns", "initial_bps", "initial_rtt_ns", "ping_interval_ns", "grant_burst_ns"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
