"""What a frame's payload really costs, learnt as payloads come.

The bundle's table was measured on stills of other places. At a camera a frame is predicted from an earlier one and costs a
fraction of that; which fraction depends on the scene and on how old the reference is. A controller that
believes the table sends less than the link would carry.

So the logarithm of a payload's size is taken as a sum: the table's, a part that all choices of one kind have in common at one age
of the reference, and a small one of the choice's own. What one choice costs thus tells what those never tried would. Both parts
are normal distributions, sharpened by every payload and widened by time (a Kalman filter on the diagonal): that is how the
past is forgotten. One frame far off, such as a scene cut, moves little; several in a row move the estimate to where they are.
A choice's own part fades, so that a choice that once cost much is tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import exp, inf, log, sqrt

from splitters.bundle.operating_point import Quantiles

MAX_AGE = 8
"""References older than this many frame intervals count as this old."""

_P95 = 1.645  # a normal distribution's, in standard deviations
# Of the logarithm of a size over the table's, before anything was seen. A predicted frame costs a fiftieth of a still where
# nothing moves, and all of it where everything does.
_COMMON_VAR, _OWN_VAR = 0.3**2, 0.3**2
_PREDICTED_MEAN, _PREDICTED_VAR = log(0.3), 1.5**2
_NEXT_AGE_VAR = 0.2**2  # between one age of the reference and the next
_COMMON_DRIFT_PER_S, _OWN_DRIFT_PER_S = 0.005, 0.001  # variance gained
_COMMON_FADE_S, _OWN_FADE_S = 300.0, 60.0
_LEAST_NOISE, _MOST_NOISE, _NOISE_GAIN = 0.03, 1.0, 0.05
_FAR = 2.5  # standard deviations beyond which a payload is an exception ...
_TURN = 3  # ... unless this many in a row are, on the same side
_MOST = log(256.0)  # nothing is believed to cost more than 256 times what the table says, or less than a 256th


@dataclass(slots=True)
class _Part:
    """One term: a normal distribution, as of a time."""

    var: float
    prior_var: float
    drift_per_s: float
    fade_s: float
    prior_mean: float = 0.0
    mean: float = 0.0
    at_ns: int = 0

    def mean_at(self, now_ns: int) -> float:
        """The mean, faded by the time that passed."""
        passed_s = max(0, now_ns - self.at_ns) * 1e-9
        return self.prior_mean + (self.mean - self.prior_mean) * exp(-passed_s / self.fade_s)

    def age(self, now_ns: int) -> None:
        """Widens, and fades towards what was believed at first, by the time that passed."""
        passed_s = max(0, now_ns - self.at_ns) * 1e-9
        self.mean, self.at_ns = self.mean_at(now_ns), max(self.at_ns, now_ns)
        self.var = max(self.var, min(self.var + self.drift_per_s * passed_s, self.prior_var))


@dataclass(slots=True)
class _Context:
    """What the choices of one kind have in common at one age of the reference."""

    common: _Part
    noise: float  # standard deviation of single payloads
    seen: int = 0
    streak: int = 0  # exceptions in a row, by sign

    def learn(self, own: _Part, off: float, now_ns: int) -> None:
        """Takes the logarithm of a payload's size over the table's."""
        self.common.age(now_ns)
        own.age(now_ns)
        error = off - self.common.mean - own.mean
        total = self.common.var + own.var + self.noise**2
        far = _FAR * sqrt(total)
        if abs(error) > far:
            sign = 1 if error > 0 else -1
            self.streak = self.streak + sign if self.streak * sign >= 0 else sign
            if abs(self.streak) >= _TURN:
                self.common.var += error * error
                total += error * error
                self.streak = 0
            else:
                error = sign * far
        else:
            self.streak = 0
        self.seen += 1
        for part in (self.common, own):
            gain = part.var / total
            part.mean = min(max(part.mean + gain * error, -_MOST), _MOST)
            part.var *= 1 - gain
        # What is left after the update is this payload's own.
        left = min(abs(off - self.common.mean - own.mean), far)
        var = self.noise**2 + max(_NOISE_GAIN, 1 / (self.seen + 4)) * (left * left - self.noise**2)
        self.noise = min(max(sqrt(max(var, 0.0)), _LEAST_NOISE), _MOST_NOISE)


@dataclass(slots=True)
class PayloadSizes:
    """The sizes of one bundle's choices.

    Attributes:
        table: by the choice's name, as measured on stills.
        kinds: by the choice's name; choices of one kind learn from each other.
    """

    table: Mapping[str, Quantiles]
    kinds: Mapping[str, str]
    _contexts: dict[tuple[str, int], _Context] = field(default_factory=dict)
    _own: dict[tuple[str, bool], _Part] = field(default_factory=dict)

    def learn(self, name: str, age: int, n_bytes: int, now_ns: int) -> None:
        """Takes a payload.

        Args:
            name: the choice it is of; unknown ones, and those without a size in the table, are passed over.
            age: of the reference that it could be predicted from, in frame intervals; 0: there was none.
            n_bytes: all of its layers.
            now_ns: of any one monotonic clock.
        """
        said = self.table.get(name)
        if said is None or said.p50 <= 0 or n_bytes <= 0:
            return
        context = self._context(self.kinds[name], _bounded(age), said, now_ns)
        context.learn(self._own_of(name, age, now_ns), log(n_bytes / said.p50), now_ns)

    def expect(self, name: str, age: int, now_ns: int) -> Quantiles:
        """What a payload of that choice is expected to cost with a reference of that age."""
        p50, p95 = self.expect_all(((name, age),), now_ns)[0]
        return Quantiles(p50=p50, p95=p95)

    def expect_all(self, rows: Iterable[tuple[str, int]], now_ns: int) -> list[tuple[float, float]]:
        """The same of several choices with the ages of their references, as medians and 95th percentiles."""
        # Logarithm over the table, the same as a factor, p95 over the median.
        commons: dict[tuple[str, int], tuple[float, float, float] | None] = {}
        found: list[tuple[float, float]] = []
        for name, age in rows:
            said, key, predicted = self.table[name], (self.kinds[name], age), age > 0
            if key not in commons:
                context = self._nearest(key[0], _bounded(age))
                mean = context.common.mean_at(now_ns) if context is not None else 0.0
                commons[key] = (mean, _factor(mean), exp(_P95 * context.noise)) if context is not None else None
            common = commons[key]
            if said.p50 <= 0 or (common is None and not predicted):
                found.append((said.p50, said.p95))
            elif common is None:
                found.append((said.p50 * exp(_PREDICTED_MEAN), max(said.p50, said.p95) * exp(_PREDICTED_MEAN)))
            else:
                own = self._own.get((name, predicted))
                middle = said.p50 * (common[1] if own is None else _factor(common[0] + own.mean_at(now_ns)))
                found.append((middle, middle * common[2]))
        return found

    def _context(self, kind: str, age: int, said: Quantiles, now_ns: int) -> _Context:
        """The context a payload belongs to; a new one starts from the nearest age that is known."""
        context = self._contexts.get((kind, age))
        if context is None:
            near = self._nearest(kind, age) if age else None
            mean, var = (_PREDICTED_MEAN, _PREDICTED_VAR) if age else (0.0, _COMMON_VAR)
            common = _Part(
                mean=near.common.mean_at(now_ns) if near is not None else mean,
                var=near.common.var + _NEXT_AGE_VAR if near is not None else var,
                prior_mean=mean, prior_var=var, drift_per_s=_COMMON_DRIFT_PER_S, fade_s=_COMMON_FADE_S, at_ns=now_ns,
            )  # fmt: skip
            noise = near.noise if near is not None else log(max(said.p95, said.p50) / said.p50) / _P95
            context = _Context(common, min(max(noise, _LEAST_NOISE), _MOST_NOISE))
            self._contexts[kind, age] = context
        return context

    def _nearest(self, kind: str, age: int) -> _Context | None:
        """The same age's context, or of predicted frames the nearest age's; a frame with a reference is unlike one without."""
        found, best = None, inf
        for (other, other_age), context in self._contexts.items():
            if other == kind and (other_age > 0) == (age > 0) and abs(other_age - age) < best:
                found, best = context, abs(other_age - age)
        return found

    def _own_of(self, name: str, age: int, now_ns: int) -> _Part:
        key = name, age > 0
        if key not in self._own:
            self._own[key] = _Part(var=_OWN_VAR, prior_var=_OWN_VAR, drift_per_s=_OWN_DRIFT_PER_S, fade_s=_OWN_FADE_S, at_ns=now_ns)
        return self._own[key]


def _factor(off: float) -> float:
    """Of a size over the table's, from its logarithm."""
    return exp(min(max(off, -_MOST), _MOST))


def _bounded(age: int) -> int:
    return min(max(age, 0), MAX_AGE)
