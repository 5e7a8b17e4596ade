"""Shares a bottleneck among sessions so that their summed accuracy is the greatest, above a fairness floor.

A session's accuracy as a function of its bitrate is the concave hull of its operating points: between two points a
camera mixes them over time. The sum of concave functions is greatest where all slopes are equal, so the bitrate is
handed out segment by segment, steepest first; sessions on equal slopes fill together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A straight piece of a utility: ``width_bps`` more bitrate at ``slope`` accuracy per bit/s."""

    slope: float
    width_bps: float


def concave_hull(points: Sequence[tuple[float, float]]) -> tuple[Segment, ...]:
    """Segments, steepest first, of the least concave function above (0, 0) and ``points`` = (bitrate bps, accuracy)."""
    useful = sorted((b, a) for b, a in points if isfinite(b) and isfinite(a) and b > 0 and a > 0)
    hull: list[tuple[float, float]] = [(0.0, 0.0)]
    for b, a in useful:
        if a <= hull[-1][1]:
            continue
        if b <= hull[-1][0]:
            hull.pop()
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], (b, a)):
            hull.pop()
        hull.append((b, a))
    return tuple(Segment(slope=_slope(p, q), width_bps=q[0] - p[0]) for p, q in pairwise(hull))


def share(capacity_bps: float, utilities: Mapping[str, Sequence[Segment]], *, floor: float = 0.5) -> dict[str, float]:
    """Bits/s for each session; they sum to at most ``capacity_bps``.

    Args:
        capacity_bps: of the bottleneck.
        utilities: by session, as ``concave_hull`` made them.
        floor: every session gets this share of an equal part before anything else, 0..1, if it has use for it.
    """
    if not utilities or capacity_bps <= 0 or not isfinite(capacity_bps):
        return dict.fromkeys(utilities, 0.0)
    equal_bps = capacity_bps / len(utilities)
    granted: dict[str, float] = {}
    rest: list[tuple[float, float, str]] = []  # slope, width, session
    for name, segments in utilities.items():
        sure_bps = got_bps = min(floor * equal_bps, sum(s.width_bps for s in segments))
        for s in segments:
            taken_bps = min(sure_bps, s.width_bps)
            sure_bps -= taken_bps
            if s.width_bps > taken_bps:
                rest.append((s.slope, s.width_bps - taken_bps, name))
        granted[name] = got_bps
    left_bps = capacity_bps - sum(granted.values())
    rest.sort(key=lambda r: -r[0])
    i = 0
    while i < len(rest) and left_bps > 0:
        j = i
        while j < len(rest) and rest[j][0] >= rest[i][0] * (1 - 1e-6):
            j += 1
        left_bps -= _fill(granted, rest[i:j], left_bps)
        i = j
    # What nobody has use for is headroom: it lets a session try its next point.
    if left_bps > 0:
        for name in granted:
            granted[name] += left_bps / len(granted)
    return granted


def _fill(granted: dict[str, float], level: list[tuple[float, float, str]], left_bps: float) -> float:
    """Fills segments of one slope so that the sessions end up as equal as the segments allow; returns what it took."""
    widths: dict[str, float] = {}
    for _, width_bps, name in level:
        widths[name] = widths.get(name, 0.0) + width_bps
    if sum(widths.values()) <= left_bps:
        for name, width_bps in widths.items():
            granted[name] += width_bps
        return sum(widths.values())
    low, high = 0.0, max(granted[n] + w for n, w in widths.items())
    for _ in range(50):  # the water level, by bisection
        level_bps = (low + high) / 2
        need = sum(min(max(level_bps - granted[n], 0.0), w) for n, w in widths.items())
        low, high = (level_bps, high) if need <= left_bps else (low, level_bps)
    took = 0.0
    for name, width_bps in widths.items():
        gain = min(max(low - granted[name], 0.0), width_bps)
        granted[name] += gain
        took += gain
    return took


def _slope(p: tuple[float, float], q: tuple[float, float]) -> float:
    return (q[1] - p[1]) / (q[0] - p[0]) if q[0] > p[0] else float("inf")
