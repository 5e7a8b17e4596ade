"""Watches for moments in which this process itself was late: then every session's frames seem delayed, and by no link."""

from __future__ import annotations

import asyncio
import time

from edge_server.bandwidth.grants import BandwidthManager

_POLL_S = 0.05
_LATE_S = 0.01


async def watch_lag(bandwidth: BandwidthManager) -> None:
    """Tells the grants of such moments, for ever."""
    while True:
        before_ns = time.monotonic_ns()
        await asyncio.sleep(_POLL_S)
        now_ns = time.monotonic_ns()
        if now_ns - before_ns > (_POLL_S + _LATE_S) * 1e9:
            bandwidth.on_late(before_ns, now_ns)
