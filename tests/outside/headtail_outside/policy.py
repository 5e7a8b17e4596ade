"""A policy: always the operating point with the fewest bytes, as fast as answers come back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edge_client.control import Decision, Policy, Skip, Split
from splitters.bundle.operating_point import OperatingPoint


class Smallest(Policy):
    def __init__(self, config: Any, points: Iterable[OperatingPoint], **options: Any) -> None:
        self._point = min(points, key=lambda p: p.payload_bytes.p50).id
        self._connected = False
        self._in_flight: set[int] = set()

    @property
    def granted_in_flight(self) -> int:
        return 0  # no limit of the server is heeded but its refusals

    def decide(self, frame_id: int, now_ns: int, deadline_ns: int) -> Decision:
        return Split(point_id=self._point) if self.allows() else Skip(reason="window")

    def may_send(self, frame_id: int, n_bytes: int, now_ns: int, deadline_ns: int, *, layer: int = 0) -> bool:
        return self.allows()

    def allows(self) -> bool:
        return self._connected and len(self._in_flight) < 2

    def wants_fallback(self, frame_id: int, now_ns: int, deadline_ns: int) -> bool:
        return False

    def ping_due(self, now_ns: int) -> bool:
        return False

    def on_connect(self, now_ns: int) -> None:
        self._connected = True

    def on_disconnect(self, now_ns: int) -> None:
        self._connected = False
        self._in_flight.clear()

    def on_sent(self, frame_id: int, n_bytes: int, now_ns: int) -> None:
        self._in_flight.add(frame_id)

    def on_ack(self, frame_id: int, now_ns: int, server_ns: int = 0) -> None:
        self._in_flight.discard(frame_id)

    def on_refused(self, frame_id: int, now_ns: int) -> None:
        self._in_flight.discard(frame_id)

    def on_lost(self, frame_id: int, now_ns: int) -> None:
        self._in_flight.discard(frame_id)

    def withdraw_offloads(self, form: str = "") -> bool:
        return False
