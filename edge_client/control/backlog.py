"""What it costs to leave the device busy when the next frame comes.

The device does one thing at a time. A job that ends x after the next frame's capture makes that frame begin late: its answer comes
later, perhaps too late, and what it takes in turn delays the frame behind it. From x = I on, the frame interval, frames are
superseded and lost outright. So one choice's price is paid by frames that are not there yet, and depends on what can be done
with those.

That is a Markov decision process with one state, the lateness b a frame begins with, 0 <= b <= I:

    h(b) = max over choices of  r(b) + E h(b + T - I) - g,      h(x) = h(0) for x < 0,      h(x + I) = h(x) - (g - r0)

where T is the choice's time on the device, r its reward, r0 that of a frame without an answer, and g the mean reward of a frame.
Relative value iteration solves it (Puterman, Markov Decision Processes, 1994, 8.5): a sweep now and then keeps up with a network
that changes. Used is only the loss h(0) - h(b), so a device that is never busy for longer than an interval pays nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_client.control.options import DEVICE_NOISE

CELLS = 8
_DAMPING = 0.5
_NARROW = 1.5 * CELLS  # an interval this many spreads long: the loss is as good as linear between the points

Row = tuple[float, float, Sequence[float]]
"""A choice: median of its time, p95 less that, and its reward at each of the ``CELLS + 1`` latenesses."""


class Backlog:
    """Of one controller.

    Attributes:
        interval_ns: between two frames.
        lost: what a frame without an answer loses, against the mean frame.
    """

    __slots__ = ("_loss", "interval_ns", "lost")

    def __init__(self, interval_ns: float) -> None:
        self.interval_ns = interval_ns
        self._loss = [0.0] * (CELLS + 1)
        self.lost = 0.0

    def loss(self, late_ns: float) -> float:
        """What frames to come lose when the device becomes free so long after the next one's capture."""
        if late_ns <= 0.0:
            return 0.0
        frames, rest_ns = divmod(late_ns, self.interval_ns)
        at = rest_ns / self.interval_ns * CELLS
        cell = int(at)
        low = self._loss[cell]
        return frames * self.lost + low + (at - cell) * (self._loss[cell + 1] - low)

    def expected(self, late_ns: float, spread_ns: float) -> float:
        """The same, in expectation, for a time known by its median and by p95 less that."""
        if late_ns + DEVICE_NOISE[-1] * spread_ns <= 0.0:
            return 0.0
        if spread_ns * _NARROW < self.interval_ns:
            return self.loss(late_ns)
        total, table, interval_ns, lost = 0.0, self._loss, self.interval_ns, self.lost
        for z in DEVICE_NOISE:  # as `loss`, whose calls would cost as much again
            at_ns = late_ns + z * spread_ns
            if at_ns > 0.0:
                frames = at_ns // interval_ns
                at = (at_ns - frames * interval_ns) / interval_ns * CELLS
                cell = min(int(at), CELLS - 1)
                low = table[cell]
                total += frames * lost + low + (at - cell) * (table[cell + 1] - low)
        return total / len(DEVICE_NOISE)

    def sweep(self, rows: Sequence[Row], unanswered: float) -> None:
        """One value iteration with what can be done now; ``unanswered``: the reward of a frame without an answer."""
        step_ns = self.interval_ns / CELLS
        found = []
        for cell in range(CELLS + 1):
            late_ns = cell * step_ns - self.interval_ns
            best = unanswered
            for mid_ns, spread_ns, rewards in rows:
                if rewards[cell] > best:
                    best = max(best, rewards[cell] - self.expected(late_ns + mid_ns, spread_ns))
            found.append(best)
        mean = found[0]
        self.lost += _DAMPING * (max(0.0, mean - unanswered) - self.lost)
        self._loss = [old + _DAMPING * (mean - new - old) for old, new in zip(self._loss, found, strict=True)]
