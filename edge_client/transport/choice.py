"""Stream or datagrams: which carries the next frame. Pure: no clock."""

from __future__ import annotations

from edge_client.frames import NS_PER_S

_BEGIN, _END = 0.008, 0.003  # shares of packets lost
_COUNTED = 20  # packets whose fates are known, before anything is concluded
_STAY_NS = 20 * NS_PER_S  # a path that lost packets is not trusted again at once


_UNKNOWN_S, _PROBE_S, _CLEAN_S = 0.01, 0.1, 1.0
_KNOWN = 150  # packets, of which one at least is lost at 2 % in nineteen of twenty cases


def probe_after_s(loss: float, counted: int) -> float:
    """How long to wait with the next packet that only learns of a path which carries no frames.

    Short while the path is unknown, long where it lost nothing: a server has many clients that are idle there.

    Args:
        loss: share of packets lost lately.
        counted: of how many.
    """
    if counted < _KNOWN:
        return _UNKNOWN_S
    return _PROBE_S if loss > 0 else _CLEAN_S


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
