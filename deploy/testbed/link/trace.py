"""Link capacity over time: piecewise constant, repeated for ever.

A trace is read from a file or made by ``synthetic``. It answers two questions exactly: how many bits the link can
carry until t, and when a number of bits that begin at t are through.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from protos.errors import ConfigError

NEVER_NS = 1 << 62
_MTU_BITS = 12_000


class Trace:
    """Capacity in bits/s as a step function of time with a period.

    Args:
        steps: (start in ns, bits/s), starts increasing from 0.
        period_ns: after this the trace begins again.
        name: for reports.
    """

    __slots__ = ("_cum", "_per_period", "_rates", "_times", "name", "period_ns")

    def __init__(self, steps: Iterable[tuple[int, float]], period_ns: int, *, name: str = "trace") -> None:
        rows = list(steps)
        if not rows or rows[0][0] != 0 or period_ns <= rows[-1][0]:
            raise ConfigError(f"trace {name!r} must have steps that start at 0 and end before its period")
        if any(b[0] <= a[0] for a, b in pairwise(rows)) or any(not 0 <= r < 1e15 for _, r in rows):
            raise ConfigError(f"trace {name!r}: times must increase and bitrates be finite and not negative")
        self.name = name
        self.period_ns = period_ns
        self._times = [t for t, _ in rows]
        self._rates = [r * 1e-9 if r >= 1 else 0.0 for _, r in rows]  # bits per ns; less than a bit a second is nothing
        self._cum = [0.0]
        for i, rate in enumerate(self._rates):
            end = self._times[i + 1] if i + 1 < len(rows) else period_ns
            self._cum.append(self._cum[-1] + rate * (end - self._times[i]))
        self._per_period = self._cum.pop()

    def bps(self, at_ns: int) -> float:
        """Capacity at a moment."""
        return self._rates[bisect_right(self._times, at_ns % self.period_ns) - 1] * 1e9

    def mean_bps(self) -> float:
        """Over one period."""
        return self._per_period / self.period_ns * 1e9

    def peak_bps(self) -> float:
        """The most there ever is."""
        return max(self._rates) * 1e9

    def bits_until(self, at_ns: float) -> float:
        """Bits the link can have carried between 0 and ``at_ns``."""
        turns, rest = divmod(at_ns, self.period_ns)
        i = bisect_right(self._times, rest) - 1
        return turns * self._per_period + self._cum[i] + self._rates[i] * (rest - self._times[i])

    def finish_ns(self, start_ns: float, bits: float) -> float:
        """When the last of ``bits`` is through, if the first leaves at ``start_ns`` or once there is capacity."""
        if bits <= 0:
            return start_ns
        turns, rest = divmod(start_ns, self.period_ns)
        times, rates = self._times, self._rates
        i = bisect_right(times, rest) - 1
        rate = rates[i]
        if rate > 0:  # almost always the bits fit into the step they begin in
            end = rest + bits / rate
            if end <= (times[i + 1] if i + 1 < len(times) else self.period_ns):
                return start_ns + bits / rate
        if self._per_period <= 0:
            return float(NEVER_NS)
        target = self._cum[i] + rate * (rest - times[i]) + bits
        more, target = divmod(target, self._per_period)
        turns += more
        if target <= 0:  # exactly full periods: the end of the last step that carried anything
            turns, target = turns - 1, self._per_period
        j = bisect_right(self._cum, target) - 1
        while j > 0 and self._cum[j] >= target:
            j -= 1
        return float(turns * self.period_ns + times[j] + (target - self._cum[j]) / rates[j])

    def steps(self, until_ns: int) -> list[tuple[int, float]]:
        """(start ns, bits/s) from 0 to ``until_ns``, repetitions written out: for plots and the oracle."""
        found: list[tuple[int, float]] = []
        start = 0
        while start < until_ns:
            found += [(start + t, r * 1e9) for t, r in zip(self._times, self._rates, strict=True) if start + t < until_ns]
            start += self.period_ns
        return found

    def with_outages(self, outages_ns: Sequence[tuple[int, int]], until_ns: int) -> Trace:
        """The same trace, written out to ``until_ns``, with no capacity in the half-open intervals given."""
        for begin, end in outages_ns:
            if not 0 <= begin < end:
                raise ConfigError(f"an outage must begin at 0 or later and end after it begins, got {begin}..{end} ns")
        marks = sorted({t for t, _ in self.steps(until_ns)} | {m for pair in outages_ns for m in pair if m < until_ns})
        dead = [any(b <= t < e for b, e in outages_ns) for t in marks]
        return Trace([(t, 0.0 if d else self.bps(t)) for t, d in zip(marks, dead, strict=True)], until_ns, name=self.name)

    def limited(self, bps: float) -> Trace:
        """The same trace, nowhere above ``bps``."""
        steps = [(t, min(r * 1e9, bps)) for t, r in zip(self._times, self._rates, strict=True)]
        return Trace(steps, self.period_ns, name=self.name)

    def after(self, lead_ns: int, bps: float, until_ns: int) -> Trace:
        """The same trace, written out to ``until_ns``, begun ``lead_ns`` later; ``bps`` until then."""
        steps = [(0, bps), *((t + lead_ns, rate) for t, rate in self.steps(until_ns))]
        return Trace(steps, lead_ns + until_ns, name=self.name)

    def scaled(self, factor: float) -> Trace:
        """Every bitrate times ``factor``."""
        steps = [(t, r * 1e9 * factor) for t, r in zip(self._times, self._rates, strict=True)]
        return Trace(steps, self.period_ns, name=self.name)


def constant(bps: float, *, name: str = "constant") -> Trace:
    """The same capacity for ever."""
    return Trace([(0, bps)], 1_000_000_000, name=name)


def load_trace(path: Path) -> Trace:
    """Reads a trace; the format is found by looking.

    * one number a line: Mahimahi, the milliseconds at which a 1,500-byte packet may leave;
    * two columns (blanks, tab or comma): seconds and Mbit/s from that second on; a header line is allowed. Times are
      rebased to 0; the last step lasts as long as the median step.

    Raises:
        ConfigError: unreadable, empty, or not one of these.
    """
    try:
        lines = [
            line.replace(",", " ").split()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip() and line.strip()[0] != "#"
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    if lines and not _is_number(lines[0][0]):
        lines = lines[1:]
    try:
        rows = [[float(x) for x in line[:2]] for line in lines]
    except ValueError as error:
        raise ConfigError(f"trace {path}: {error}; lines must be `milliseconds` or `seconds Mbit/s`") from error
    if not rows or any(len(r) != len(rows[0]) for r in rows):
        raise ConfigError(f"trace {path} is empty or has lines of different lengths")
    return _mahimahi([r[0] for r in rows], path.stem) if len(rows[0]) == 1 else _columns(rows, path.stem)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _mahimahi(opportunities_ms: Sequence[float], name: str) -> Trace:
    """Bytes, not packets, are what an opportunity carries here: a small packet leaves the rest to the next."""
    counts: dict[int, int] = {}
    for ms in opportunities_ms:
        counts[int(ms)] = counts.get(int(ms), 0) + 1
    period = max(counts)
    if min(counts) < 0 or period < 1:
        raise ConfigError(f"trace {name!r}: Mahimahi times must be milliseconds from 0, the last one above 0")
    steps: list[tuple[int, float]] = []
    for ms in range(period):
        # The line `0` and the line `period` are the same moment of two rounds.
        rate = float((counts.get(ms, 0) + (counts[period] if ms == 0 else 0)) * _MTU_BITS * 1000)
        if not steps or steps[-1][1] != rate:
            steps.append((ms * 1_000_000, rate))
    return Trace(steps, period * 1_000_000, name=name)


def _columns(rows: Sequence[Sequence[float]], name: str) -> Trace:
    start = rows[0][0]
    steps = [(int((s - start) * 1e9), mbps * 1e6) for s, mbps in rows]
    gaps = sorted(b[0] - a[0] for a, b in pairwise(steps))
    last = gaps[len(gaps) // 2] if gaps else 1_000_000_000
    return Trace(steps, steps[-1][0] + last, name=name)
