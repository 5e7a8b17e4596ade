"""Traces the project makes itself: seeded, and shaped like the networks they are named after.

The Markov families walk among a few bitrates with geometric dwell times, log-normal scatter around each, and now and
then a short outage; their levels follow published drive tests in kind, not in detail.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from deploy.testbed.link.trace import Trace
from protos.errors import ConfigError

_STEP_NS = 500_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Markov:
    levels_mbps: tuple[float, ...]
    stay: float
    scatter: float
    outage_per_step: float
    outage_steps: int


_MARKOV = {
    "3g": _Markov(levels_mbps=(0.3, 0.8, 1.6, 3.0), stay=0.85, scatter=0.25, outage_per_step=0.004, outage_steps=4),
    "lte": _Markov(levels_mbps=(1.5, 4, 9, 18, 30), stay=0.8, scatter=0.3, outage_per_step=0.002, outage_steps=2),
    "5g": _Markov(levels_mbps=(4, 40, 120, 250), stay=0.75, scatter=0.4, outage_per_step=0.006, outage_steps=2),
    "satellite": _Markov(levels_mbps=(4, 8, 14), stay=0.9, scatter=0.15, outage_per_step=0.01, outage_steps=1),
}


def synthesise(kind: str, seed: int = 0, *, duration_s: float = 60.0) -> Trace:
    """A synthetic trace: ``3g``, ``lte``, ``5g``, ``satellite``, ``step``, ``ramp`` or ``tunnel``.

    Raises:
        ConfigError: no such kind.
    """
    name = f"{kind}-{seed}"
    duration_ns = int(duration_s * 1e9)
    if kind in _MARKOV:
        return _markov(_MARKOV[kind], random.Random(f"{kind}/{seed}"), duration_ns, name)  # noqa: S311
    shapes: dict[str, Callable[[random.Random, int, str], Trace]] = {"step": _step, "ramp": _ramp, "tunnel": _tunnel}
    if kind not in shapes:
        raise ConfigError(f"no synthetic trace {kind!r}; there are {', '.join(KINDS)}")
    return shapes[kind](random.Random(f"{kind}/{seed}"), duration_ns, name)  # noqa: S311


KINDS = (*_MARKOV, "step", "ramp", "tunnel")


def _markov(m: _Markov, rng: random.Random, duration_ns: int, name: str) -> Trace:
    steps: list[tuple[int, float]] = []
    at, level, out = 0, rng.randrange(len(m.levels_mbps)), 0
    while at < duration_ns:
        if out == 0 and rng.random() < m.outage_per_step:
            out = m.outage_steps
        if rng.random() > m.stay:
            level = min(len(m.levels_mbps) - 1, max(0, level + rng.choice((-1, 1))))
        mbps = 0.0 if out else m.levels_mbps[level] * rng.lognormvariate(0.0, m.scatter)
        out = max(0, out - 1)
        steps.append((at, mbps * 1e6))
        at += _STEP_NS
    return Trace(steps, at, name=name)


def _step(rng: random.Random, duration_ns: int, name: str) -> Trace:
    high, low = rng.uniform(3e6, 8e6), rng.uniform(0.2e6, 0.8e6)
    quarter = duration_ns // 4
    return Trace([(0, high), (quarter, low), (2 * quarter, high), (3 * quarter, low)], duration_ns, name=name)


def _ramp(rng: random.Random, duration_ns: int, name: str) -> Trace:
    high, low, n = rng.uniform(4e6, 10e6), rng.uniform(0.1e6, 0.4e6), 60
    half = n // 2
    rates = [high + (low - high) * (i / half if i <= half else (n - i) / half) for i in range(n)]
    return Trace([(i * duration_ns // n, r) for i, r in enumerate(rates)], duration_ns, name=name)


def _tunnel(rng: random.Random, duration_ns: int, name: str) -> Trace:
    """An LTE-like link that is gone for ten seconds in the middle."""
    base = _markov(_MARKOV["lte"], rng, duration_ns, name)
    begin = int(duration_ns * 0.4)
    return base.with_outages([(begin, min(begin + 10_000_000_000, duration_ns - 1))], duration_ns)
