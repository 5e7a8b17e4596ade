"""The server's grant as a token bucket in bytes."""

from __future__ import annotations

from math import inf

_NS_PER_S = 1_000_000_000


class GrantBudget:
    """Bytes this session may still send.

    Over any window of length T at one grant G (bits/s), at most ``G * T / 8 + burst`` bytes pass, where ``burst`` is
    ``burst_ns`` of the grant. A clock that jumps forward earns at most one burst, one that jumps back earns nothing.
    """

    __slots__ = ("_burst_ns", "_last_ns", "_tokens", "bitrate_bps")

    def __init__(self, *, burst_ns: int) -> None:
        self._burst_ns = burst_ns
        self._last_ns = 0
        self._tokens = 0.0
        self.bitrate_bps = 0.0

    @property
    def unlimited(self) -> bool:
        """No grant was given, or it was lifted."""
        return self.bitrate_bps <= 0

    def set_bitrate(self, bitrate_bps: float, now_ns: int) -> None:
        """A new grant; 0 or less lifts the limit. What was saved up stays, up to the new burst."""
        was_unlimited = self.unlimited
        if not was_unlimited:
            self._refill(now_ns)
        self.bitrate_bps = bitrate_bps if 0 < bitrate_bps < inf else 0.0
        self._last_ns = now_ns
        if not self.unlimited:
            self._tokens = self._burst_bytes if was_unlimited else min(self._tokens, self._burst_bytes)

    def tokens_bytes(self, now_ns: int) -> float:
        """Bytes that may leave now; never negative, ``inf`` without a grant."""
        if self.unlimited:
            return inf
        self._refill(now_ns)
        return max(self._tokens, 0.0)

    def spend(self, n_bytes: int, now_ns: int) -> None:
        """Records bytes that left. Spending more than was there leaves a debt, which later refills pay first."""
        if not self.unlimited:
            self._refill(now_ns)
            self._tokens -= n_bytes

    @property
    def _burst_bytes(self) -> float:
        return self.bitrate_bps / 8 * self._burst_ns / _NS_PER_S

    def _refill(self, now_ns: int) -> None:
        gained = max(0, now_ns - self._last_ns) * self.bitrate_bps / 8 / _NS_PER_S
        self._tokens = min(self._tokens + gained, self._burst_bytes)
        self._last_ns = now_ns
