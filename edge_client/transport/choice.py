"""Stream or datagrams: which carries the next frame. Pure: no clock."""

from __future__ import annotations

from edge_client.frames import NS_PER_S

_BEGIN, _END = 0.008, 0.003  # shares of packets lost
_COUNTED = 40  # packets whose fates are known, before anything is concluded
_STAY_NS = 20 * NS_PER_S  # a path that lost packets is not trusted again at once


class LaneChoice:
    """On a path that loses nothing the stream is better: a frame refers to the one just before it, and costs least.

    Args:
        always: datagrams whenever they can go.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._lossy_ns: int | None = None  # when the path was lossy last

    def beside(self, loss: float, counted: int, now_ns: int) -> bool:
        """Whether the next frame goes as datagrams.

        Args:
            loss: share of packets lost lately.
            counted: of how many.
            now_ns: now.
        """
        if self._always:
            return True
        if counted >= _COUNTED and (loss >= _BEGIN or (self._lossy_ns is not None and loss > _END)):
            self._lossy_ns = now_ns
        return self._lossy_ns is not None and now_ns - self._lossy_ns < _STAY_NS
